"""What the user asks to be trained, as the options have it: `--recipe`, `--set` and `--over`.

Nothing in here takes long or touches a server, so that a mistake is reported at once.
"""

from typing import Annotated, Any

import typer

from nightshift.errors import ConfigError, NightshiftError


def _recipe_names() -> list[str]:
    from nightshift.config.project import load_project
    from nightshift.config.recipes import recipe_names
    from nightshift.settings import Settings

    try:
        return recipe_names(load_project(Settings.load().project))
    except NightshiftError:  # the command itself says what is wrong
        return recipe_names()


def _field_names() -> list[str]:
    from nightshift.config.train import TrainConfig, fields

    return [f"{name}=" for name, _ in fields(TrainConfig)]


def recipe_option(help_text: str) -> Any:
    """The option `--recipe`, which the shell completes."""
    return typer.Option("--recipe", help=help_text, autocompletion=_recipe_names)


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Replace a field of the config, such as optimizer.lr=0.1, or lr=0.1 for short.",
        autocompletion=_field_names,
    ),
]


def parse_overrides(settings: list[str] | None) -> dict[str, str]:
    """The values of `--set`, which are still text, by field."""
    overrides = {}
    for setting in settings or []:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {setting!r} is not FIELD=VALUE, such as --set epochs=3")
        overrides[name.strip()] = value.strip()
    return overrides


def parse_space(over: list[str]) -> dict[str, Any]:
    """The values of `--over` as the space of a sweep's plan, whose values are still text."""
    space: dict[str, Any] = {}
    for text in over:
        name, _, wanted = (part.strip() for part in text.partition("="))
        if not name or not wanted:
            raise ConfigError(f"--over {text!r} is not FIELD=V1,V2 or FIELD=LOW..HIGH, such as --over lr=0.05,0.1")
        if name in space:
            raise ConfigError(f"--over names {name} twice: put all its values behind one")
        space[name] = _parse_range(wanted) if ".." in wanted else [value.strip() for value in wanted.split(",")]
    return space


def _parse_range(text: str) -> dict[str, Any]:
    """LOW..HIGH, LOW..HIGH:log or LOW..HIGH:STEP."""
    low, _, rest = text.partition("..")
    high, _, how = rest.partition(":")
    if how == "log":
        return {"low": low, "high": high, "log": True}
    return {"low": low, "high": high, **({"step": how} if how else {})}
