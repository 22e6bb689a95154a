"""The commands that start flows on the Prefect server: `submit`, `sweep`."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nightshift.cli.common import AsJson, app, console, error_console, print_json, use_server
from nightshift.cli.config import Overrides, parse_overrides, parse_space, recipe_option
from nightshift.errors import Interrupted

if TYPE_CHECKING:
    from deployments.submit import Submitted


@app.command(rich_help_panel="Train")
def submit(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="FLOW/DEPLOYMENT, a flow for its nightly one, or a deployment of your own for retrain/NAME.",
        ),
    ] = "train-cifar/nightly",
    recipe: Annotated[str | None, recipe_option("Another recipe than the deployment's.")] = None,
    run_id: Annotated[str | None, typer.Option("--run-id", help="Another run id than the deployment's.")] = None,
    overrides: Overrides = None,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for the end, through crashes and resumes.")] = False,
    as_json: AsJson = False,
) -> None:
    """Start a run on the Prefect server."""
    from nightshift.config.project import load_project
    from nightshift.data.names import checked_config
    from nightshift.ids import durable_run_id
    from nightshift.settings import Settings

    values, project = parse_overrides(overrides) or None, load_project(Settings.load().project)
    if recipe or values:
        # Only the server knows the deployment's own recipe. But each field is valid or not whatever the others are.
        checked_config(recipe or "quick", values or {}, project=project)
    if run_id is not None:
        durable_run_id(run_id, "", datetime.now(UTC), "")
    parameters = {"recipe": recipe, "run_id": run_id, "overrides": values}
    use_server()
    from deployments import submit as submission

    submitted = submission.submit(name, {key: value for key, value in parameters.items() if value is not None}, project)
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
        int | None, typer.Option(min=1, help="How many trials a study (TPE) asks for; by default the whole grid.")
    ] = None,
    recipe: Annotated[str, recipe_option("The recipe to start from.")] = "quick",
    overrides: Overrides = None,
    sweep_id: Annotated[
        str | None, typer.Option("--sweep-id", help="Name of the sweep; an unfinished one of this name goes on.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="How many trials train at once.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="The study's seed.")] = 0,
    startup_trials: Annotated[
        int, typer.Option(min=1, help="So many trials must have finished before a bad one is stopped early.")
    ] = 4,
    warmup_epochs: Annotated[
        int, typer.Option(min=0, help="So many epochs each trial has before it may be stopped early.")
    ] = 2,
    deployment: Annotated[
        str | None,
        typer.Option(
            metavar="FLOW/DEPLOYMENT",
            help="What trains a trial; by default train-cifar/adhoc, or the deployment of the recipe.",
        ),
    ] = None,
    promote: Annotated[bool, typer.Option(help="Let the best go live if it is better.")] = True,
    watch: Annotated[bool, typer.Option("--watch", help="Wait for the end, and show how the trials ended.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train many configs on the Prefect server, each as a run, and let the best go live if it is better."""
    from nightshift.config.project import load_project
    from nightshift.ids import durable_run_id, new_run_id
    from nightshift.settings import Settings
    from nightshift.sweeps.stored import plan

    now = datetime.now(UTC)
    wanted: dict[str, Any] = {
        "space": parse_space(over),
        "trials": trials,
        "recipe": recipe,
        "overrides": parse_overrides(overrides),
        "seed": seed,
        "startup_trials": startup_trials,
        "warmup_epochs": warmup_epochs,
    }
    sweep_id = sweep_id if sweep_id is not None else new_run_id("sweep", now)
    project = load_project(Settings.load().project)
    # Raises ConfigError for whatever is not valid.
    plan(durable_run_id(sweep_id, "sweep", now, ""), **wanted, project=project)
    use_server()
    from deployments import submit as submission

    chosen = {"sweep_id": sweep_id, "parallel": parallel, "deployment": deployment, "promote": promote}
    submitted = submission.submit("sweep/manual", {**wanted, **chosen}, project)
    state, is_good = _follow(submitted, watch, as_json)
    trials_table = submission.read_table(submitted, "sweep") if watch else None
    if as_json:
        ids = {"flow_run_id": str(submitted.flow_run_id), "sweep_id": submitted.run_id}
        print_json({**ids, "state": state, "trials": trials_table})
    elif trials_table:
        from nightshift.cli.terminal import lines_table

        console().print(lines_table(trials_table))
    if not is_good:
        raise typer.Exit(1)


def _follow(submitted: "Submitted", watch: bool, as_json: bool) -> tuple[str, bool]:
    """Print what was started, watch it to its end if asked to, and return its last state and whether it is good."""
    from deployments import submit as submission

    screen, state, is_good = error_console() if as_json else console(), "Scheduled", True
    screen.print(f"run {submitted.run_id or submitted.name}  {submitted.url or ''}", soft_wrap=True)
    if watch:
        try:
            for reached in submission.watch(submitted):
                state, is_good = reached.name or reached.type.value, reached.is_completed()
                message, *table = (reached.message or "").split("\n")
                screen.print(f"  {reached.timestamp:%H:%M:%S}  {state}  {message}")
                for line in table:
                    screen.print(f"    {line}", soft_wrap=True)
        except KeyboardInterrupt:
            raise Interrupted("no longer watched; the run goes on") from None
    return state, is_good
