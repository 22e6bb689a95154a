"""The command line. Everything heavy is imported by the command that needs it, so that `--help` is quick."""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nightshift.errors import DISK_IS_FULL, ConfigError, DiskError, Interrupted, NightshiftError

if TYPE_CHECKING:
    from rich.console import Console

    from nightshift.records import RunRecord
    from nightshift.settings import TrainConfig
    from nightshift.workspace import Workspace

app = typer.Typer(
    help="Retrain image classifiers every night, and survive the night.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Prefect's log and all warnings.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.")]


def main() -> None:
    """Run the command line; every error becomes a sentence and an exit code."""
    try:
        sys.exit(app(standalone_mode=False))
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, typer.Abort):
            sys.exit(1)
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own usage errors
            error.show()
            sys.exit(error.exit_code)
        _end_with(error)


def _end_with(error: BaseException) -> NoReturn:
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("stopped at once; what was last committed stands")
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_IS_FULL):
        where = f" ({error.filename})" if error.filename else ""
        error = DiskError(f"{error.strerror}{where}: make room or mend it, or set NIGHTSHIFT_HOME to another place")
    if not isinstance(error, NightshiftError):
        raise error
    if "--json" in sys.argv:
        print(json.dumps({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}))
    _tell(error)
    sys.exit(error.exit_code)


def _tell(error: NightshiftError) -> None:
    from rich.markup import escape

    colour, word = ("yellow", "Interrupted") if isinstance(error, Interrupted) else ("red", "Error")
    console = _errors()
    console.print(f"[{colour}]{word}:[/] {escape(str(error))}", highlight=False, soft_wrap=not console.is_terminal)


@app.command()
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
    from nightshift.recipes import make_config
    from nightshift.refs import new_run_id, parse_run_id

    overrides = _parse_settings(settings or [])
    config = make_config(recipe, overrides)
    run_id = parse_run_id(run_id) if run_id is not None else new_run_id(recipe, datetime.now(UTC))
    _train(run_id, config, as_json, verbose)


@app.command()
def resume(run: RunArgument, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Go on with a stored run, with the config it was started with."""
    from nightshift.records import read_record

    with _workspace() as workspace:
        config = read_record(workspace.store, run)[0].train_config()
        _train(run, config, as_json, verbose)


@app.command()
def recover(
    within_hours: Annotated[
        float, typer.Option("--within-hours", min=0, help="Look at runs that were written to so lately.")
    ] = 24,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Start interrupted runs again: on the Prefect server if they came from there, else in this process."""
    from datetime import timedelta

    from nightshift import recovery
    from nightshift.local_prefect import configured_api_url
    from nightshift.settings import Settings

    settings, has_server, started, failed = Settings.load(), configured_api_url(), [], False
    with _workspace() as workspace, ExitStack() as stack:
        found = recovery.find(workspace.store, timedelta(hours=within_hours))
        if has_server:
            from flows.recover import start_deployed

            started += start_deployed(workspace.store, found, settings.max_recoveries)
        here = [run for run in found.interrupted if not (has_server and run.record.origin.deployment)]
        run_flow = None
        for record in recovery.claims(workspace.store, here, settings.max_recoveries):
            run_flow = run_flow or stack.enter_context(_flow_runner(verbose))
            started.append(record.run_id)
            try:
                run_flow(record.run_id, record.train_config())
            except Interrupted:
                raise
            except NightshiftError as error:
                failed = True
                _tell(error)
    if as_json:
        _print_json({"started": started, "live": found.live})
    else:
        _out().print(f"started: {', '.join(started) or 'none'}", highlight=False)
        _out().print(f"live: {', '.join(found.live) or 'none'}", highlight=False)
    if failed:
        raise typer.Exit(1)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    older_than_hours: Annotated[
        float, typer.Option("--older-than-hours", min=0, help="Leave what is younger; it may be about to be used.")
    ] = 24,
    as_json: AsJson = False,
) -> None:
    """Delete what interrupted runs left behind: payloads no record names, unfinished uploads."""
    from datetime import timedelta

    from nightshift import orphans

    with _workspace() as workspace:
        found = orphans.find(workspace.store, timedelta(hours=older_than_hours))
        if not dry_run:
            orphans.collect(workspace.store, found)
    if as_json:
        _print_json(
            {
                "deleted": len(found.objects),
                "bytes": found.bytes,
                "multipart_aborted": len(found.uploads),
                "dry_run": dry_run,
                "keys": found.keys,
            }
        )
        return
    from nightshift.terminal import size_text

    for key in found.keys:
        _out().print(f"  {key}", highlight=False)
    _out().print(
        f"{'would delete' if dry_run else 'deleted'} {len(found.objects)} objects ({size_text(found.bytes)}), "
        f"{'would abort' if dry_run else 'aborted'} {len(found.uploads)} unfinished uploads",
        highlight=False,
    )


