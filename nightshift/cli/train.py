"""The commands that train in this process: `train`, `resume`, `join`, `recover`."""

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from nightshift.cli.common import (
    LONGEST_HOURS,
    AsJson,
    RunArgument,
    Verbose,
    app,
    configured_workspace,
    console,
    error_console,
    print_error,
    print_json,
    use_server_if_any,
)
from nightshift.cli.config import Overrides, parse_overrides, recipe_option
from nightshift.cli.in_process import flow_runner, quieten
from nightshift.errors import ConfigError, Interrupted, NightshiftError, SettingsError

if TYPE_CHECKING:
    from rich.text import Text

    from nightshift.config.train import TrainConfig
    from nightshift.records.recovery import Found
    from nightshift.records.run import RunRecord
    from nightshift.refs import Verdict


@app.command(rich_help_panel="Train")
def train(
    recipe: Annotated[str, recipe_option("The recipe; `nightshift recipes` lists them.")] = "quick",
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="Name of the run; an unfinished one of this name is resumed.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option("--images", metavar="PLACE", help="Train on a folder, an s3:// prefix or a table, as it is."),
    ] = None,
    snapshot: Annotated[
        str | None,
        typer.Option("--snapshot", metavar="DIGEST", help="Train on an earlier snapshot; `nightshift data list`."),
    ] = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train, evaluate and publish: the whole flow in this process."""
    from nightshift.config.project import load_project
    from nightshift.data.names import check_extras, check_source, checked_config, dataset_config
    from nightshift.data.specs import SPECS
    from nightshift.ids import new_run_id, parse_run_id
    from nightshift.settings import Settings

    project, changes = load_project(Settings.load().project), parse_overrides(overrides)
    if images in project.datasets:
        changes, images = {"dataset": images, **changes}, None
    config = checked_config(recipe, changes, project=project, images=images)
    check_extras(config)
    config.budget.hours(Settings.load().price_per_hour)
    if config.data.dataset not in SPECS:
        place = dataset_config(project, config.data.dataset, images)
        if not snapshot:  # its images may be gone by now
            check_source(place)
    elif snapshot:
        raise ConfigError(f"--snapshot {snapshot}: {config.data.dataset} never changes, and so has one snapshot")
    run_id = parse_run_id(run_id) if run_id is not None else new_run_id(recipe, datetime.now(UTC))
    config = config.begun_at(datetime.now())  # a time of day is that of this machine
    _run_and_print(run_id, config, as_json, verbose, images=images, snapshot=snapshot)


@app.command(rich_help_panel="Train")
def resume(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field that does not decide the result."),
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Go on with a stored run on this machine, with its own config. On the server: `submit --run-id`."""
    from nightshift.records.run import read_record

    changes = parse_overrides(overrides)

    with configured_workspace() as workspace:
        record, _ = read_record(workspace.store, run)
        config = record.train_config().resumed_with(changes).begun_at(datetime.now())
        config.budget.hours(workspace.price_per_hour)
        _run_and_print(run, config, as_json, verbose, record.origin.promote)


