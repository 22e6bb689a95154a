"""The commands for a Prefect server: `up`, `down`, `deploy`, `submit`, `sweep`, `worker`."""

import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nightshift.cli.common import AsJson, app, console, error_console, print_json
from nightshift.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from deployments.submit import Submitted
    from nightshift.settings import Settings

_PANEL = "Servers and machine"


@app.command(rich_help_panel=_PANEL)
def up(as_json: AsJson = False) -> None:
    """Start S3, a Prefect server and a worker on this machine, with everything deployed; they stay."""
    from nightshift.cli.terminal import TerminalProgress, facts_table

    settings = _settings_for_workers()
    with TerminalProgress(error_console()) as display, display.waiting("starting S3, Prefect and a worker"):
        from deployments import local

        running = local.up(settings)
    if as_json:
        print_json(
            {
                "prefect_ui": running.prefect_ui,
                "s3_endpoint": running.s3_endpoint,
                "deployments": running.deployments,
                "prefect_api_url": running.api_url,
            }
        )
        return
    console().print(
        facts_table(
            {
                "Prefect": running.prefect_ui,
                "S3": running.s3_endpoint,
                "deployments": "  ".join(running.deployments),
                "train now": "nightshift submit --watch",
                "with Prefect": f"export PREFECT_API_URL={running.api_url}",
                "stop it all": "nightshift down",
            }
        ),
        soft_wrap=True,
    )


@app.command(rich_help_panel=_PANEL)
def down(as_json: AsJson = False) -> None:
    """Stop what `up` has started; runs in progress are saved first."""
    from nightshift.cli.terminal import TerminalProgress
    from nightshift.settings import Settings

    with TerminalProgress(error_console()) as display, display.waiting("stopping; runs in progress save first"):
        from deployments import local

        stopped = local.down(Settings.load())
    if as_json:
        print_json({"stopped": stopped})
    else:
        console().print(f"stopped: {', '.join(stopped) or 'nothing was running'}", highlight=False)


@app.command(rich_help_panel=_PANEL)
def deploy(as_json: AsJson = False) -> None:
    """Make or update nightshift's work pool, deployments and automations on the Prefect server."""
    from nightshift.settings import Settings

    _use_server()
    from deployments.apply import apply

    deployments = apply(Settings.load().notify)
    if as_json:
        print_json({"deployments": deployments})
    else:
        console().print(f"deployed: {', '.join(deployments)}", highlight=False)