@app.command()
def runs(
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(min=1, help="Show so many at most.")] = 50,
) -> None:
    """List the stored runs, newest first."""
    from nightshift.records import list_records

    with _workspace() as workspace:
        records = list_records(workspace.store, limit)
    if as_json:
        _print_json({"runs": [_run_line(record) for record in records]})
        return
    from nightshift.terminal import runs_table

    _out().print(runs_table(records) if records else "No runs yet: `nightshift train` starts one.")


@app.command()
def show(run: RunArgument, as_json: AsJson = False) -> None:
    """Show a run: its record, its checkpoints, its curve."""
    from nightshift.records import read_record

    with _workspace() as workspace:
        record, _ = read_record(workspace.store, run)
    if as_json:
        _print_json({**record.model_dump(mode="json"), **record.summary()})
        return
    from nightshift.terminal import checkpoints_table, curve_table, facts_table, percent, status_text

    out = _out()
    out.print(
        facts_table(
            {
                "run": f"[bold]{record.run_id}[/]",
                "status": status_text(record.status),
                "step": f"{record.step:,} of {record.total_steps:,}",
                "owner": f"{record.lease.owner}, lease until {record.lease.expires_at:%Y-%m-%d %H:%M:%S} UTC",
                "test accuracy": percent(record.test_accuracy),
                "training": f"{record.train_seconds:,.1f} s",
                "config": "  ".join(f"{name}={value}" for name, value in record.config.items() if value is not None),
                "data set": f"{record.dataset.name} {record.dataset.digest[:12]}",
                "environment": "  ".join(f"{name}={value}" for name, value in record.environment.items()),
                "weights_sha256": (record.result and record.result.weights_sha256) or "–",
                "published": (record.result and record.result.model) or "–",
            }
        )
    )
    for title, table in (("checkpoints", checkpoints_table(record)), ("curve", curve_table(record))):
        if table.row_count:
            out.print(f"\n[bold]{title}[/]")
            out.print(table)
    out.print("\n[bold]events[/]")
    for event in record.events:
        out.print(
            f"  {event.at:%Y-%m-%d %H:%M:%S} UTC  {event.what:<11} step {event.step:,}  {event.detail}",
            highlight=False,
            markup=False,
        )


@app.command()
def verify(run: RunArgument, as_json: AsJson = False) -> None:
    """Read every checkpoint of a run back and check it."""
    from nightshift import checkpoints
    from nightshift.records import read_record

    out, checked, bad = _out(), 0, []
    with _workspace() as workspace:
        record, _ = read_record(workspace.store, run)
        for checkpoint, problem in checkpoints.verify(workspace.store, record):
            checked += 1
            if problem:
                bad.append({"key": problem.key, "reason": problem.reason})
            if not as_json:
                verdict = f"[red]bad[/]: {problem.reason}" if problem else "[green]good[/]"
                out.print(f"  {checkpoint.key}  {verdict}", highlight=False)
    if as_json:
        _print_json({"ok": not bad, "checked": checked, "bad": bad})
    else:
        out.print(f"{checked} checked, {len(bad)} bad", highlight=False)
    if bad:
        raise typer.Exit(1)


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes and what each is for."""
    from nightshift.recipes import get_recipe, recipe_names

    rows = [
        {"name": name, "model": recipe.config.model, "epochs": recipe.config.epochs, "detail": recipe.detail}
        for name, recipe in ((name, get_recipe(name)) for name in recipe_names())
    ]
    if as_json:
        _print_json({"recipes": rows})
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    for name in ("recipe", "model", "epochs", "what it is for"):
        table.add_column(name, justify="right" if name == "epochs" else "left")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    _out().print(table)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check storage, Prefect, GPU, disk and clock."""
    from nightshift.doctor import examine
    from nightshift.settings import Settings

    checks = examine(Settings.load())
    ok = all(check.ok for check in checks)
    if as_json:
        _print_json({"ok": ok, "checks": [vars(check) for check in checks]})
    else:
        for check in checks:
            mark = "[green]✓[/]" if check.ok else "[red]✗[/]"
            _out().print(f"{mark} {check.name:<20} {check.detail}", highlight=False, soft_wrap=True)
    if not ok:
        raise typer.Exit(1)


