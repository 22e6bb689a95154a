"""The commands for what there is: `runs`, `nights`, `show`, `verify`, `gc`, `delete`, `recipes`, `doctor`."""

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nightshift import progress
from nightshift.cli.common import (
    LONGEST_HOURS,
    AsJson,
    RunArgument,
    app,
    configured_workspace,
    console,
    error_console,
    print_json,
)
from nightshift.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from nightshift.records.index import Overview
    from nightshift.storage.store import Store

_NO_NIGHTS = "No nights yet: `nightshift train` starts one."


@app.command(rich_help_panel="Look at what is stored")
def runs(
    as_json: AsJson = False,
    limit: Annotated[int, typer.Option(min=1, help="Show so many at most.")] = 50,
) -> None:
    """List the stored runs, newest first."""
    from nightshift.records.index import overviews

    with configured_workspace() as workspace:
        found = overviews(workspace.store, limit)
    if as_json:
        print_json({"runs": [_run_line(run) for run in found]})
        return
    from nightshift.cli.screen import styled
    from nightshift.cli.terminal import runs_table

    console().print(runs_table(found) if found else "No runs yet: `nightshift train` starts one.")
    if len(found) == limit:
        console().print(styled(f"the newest {limit}; for more: nightshift runs --limit {10 * limit}", "dim"))