@app.command(rich_help_panel="Train")
def submit(
    name: Annotated[
        str, typer.Argument(metavar="[FLOW[/DEPLOYMENT]]", help="The deployment, or a flow for its nightly one.")
    ] = "train-cifar/nightly",
    recipe: Annotated[str | None, typer.Option(help="Another recipe than the deployment's.")] = None,
    run_id: Annotated[str | None, typer.Option("--run-id", help="Another run id than the deployment's.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the config.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for the end, through crashes and resumes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run on the Prefect server."""
    from nightshift.cli.train import parse_settings

    chosen = {"recipe": recipe, "run_id": run_id, "overrides": parse_settings(overrides or []) or None}
    _use_server()

    from deployments import submit as submission

    submitted = submission.submit(name, {key: value for key, value in chosen.items() if value is not None})
    state, is_good = _follow(submitted, watch, as_json)
    if as_json:
        print_json({"flow_run_id": str(submitted.flow_run_id), "run_id": submitted.run_id, "state": state})
    if not is_good:
        raise typer.Exit(1)


@app.command(rich_help_panel="Train")
def sweep(
    over: Annotated[
        list[str],
        typer.Option(
            "--over",
            metavar="FIELD=V1,V2,…|FIELD=LOW..HIGH[:log|:STEP]",
            help="The values, or the range, of a field of the config.",
        ),
    ],
    trials: Annotated[
        int | None, typer.Option(min=1, help="How many a study asks for (TPE); by default all of the grid.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The recipe to start from.")] = "quick",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field in every trial.")
    ] = None,
    sweep_id: Annotated[
        str | None, typer.Option("--sweep-id", help="Name of the sweep; an unfinished one of this name goes on.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Trials at once.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the study.")] = 0,
    startup_trials: Annotated[
        int, typer.Option(min=1, help="So many must have finished before a bad one is stopped early.")
    ] = 4,
    warmup_epochs: Annotated[int, typer.Option(min=0, help="So many epochs each has before it may be stopped.")] = 2,
    promote: Annotated[bool, typer.Option(help="Let the best go live if it is better.")] = True,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for the end, and show how the trials ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train many configs on the Prefect server, each as a run, and let the best go live if it is better."""
    from nightshift.cli.train import parse_settings
    from nightshift.ids import new_run_id

    chosen = {
        "space": _parse_space(over),
        "trials": trials,
        "recipe": recipe,
        "overrides": parse_settings(overrides or []),
        "sweep_id": sweep_id if sweep_id is not None else new_run_id("sweep", datetime.now(UTC)),
        "parallel": parallel,
        "seed": seed,
        "startup_trials": startup_trials,
        "warmup_epochs": warmup_epochs,
        "promote": promote,
    }
    _use_server()

    from deployments import submit as submission

    submitted = submission.submit("sweep/manual", chosen)
    state, is_good = _follow(submitted, watch, as_json)
    trials_table = submission.read_table(submitted, "sweep") if watch else None
    if as_json:
        told = {"flow_run_id": str(submitted.flow_run_id), "sweep_id": submitted.run_id, "state": state}
        print_json({**told, "trials": trials_table})
    elif trials_table:
        from nightshift.cli.terminal import lines_table

        console().print(lines_table(trials_table))
    if not is_good:
        raise typer.Exit(1)


@app.command(rich_help_panel=_PANEL)
def worker(
    pool: Annotated[str, typer.Option(help="The work pool to work for.")] = "gpu-process",
    limit: Annotated[int | None, typer.Option(min=1, help="Runs at a time; 1 for a GPU.")] = None,
) -> None:
    """Be a Prefect worker whose runs are saved when it is told to stop."""
    settings = _settings_for_workers()
    _use_server()
    from deployments.worker import run

    sys.exit(run(pool, limit, grace_seconds=settings.save_retry_seconds + 30))


def _follow(submitted: "Submitted", watch: bool, as_json: bool) -> tuple[str, bool]:
    """Say what was started, watch it to its end if that is wanted, and return its last state and whether it is good."""
    from deployments import submit as submission

    say, state, is_good = error_console() if as_json else console(), "Scheduled", True
    say.print(f"run {submitted.run_id or submitted.name}  {submitted.url or ''}", highlight=False, soft_wrap=True)
    if watch:
        try:
            for reached in submission.watch(submitted):
                state, is_good = reached.name or reached.type.value, reached.is_completed()
                say.print(f"  {reached.timestamp:%H:%M:%S}  {state}  {reached.message or ''}", highlight=False)
        except KeyboardInterrupt:
            raise Interrupted("no longer watched; the run goes on") from None
    return state, is_good


def _parse_space(over: list[str]) -> dict[str, Any]:
    """The space of `nightshift.sweeps.stored.plan`, whose values are still text."""
    space: dict[str, Any] = {}
    for text in over:
        name, _, wanted = (part.strip() for part in text.partition("="))
        if not name or not wanted:
            raise ConfigError(f"--over {text!r} is not FIELD=V1,V2 or FIELD=LOW..HIGH, such as --over lr=0.05,0.1")
        if name in space:
            raise ConfigError(f"--over names {name} twice: put all its values behind one")
        low, dots, rest = wanted.partition("..")
        high, _, how = rest.partition(":")
        if dots:
            space[name] = {
                "low": low,
                "high": high,
                **({"log": True} if how == "log" else {"step": how} if how else {}),
            }
        else:
            space[name] = [value.strip() for value in wanted.split(",")]
    return space


def _settings_for_workers() -> "Settings":
    """The settings, which the processes of flow runs will find in their environment: they run elsewhere."""
    from dotenv import load_dotenv

    from nightshift.settings import Settings

    load_dotenv(".env")
    settings = Settings.load()
    os.environ["NIGHTSHIFT_HOME"] = str(settings.home.resolve())
    return settings


def _use_server() -> None:
    """Choose the Prefect server, which Prefect reads from the environment when it is imported."""
    from nightshift.local.prefect import server_url
    from nightshift.settings import Settings

    url = server_url(Settings.load().home)
    if not url:
        raise ConfigError(
            "no Prefect server: set PREFECT_API_URL to yours, or start one on this machine with `nightshift up`"
        )
    os.environ["PREFECT_API_URL"] = url