def _train(run_id: str, config: "TrainConfig", as_json: bool, verbose: bool) -> None:
    with _flow_runner(verbose) as run_flow:
        record = run_flow(run_id, config)
    if as_json:
        _print_json(record.summary())
    else:
        _print_summary(record)


@contextmanager
def _flow_runner(verbose: bool) -> Iterator[Callable[[str, "TrainConfig"], "RunRecord"]]:
    """Runs the flow in this process, on the user's Prefect server or on one of our own, with a live display."""
    from nightshift import progress
    from nightshift.local_prefect import configured_api_url, local_prefect
    from nightshift.settings import Settings
    from nightshift.terminal import TerminalProgress

    settings = Settings.load()
    _quieten(verbose)
    # Prefect sends a SIGTERM on to the handler it found: by default that would end us before we can say how we ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with ExitStack() as stack:
        display = stack.enter_context(TerminalProgress(_errors()))
        stack.enter_context(progress.shown_by(display))
        wait_for_server = None
        if not configured_api_url():
            os.environ["PREFECT_API_URL"], wait_for_server = stack.enter_context(local_prefect(settings.home))

        def run_flow(run_id: str, config: "TrainConfig") -> "RunRecord":
            with display.waiting("starting"):
                # Importing torch and Prefect takes as long as the server's start, which goes on meanwhile.
                from nightshift.training import check_config

                check_config(config)
                from flows.train_cifar import TerminationSignal, train_cifar
                from nightshift.recipes import overrides_of

                if wait_for_server:
                    wait_for_server()
            display.say(f"run {run_id}, recipe {config.recipe}")
            try:
                train_cifar(recipe=config.recipe, overrides=overrides_of(config), run_id=run_id)
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
    from nightshift.records import read_record

    with _workspace() as workspace:
        return read_record(workspace.store, run_id)[0]


@contextmanager
def _workspace() -> Iterator["Workspace"]:
    from nightshift.settings import Settings
    from nightshift.workspace import open_workspace

    with open_workspace(Settings.load()) as workspace:
        yield workspace


def _parse_settings(settings: list[str]) -> dict[str, str]:
    pairs = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {setting!r} is not FIELD=VALUE, such as --set epochs=3")
        pairs[name.strip()] = value.strip()
    return pairs


def _run_line(record: "RunRecord") -> dict[str, Any]:
    return {
        "run_id": record.run_id,
        "status": record.status,
        "step": record.step,
        "test_accuracy": record.test_accuracy,
        "updated_at": record.updated_at.isoformat(),
        "owner": record.lease.owner,
    }


def _print_summary(record: "RunRecord") -> None:
    from rich.panel import Panel

    from nightshift.terminal import facts_table, percent, status_text

    assert record.result is not None
    facts = {
        "status": status_text(record.status),
        "test accuracy": f"[bold]{percent(record.result.test_accuracy)}[/]",
        "training": f"{record.train_seconds:,.1f} s, {record.step:,} steps, {record.config['epochs']} epochs",
        "data": f"{record.dataset.name} from the {record.dataset.source}",
        "checkpoints": f"{len(record.checkpoints)} in checkpoints/{record.run_id}/",
        "published": record.result.model,
        "weights_sha256": record.result.weights_sha256,
    }
    if record.resumed_from_step is not None:
        facts["resumed"] = f"from step {record.resumed_from_step:,}"
    _out().print(Panel(facts_table(facts), title=f"run {record.run_id}", title_align="left", expand=False))


def _out() -> "Console":
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _errors() -> "Console":
    from rich.console import Console

    return Console(stderr=True)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))
