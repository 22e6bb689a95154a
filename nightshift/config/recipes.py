"""Recipes: named training configs, and what each is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nightshift.config.project import Project
from nightshift.config.sections import (
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    HardwareConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    StartConfig,
)
from nightshift.config.train import TrainConfig
from nightshift.errors import ConfigError
from nightshift.explain import near_miss


@dataclass(frozen=True)
class Recipe:
    """A named config and one line that says what it is for."""

    config: TrainConfig
    detail: str


_RECIPES = {
    "quick": Recipe(
        TrainConfig(
            recipe="quick",
            model=ModelConfig(name="quick_cnn"),
            data=DataConfig(batch_size=256, drop_last=True),
            optimizer=OptimizerConfig(name="muon", lr=0.05, momentum=0.6, weight_decay=5e-4, ema_decay=0.9),
            schedule=ScheduleConfig(name="linear", epochs=6),
            augment=AugmentConfig(flip="alternating", translate=2),
            loss=LossConfig(label_smoothing=0.1),
            hardware=HardwareConfig(precision="auto"),
        ),
        "A small network for two CPU cores: over 80 % in a minute or two.",
    ),
    "tutorial": Recipe(
        TrainConfig(
            recipe="tutorial",
            model=ModelConfig(name="simple_cnn"),
            data=DataConfig(batch_size=32, normalization="half"),
            optimizer=OptimizerConfig(name="adam", lr=1e-3),
            schedule=ScheduleConfig(epochs=10),
        ),
        "The PyTorch tutorial's network and loop, unchanged: about 71 %.",
    ),
    "resnet18": Recipe(
        TrainConfig(
            recipe="resnet18",
            model=ModelConfig(name="resnet18"),
            data=DataConfig(batch_size=128, drop_last=True),
            optimizer=OptimizerConfig(name="sgd", lr=0.1, weight_decay=5e-4),
            schedule=ScheduleConfig(name="one_cycle", epochs=30),
            augment=AugmentConfig(flip="random", translate=4),
            loss=LossConfig(label_smoothing=0.1),
            hardware=HardwareConfig(precision="auto"),
        ),
        "torchvision's ResNet-18 with a stem for 32x32 images. For a GPU.",
    ),
    "finetune": Recipe(
        TrainConfig(
            recipe="finetune",
            model=ModelConfig(name="torchvision:resnet18"),
            start=StartConfig(name="pretrained", weights="hub"),
            data=DataConfig(batch_size=32, normalization="network", drop_last=True),
            optimizer=OptimizerConfig(name="adamw", lr=2e-3, weight_decay=0.01, layer_decay=0.1),
            schedule=ScheduleConfig(name="cosine", epochs=8, warmup=0.1, frozen_epochs=1),
            augment=AugmentConfig(flip="random", translate=4),
            loss=LossConfig(label_smoothing=0.1),
            hardware=HardwareConfig(precision="auto"),
        ),
        "A network that has seen millions of other images learns yours: for few images.",
    ),
    "speedrun": Recipe(
        TrainConfig(
            recipe="speedrun",
            model=ModelConfig(name="speednet"),
            data=DataConfig(batch_size=2000, drop_last=True),
            optimizer=OptimizerConfig(name="muon", lr=0.24, momentum=0.6, weight_decay=0.004),
            schedule=ScheduleConfig(name="linear", epochs=8),
            augment=AugmentConfig(flip="alternating", translate=2),
            loss=LossConfig(label_smoothing=0.2),
            evaluation=EvaluationConfig(tta="crops"),
            hardware=HardwareConfig(precision="auto"),
        ),
        "The published ideas for training fast: 94 % in 8 epochs. For a GPU.",
    ),
}


def recipe_names(project: Project | None = None) -> list[str]:
    """The recipes of nightshift, and those of a project after them.

    Raises:
        ConfigError: the project gives one of its own the name of one of nightshift's.
    """
    own = (project or Project()).recipes
    for name in own.keys() & _RECIPES:
        raise ConfigError(
            f"[recipes.{name}] of the project file: nightshift has a recipe of this name. Give yours another, with "
            f'base = "{name}"'
        )
    return [*sorted(_RECIPES), *sorted(own)]


def get_recipe(name: str, project: Project | None = None) -> Recipe:
    """The recipe called `name`, of nightshift or of a project.

    Raises:
        ConfigError: there is none, or it rests on itself, or a name is taken twice; the message lists those there are.
    """
    own, known = (project or Project()).recipes, recipe_names(project)
    chain, overrides = [name], dict[str, Any]()
    while (found := own.get(chain[-1])) and found.base not in chain:
        overrides = {**found.overrides, **overrides}
        chain.append(found.base)
    if found:
        raise ConfigError(f"recipe {name!r} rests on itself: {' → '.join([*chain, found.base])}")
    if chain[-1] not in _RECIPES:
        raise ConfigError(
            f"there is no recipe {chain[-1]!r}.{near_miss(chain[-1], known)} The recipes are: {', '.join(known)}"
        )
    base = _RECIPES[chain[-1]]
    if len(chain) == 1:
        return base
    try:
        config = base.config.override(overrides)
    except ConfigError as error:
        raise ConfigError(f"recipe {name!r} of the project file: {error}") from None
    return Recipe(config.model_copy(update={"recipe": name}), f"{chain[1]}, changed by nightshift.toml.")


def named(config: TrainConfig, project: Project | None = None) -> tuple[str, dict[str, Any]]:
    """A recipe, and the fields in which a config differs from it. `make_config` rebuilds the config from the two.

    The recipe is the config's own, or `quick` if that one no longer exists.
    """
    recipe = config.recipe if config.recipe in recipe_names(project) else "quick"
    base = get_recipe(recipe, project).config.flat()
    return recipe, {name: value for name, value in config.flat().items() if base[name] != value and name != "recipe"}


def make_config(
    recipe: str,
    overrides: Mapping[str, Any] | None = None,
    night: datetime | None = None,
    project: Project | None = None,
) -> TrainConfig:
    """A recipe's config with some fields replaced.

    Args:
        overrides: as for `TrainConfig.override`. Besides, the seed `date` becomes a number that differs each night,
            such as 20261125.
        night: the night whose date the seed takes; by default now, in UTC. If it is given, a time of day in
            `budget.finish_by` becomes a moment, in the zone of `night`.
        project: a project whose own recipes count too.

    Raises:
        ConfigError: the recipe or a field does not exist, or a value is out of range.
    """
    overrides = dict(overrides or {})
    if "recipe" in overrides:
        raise ConfigError("recipe cannot be overridden: name the recipe itself (--recipe)")
    if overrides.get("seed") == "date":
        overrides["seed"] = int(f"{night or datetime.now(UTC):%Y%m%d}")
    config = get_recipe(recipe, project).config.override(overrides)
    return config.begun_at(night) if night else config
