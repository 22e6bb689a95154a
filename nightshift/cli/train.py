"""The commands that train in this process: `train`, `resume`, `recover`."""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from nightshift.cli.common import (
    AsJson,
    RunArgument,
    Verbose,
    app,
    configured_workspace,
    console,
    error_console,
    print_json,
    tell,
)
from nightshift.errors import ConfigError, Interrupted, NightshiftError, SettingsError

if TYPE_CHECKING:
    from nightshift.config.train import TrainConfig
    from nightshift.records.run import RunRecord
    from nightshift.refs import Verdict


@app.command(rich_help_panel="Train")
def train(
    recipe: Annotated[str, typer.Option(help="The recipe; `nightshift recipes` lists them.")] = "quick",
    run_id: Annotated[
        str | None, typer.Option("--run-id", help="Name of the run; an unfinished one of this name is resumed.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field of the config.")
    ] = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train, evaluate and publish: the whole flow in this process."""
    from nightshift.config.recipes import make_config
    from nightshift.ids import new_run_id, parse_run_id

    overrides = parse_settings(settings or [])
    config = make_config(recipe, overrides)
    run_id = parse_run_id(run_id) if run_id is not None else new_run_id(recipe, datetime.now(UTC))
    _train(run_id, config, as_json, verbose)


@app.command(rich_help_panel="Train")
def resume(run: RunArgument, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Go on with a stored run, with the config it was started with."""
    from nightshift.records.run import read_record

    with configured_workspace() as workspace:
        record, _ = read_record(workspace.store, run)
        _train(run, record.train_config(), as_json, verbose, record.origin.promote)


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
    _quieten(verbose)
    with (
        TerminalProgress(error_console()) as display,
        progress.shown_by(display),
        open_workspace(settings) as workspace,
    ):
        with display.waiting("starting"):
            from nightshift.parallel.launch import join

        ending = join(workspace, "auto" if nproc_per_node == "auto" else int(nproc_per_node))
    told = ending.message or "trained; the machine that runs its flow goes on alone"
    if as_json:
        print_json({"run_id": ending.run_id, "ended": ending.error or "trained", "detail": told})
    else:
        console().print(f"run {ending.run_id}: {told}", highlight=False, soft_wrap=True)
    # Of a run that failed it is the other machine's to say so: this one has done its part.
    if ending.interrupted:
        raise typer.Exit(3)


@app.command(rich_help_panel="Train")
def recover(
    within_hours: Annotated[
        float, typer.Option("--within-hours", min=0, help="Look at runs that were written to so lately.")
    ] = 24,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Start interrupted runs again: on the Prefect server if they came from there, else in this process."""
    from datetime import timedelta

    from nightshift.local.prefect import server_url
    from nightshift.records import recovery
    from nightshift.settings import Settings

    settings, started, failed = Settings.load(), [], False
    url = server_url(settings.home)
    if url:
        os.environ["PREFECT_API_URL"] = url
    with configured_workspace() as workspace, ExitStack() as stack:
        found = recovery.find(workspace.store, timedelta(hours=within_hours))
        if url:
            from flows.recover import start_deployed

            started += start_deployed(workspace.store, found, settings.max_recoveries)
        here = [run for run in found.interrupted if not (url and run.record.origin.deployment)]
        run_flow = None
        for record in recovery.claims(workspace.store, here, settings.max_recoveries):
            run_flow = run_flow or stack.enter_context(_flow_runner(verbose))
            started.append(record.run_id)
            try:
                run_flow(record.run_id, record.train_config(), record.origin.promote)
            except Interrupted:
                raise
            except NightshiftError as error:
                failed = True
                tell(error)
    if as_json:
        print_json({"started": started, "live": found.live})
    else:
        console().print(f"started: {', '.join(started) or 'none'}", highlight=False)
        console().print(f"live: {', '.join(found.live) or 'none'}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _train(run_id: str, config: "TrainConfig", as_json: bool, verbose: bool, promote: bool = True) -> None:
    with _flow_runner(verbose) as run_flow:
        record = run_flow(run_id, config, promote)
    if as_json:
        print_json(record.summary())
    else:
        _print_summary(record)


@contextmanager
def _flow_runner(verbose: bool) -> Iterator[Callable[[str, "TrainConfig", bool], "RunRecord"]]:
    """Runs the flow in this process, on the user's Prefect server or on one of our own, with a live display."""
    from nightshift import progress
    from nightshift.cli.terminal import TerminalProgress
    from nightshift.local.prefect import configured_api_url, local_prefect
    from nightshift.settings import Settings

    settings = Settings.load()
    _quieten(verbose)
    # Prefect sends a SIGTERM on to the handler it found: by default that would end us before we can say how we ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        display = stack.enter_context(TerminalProgress(error_console()))
        stack.enter_context(progress.shown_by(display))
        wait_for_server = None
        if not configured_api_url():
            os.environ["PREFECT_API_URL"], wait_for_server = stack.enter_context(local_prefect(settings.home))

        def run_flow(run_id: str, config: "TrainConfig", promote: bool) -> "RunRecord":
            with display.waiting("starting"):
                # Importing torch and Prefect takes as long as the server's start, which goes on meanwhile.
                from nightshift.training.run import check_config

                check_config(config)
                from flows.train_cifar import TerminationSignal, train_cifar
                from nightshift.config.recipes import overrides_of

                if wait_for_server:
                    wait_for_server()
            display.say(f"run {run_id}, recipe {config.recipe}")
            try:
                train_cifar(recipe=config.recipe, overrides=overrides_of(config), run_id=run_id, promote=promote)
            except (TerminationSignal, KeyboardInterrupt) as stop:
                raise _interruption(stop) or Interrupted(f"stopped. To go on: nightshift resume {run_id}") from None
            return _record(run_id)

        yield run_flow


def _interruption(stop: BaseException | None) -> Interrupted | None:
    """What of ours is behind an exception that ended the flow."""
    while stop:
        if isinstance(stop, Interrupted):
            return stop
        stop = stop.__cause__ or stop.__context__
    return None


def _quieten(verbose: bool) -> None:
    """Keep what is not ours off the screen; Prefect's log still reaches its server."""
    os.environ.setdefault("DO_NOT_TRACK", "1")  # else Prefect's client puts a notice about telemetry on the screen
    os.environ.setdefault("PREFECT_LOGGING_EXTRA_LOGGERS", "nightshift")
    if verbose:
        logging.basicConfig(level=logging.INFO)
        return
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    warnings.simplefilter("ignore")


def _record(run_id: str) -> "RunRecord":
    from nightshift.records.run import read_record

    with configured_workspace() as workspace:
        return read_record(workspace.store, run_id)[0]


def parse_settings(settings: list[str]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {setting!r} is not FIELD=VALUE, such as --set epochs=3")
        pairs[name.strip()] = value.strip()
    return pairs


def _verdict_text(verdict: "Verdict | None") -> str:
    if not verdict:
        return "–"
    return f"{'[green]promoted[/]' if verdict.promoted else '[yellow]not promoted[/]'}: {verdict.reason}"


def _print_summary(record: "RunRecord") -> None:
    from rich.panel import Panel

    from nightshift.cli.terminal import facts_table, percent, status_text

    assert record.result is not None
    facts = {
        "status": status_text(record.status),
        "test accuracy": f"[bold]{percent(record.result.test_accuracy)}[/]",
        "training": f"{record.train_seconds:,.1f} s, {record.step:,} steps, {record.config['epochs']} epochs",
        "data": f"{record.dataset.name} from the {record.dataset.source}",
        "checkpoints": f"{len(record.checkpoints)} in checkpoints/{record.run_id}/",
        "published": record.result.model,
        "verdict": _verdict_text(record.result.verdict),
        "weights_sha256": record.result.weights_sha256,
    }
    if record.resumed_from_step is not None:
        facts["resumed"] = f"from step {record.resumed_from_step:,}"
    console().print(Panel(facts_table(facts), title=f"run {record.run_id}", title_align="left", expand=False))