@app.command(rich_help_panel="Train")
def join(
    nproc_per_node: Annotated[
        str, typer.Option("--nproc-per-node", metavar="N", help="Processes on this machine; auto: one a GPU.")
    ] = "auto",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Lend this machine to a run over several, at NIGHTSHIFT_NODES__RENDEZVOUS, until the run ends."""
    from nightshift import progress
    from nightshift.cli.terminal import TerminalProgress
    from nightshift.settings import Settings
    from nightshift.workspace import open_workspace

    settings = Settings.load()
    if settings.nodes.alone:
        raise SettingsError(
            "there is no run to join: set NIGHTSHIFT_NODES__COUNT and NIGHTSHIFT_NODES__RENDEZVOUS as on the machine "
            "that runs the flow"
        )
    if nproc_per_node != "auto" and not (nproc_per_node.isdecimal() and int(nproc_per_node)):
        raise ConfigError(f"--nproc-per-node {nproc_per_node!r} is not valid: a number from 1, or auto")
    quieten(verbose)
    with (
        TerminalProgress(error_console()) as display,
        progress.shown_by(display),
        open_workspace(settings) as workspace,
    ):
        with display.waiting("starting"):
            from nightshift.parallel.launch import join

        ending = join(workspace, "auto" if nproc_per_node == "auto" else int(nproc_per_node))
    detail = ending.message or "trained; the machine that runs its flow goes on alone"
    if as_json:
        print_json({"run_id": ending.run_id, "ended": ending.error or "trained", "detail": detail})
    else:
        console().print(f"run {ending.run_id}: {detail}", soft_wrap=True)
    # The machine that runs the flow reports a failed run. This one has done its part.
    if ending.interrupted:
        raise typer.Exit(3)


@app.command(rich_help_panel="Train")
def recover(
    within_hours: Annotated[
        float,
        typer.Option(
            "--within-hours", min=0, max=LONGEST_HOURS, help="Look only at runs that were written to in so many hours."
        ),
    ] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show which runs are interrupted.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Start interrupted runs again: on the Prefect server if they came from there, else in this process."""
    from nightshift import progress
    from nightshift.cli.terminal import TerminalProgress
    from nightshift.records import recovery
    from nightshift.settings import Settings

    settings = Settings.load()
    started: list[str] = []
    failed: list[str] = []
    on_server = use_server_if_any()
    with (
        TerminalProgress(error_console()) as display,
        progress.shown_by(display),
        configured_workspace() as workspace,
        ExitStack() as stack,
    ):
        found = recovery.find(workspace.store, timedelta(hours=within_hours))
        if dry_run:
            _print_found(found, as_json)
            return
        if on_server:
            from flows.recover import start_deployed

            started += start_deployed(workspace.store, found, settings)
        here = [run for run in found.interrupted if not (on_server and run.record.origin.deployment)]
        run_flow = None
        for record in recovery.claim_due(workspace.store, here, settings.max_recoveries):
            run_flow = run_flow or stack.enter_context(flow_runner(verbose))
            started.append(record.run_id)
            try:
                run_flow(record.run_id, record.train_config(), record.origin.promote)
            except Interrupted:
                raise
            except Exception as error:  # whatever it is, the next run has its turn
                failed.append(record.run_id)
                print_error(
                    error if isinstance(error, NightshiftError) else NightshiftError(f"{record.run_id}: {error!r}")
                )
    if as_json:
        print_json({"started": started, "failed": failed, "live": found.live})
    else:
        console().print(f"started: {', '.join(started) or 'none'}")
        if failed:
            console().print(f"of these failed: {', '.join(failed)}")
        console().print(f"live, so left alone: {', '.join(found.live) or 'none'}")
    if failed:
        raise typer.Exit(1)


def _print_found(found: "Found", as_json: bool) -> None:
    if as_json:
        print_json({"interrupted": [run.record.run_id for run in found.interrupted], "live": found.live})
        return
    for run in found.interrupted:
        where = run.record.origin.deployment or "this process"
        console().print(f"{run.record.run_id}: to be started by {where}, not before {run.due:%Y-%m-%d %H:%M:%S} UTC")
    console().print(f"{len(found.interrupted)} interrupted; live, so left alone: {', '.join(found.live) or 'none'}")


def _run_and_print(
    run_id: str,
    config: "TrainConfig",
    as_json: bool,
    verbose: bool,
    promote: bool = True,
    images: str | None = None,
    snapshot: str | None = None,
) -> None:
    with flow_runner(verbose) as run_flow:
        record = run_flow(run_id, config, promote, images, snapshot)
    if as_json:
        print_json(record.summary())
    else:
        _print_summary(record)


def _print_summary(record: "RunRecord") -> None:
    from rich.panel import Panel

    from nightshift.cli.screen import styled
    from nightshift.cli.terminal import facts_table, percent, status_text
    from nightshift.judging.table import guards_table

    assert record.result is not None
    newest, chosen = record.checkpoints[-1], record.chosen
    epochs = f"{newest.epoch} epoch{'s' * (newest.epoch != 1)}"
    facts: dict[str, str | Text] = {
        "status": status_text(record.status),
        "test accuracy": styled(percent(record.result.test_accuracy), "bold"),
        "training": f"{record.train_seconds:,.1f} s, {record.step:,} steps, {epochs}",
        "data": f"{record.dataset.name} from the {record.dataset.source}",
        "checkpoints": f"{len(record.checkpoints)} in checkpoints/{record.run_id}/",
        "published": record.result.model,
        "verdict": _verdict_text(record.result.verdict),
        "weights_sha256": record.result.weights_sha256,
    }
    if record.clock:
        facts["clock"] = record.clock
    if chosen and chosen.epoch != newest.epoch:
        facts["kept"] = f"epoch {chosen.epoch}, the best on the validation images"
    if record.resumed_from_step is not None:
        facts["resumed"] = f"from step {record.resumed_from_step:,}"
    console().print(
        Panel(facts_table(facts), title=styled(f"run {record.run_id}", ""), title_align="left", expand=False)
    )
    if record.result.verdict:
        for line in guards_table(record.result.verdict):
            console().print(line, soft_wrap=True)


def _verdict_text(verdict: "Verdict | None") -> "str | Text":
    from nightshift.cli.screen import joined, styled

    if not verdict:
        return "–"
    word = styled("promoted", "green") if verdict.promoted else styled("not promoted", "yellow")
    return joined(word, f": {verdict.reason}")