@app.command(rich_help_panel="Look at what is stored")
def nights(
    name: Annotated[str | None, typer.Option("--name", help="Only those of this data set.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Show so many at most.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Show the last nights: verdict, test accuracy with its 95 % interval, time and cost; and images that were refused.

    Trials are left out.
    """
    from nightshift.judging.nights import last_nights, refused_nights
    from nightshift.settings import Settings

    price = Settings.load().price_per_hour
    with configured_workspace() as workspace:
        found = last_nights(workspace.store, name, limit, price)
        refused = refused_nights(workspace.store, name, found, limit)
    if as_json:
        print_json(
            {
                "nights": [night.model_dump(mode="json") for night in found],
                "refused": [images.model_dump(mode="json") for images in refused],
            }
        )
        return
    from nightshift.cli.terminal import nights_table

    none = f"No nights of {name}: without --name, those of all data sets are shown." if name else _NO_NIGHTS
    console().print(nights_table(found, refused) if found or refused else none)


@app.command(rich_help_panel="Look at what is stored")
def show(run: RunArgument, as_json: AsJson = False) -> None:
    """Show a run: its record, its checkpoints, its curve."""
    from dataclasses import asdict

    from nightshift.judging.drift import read_drift
    from nightshift.judging.goodput import account
    from nightshift.records.lease import status_of
    from nightshift.records.run import read_record
    from nightshift.tracking.metrics import read_lines

    with configured_workspace() as workspace:
        record, _ = read_record(workspace.store, run)
        status = status_of(record, workspace.store.now())
        spent = account(record, read_lines(workspace.store, run))
        drift = read_drift(workspace.store, run) if as_json else None
    if as_json:
        print_json(
            {
                **record.model_dump(mode="json"),
                **record.summary(),
                "status": status,
                "config": record.train_config().model_dump(mode="json"),
                "goodput": asdict(spent) if spent else None,
                "drift": drift.model_dump(mode="json", exclude={"sha256"}) if drift else None,
            }
        )
        return
    from nightshift.cli.screen import styled
    from nightshift.cli.terminal import checkpoints_table, curve_table, facts_table, percent, status_text

    screen = console()
    screen.print(
        facts_table(
            {
                "run": styled(record.run_id, "bold"),
                "status": status_text(status),
                "step": f"{record.step:,} of {record.total_steps:,}",
                **({"clock": record.clock} if record.clock else {}),
                "owner": f"{record.lease.owner}, lease until {record.lease.expires_at:%Y-%m-%d %H:%M:%S} UTC",
                "test accuracy": percent(record.test_accuracy),
                "training": f"{record.train_seconds:,.1f} s",
                "goodput": f"{spent.goodput:.1%} of {spent.wall / 60:,.1f} minutes" if spent else "–",
                "config": "  ".join(
                    f"{name}={value}" for name, value in record.train_config().flat().items() if value is not None
                ),
                "data set": f"{record.dataset.name} {record.dataset.digest[:12]}",
                "begun with": str(record.parent or "random weights"),
                "environment": "  ".join(f"{name}={value}" for name, value in record.environment.items()),
                "weights_sha256": (record.result and record.result.weights_sha256) or "–",
                "published": (record.result and record.result.model) or "–",
            }
        )
    )
    for title, table in (("checkpoints", checkpoints_table(record)), ("curve", curve_table(record))):
        if table.row_count:
            screen.print()
            screen.print(styled(title, "bold"))
            screen.print(table)
    screen.print()
    screen.print(styled("events", "bold"))
    for event in record.events:
        screen.print(f"  {event.at:%Y-%m-%d %H:%M:%S} UTC  {event.what:<11} step {event.step:,}  {event.detail}")


@app.command(rich_help_panel="Look at what is stored")
def verify(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="The run's id; with --published, all by default.")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Read published versions back instead of checkpoints.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read every checkpoint of a run back and check it, or what is published."""
    from nightshift.ids import parse_run_id

    if run is None and not published:
        raise ConfigError("name the run whose checkpoints are to be verified, or type --published for all versions")
    if run is not None:
        parse_run_id(run)
    from nightshift.cli.screen import joined, styled

    screen, checked, bad = console(), 0, []
    with configured_workspace() as workspace:
        for key, problem in _verified(workspace.store, run, published):
            checked += 1
            if problem:
                bad.append({"key": key, "reason": problem})
            if not as_json:
                verdict = joined(styled("bad", "red"), f": {problem}") if problem else styled("good", "green")
                screen.print(joined(f"  {key}  ", verdict))
    if as_json:
        print_json({"ok": not bad, "checked": checked, "bad": bad})
    else:
        advice = "a resume goes on from the newest good one"
        if published:
            advice = "nightshift republish RUN makes files again from the run's checkpoint"
        elif len(bad) == checked:
            advice = "a resume begins anew; of a finished run, what is published is all there is"
        screen.print(f"{checked} checked, {len(bad)} bad" + (f": {advice}" if bad else ""))
    if bad:
        raise typer.Exit(1)


def _verified(store: "Store", run: str | None, published: bool) -> "Iterator[tuple[str, str | None]]":
    """Each object that was read back, and what is wrong with it."""
    if run is None or published:
        from nightshift.publishing.verify import verify_published

        for checked in verify_published(store, run):
            yield checked.key, checked.problem
        return
    from nightshift.checkpoints.verify import verify_checkpoints
    from nightshift.data.names import check_fits, check_names
    from nightshift.records.run import read_record
    from nightshift.training.state import payload_check

    record, _ = read_record(store, run)
    config = record.train_config()
    check_names(config)
    check_fits(config, record.dataset.image_size)
    check = payload_check(config, record.dataset.classes, record.dataset.image_size)
    for checkpoint, problem in verify_checkpoints(store, record, check):
        yield checkpoint.key, problem.reason if problem else None


@app.command(rich_help_panel="Look at what is stored")
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be deleted.")] = False,
    older_than_hours: Annotated[
        float,
        typer.Option(
            "--older-than-hours", min=0, max=LONGEST_HOURS, help="Leave what is younger; it may be about to be used."
        ),
    ] = 24,
    as_json: AsJson = False,
) -> None:
    """Delete what interrupted runs left behind, and of finished nights what NIGHTSHIFT_KEEP__… keeps no longer."""
    from datetime import timedelta

    from nightshift.cli.terminal import TerminalProgress
    from nightshift.records import retention
    from nightshift.settings import Settings

    keep = Settings.load().keep
    screen = error_console()
    display = TerminalProgress(screen)
    doing = "looking for what nobody needs" + ("" if dry_run else ", and deleting it")
    with (
        progress.shown_by(display),
        configured_workspace(to_make_room=not dry_run) as workspace,
        display.waiting(doing) if screen.is_terminal else nullcontext(),
    ):
        try:
            spent, found = retention.tidy(workspace.store, keep, timedelta(hours=older_than_hours), dry_run)
        except KeyboardInterrupt:
            raise Interrupted("stopped at once; what was deleted stays so, and the next gc goes on") from None
    if as_json:
        print_json(
            {
                "deleted": len(found.objects),
                "bytes": found.bytes,
                "multipart_aborted": len(found.uploads),
                "dry_run": dry_run,
                "keys": found.keys,
                "runs": sorted(spent.runs),
                "snapshots": sorted("/".join(snapshot) for snapshot in spent.snapshots),
            }
        )
        return
    from nightshift.cli.terminal import size_text

    for run_id, objects in sorted(spent.runs.items()):
        console().print(f"  run {run_id}, {size_text(sum(item.size for item in objects))}")
    for name, digest in sorted(spent.snapshots):
        console().print(f"  snapshot {digest[:12]} of {name}")
    of_runs = {item.key for objects in spent.runs.values() for item in objects}
    for key in found.keys:
        if key not in of_runs:
            console().print(f"  {key}")
    console().print(
        f"{'would delete' if dry_run else 'deleted'} {len(found.objects)} objects ({size_text(found.bytes)}), "
        f"{'would abort' if dry_run else 'aborted'} {len(found.uploads)} unfinished uploads"
    )


@app.command(rich_help_panel="Look at what is stored")
def delete(
    run: RunArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a run with all that belongs to it; never a live one, and never one that is or was champion."""
    if not yes and (as_json or not sys.stdin.isatty()):
        raise ConfigError(
            f"what is deleted does not come back, and nobody can be asked here: nightshift delete {run} --yes"
        )
    from nightshift.cli.terminal import size_text
    from nightshift.records import deletion

    with configured_workspace() as workspace:
        if not yes:
            found = deletion.belongings(workspace.store, run)
            if not typer.confirm(f"Delete {len(found.keys)} objects ({size_text(found.bytes)}) of run {run}?"):
                console().print("nothing was deleted")
                raise typer.Exit(1)
        found = deletion.delete(workspace.store, run)
    if as_json:
        print_json({"run_id": run, "deleted": len(found.keys), "bytes": found.bytes, "keys": found.keys})
    else:
        console().print(f"deleted {len(found.keys)} objects ({size_text(found.bytes)}) of run {run}")


@app.command(rich_help_panel="Train")
def recipes(as_json: AsJson = False) -> None:
    """List the recipes, those of nightshift.toml too, and what each is for."""
    from nightshift.config.project import load_project
    from nightshift.config.recipes import get_recipe, recipe_names
    from nightshift.settings import Settings

    project = load_project(Settings.load().project)
    rows = [
        {
            "name": name,
            "model": recipe.config.model.name,
            "dataset": recipe.config.data.dataset,
            "epochs": recipe.config.schedule.epochs,
            "detail": recipe.detail,
        }
        for name, recipe in ((name, get_recipe(name, project)) for name in recipe_names(project))
    ]
    if as_json:
        print_json({"recipes": rows})
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    for name in ("recipe", "model", "data set", "epochs", "what it is for"):
        table.add_column(name, justify="right" if name == "epochs" else "left")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    console().print(table)


@app.command(rich_help_panel="Servers and machine")
def doctor(as_json: AsJson = False) -> None:
    """Check storage, Prefect, GPU, disk and clock."""
    from nightshift.cli.doctor import examine
    from nightshift.cli.screen import styled
    from nightshift.settings import Settings

    checks = examine(Settings.load())
    ok = all(check.ok for check in checks)
    if as_json:
        print_json({"ok": ok, "checks": [vars(check) for check in checks]})
    else:
        for check in checks:
            mark = styled("✓", "green") if check.ok else styled("✗", "red")
            first, *more = check.detail.split("\n")  # the end of a server's log has several lines
            console().print(mark, f"{check.name:<20} {first}", soft_wrap=True)
            for line in more:
                console().print(f"    {line}", soft_wrap=True)
    if not ok:
        raise typer.Exit(1)


def _run_line(run: "Overview") -> dict[str, Any]:
    fields = run.model_dump(include={"run_id", "status", "step", "test_accuracy", "owner"})
    return {**fields, "updated_at": run.updated_at.isoformat()}
