"""The commands for which version is live: `champion`, `promote`, `rollback`, `pin`, `unpin`."""

from typing import TYPE_CHECKING, Annotated

import typer

from nightshift.cli.common import (
    AsJson,
    Name,
    RunArgument,
    app,
    configured_workspace,
    console,
    error_console,
    print_json,
)

if TYPE_CHECKING:
    from nightshift.storage.store import Store
    from nightshift.workspace import Workspace

Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why; it is kept with your name and the time.")]
_PANEL = "Which version is live"
_SHOWN = 30


@app.command(rich_help_panel=_PANEL)
def champion(
    name: Name = "cifar10",
    rebuild_it: Annotated[
        bool, typer.Option("--rebuild", help="Make a missing or damaged history again, from its copy and the records.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Show so many changes at most.")] = _SHOWN,
    as_json: AsJson = False,
) -> None:
    """Show which version is live, how it came to be, and whether it is pinned."""
    from nightshift.records.rebuild import rebuild

    with configured_workspace() as workspace:
        if rebuild_it:
            rebuild(workspace.store, name)
        _show(workspace.store, name, as_json, limit)


@app.command(rich_help_panel=_PANEL)
def promote(run: RunArgument, name: Name = "cifar10", reason: Reason = "", as_json: AsJson = False) -> None:
    """Make a run's published version the champion, whatever the gate said."""
    from nightshift.records import champions

    with configured_workspace() as workspace:
        champions.promote_by_hand(workspace.store, name, run, reason)
        _tell_servers(workspace, name)
        _show(workspace.store, name, as_json)


@app.command(rich_help_panel=_PANEL)
def rollback(
    version: Annotated[
        str | None, typer.Argument(metavar="[VERSION]", help="An earlier champion; by default the one before.")
    ] = None,
    name: Name = "cifar10",
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Make an earlier champion the champion again. The history is kept."""
    from nightshift.records import champions

    with configured_workspace() as workspace:
        champions.roll_back(workspace.store, name, version, reason)
        _tell_servers(workspace, name)
        _show(workspace.store, name, as_json)


@app.command(rich_help_panel=_PANEL)
def pin(name: Name = "cifar10", reason: Reason = "", as_json: AsJson = False) -> None:
    """Keep the champion: until `unpin`, no run goes live by itself."""
    from nightshift.records import champions

    with configured_workspace() as workspace:
        champions.pin(workspace.store, name, reason)
        _show(workspace.store, name, as_json)


@app.command(rich_help_panel=_PANEL)
def unpin(name: Name = "cifar10", reason: Reason = "", as_json: AsJson = False) -> None:
    """Let the gate decide again which run goes live."""
    from nightshift.records import champions

    with configured_workspace() as workspace:
        champions.unpin(workspace.store, name, reason)
        _show(workspace.store, name, as_json)


def _tell_servers(workspace: "Workspace", name: str) -> None:
    """Let Triton serve what is live now, and MLflow's alias name it."""
    from nightshift.records import serving

    serving.serve(workspace.store, name, anew=True)
    _tell_mlflow(workspace, name)


def _tell_mlflow(workspace: "Workspace", name: str) -> None:
    if not workspace.mlflow.tracking_uri:
        return
    from nightshift import progress
    from nightshift.cli.terminal import TerminalProgress
    from nightshift.tracking import beside

    with TerminalProgress(error_console()) as display, progress.shown_by(display), display.waiting("telling MLflow"):
        beside.send_champion(workspace.store, workspace.mlflow, name)


def _show(store: "Store", name: str, as_json: bool, limit: int = _SHOWN) -> None:
    from nightshift.records.champions import champion_of
    from nightshift.records.history import read_history

    history = read_history(store, name)
    champion = champion_of(store, history)
    if as_json:
        print_json(
            {
                **champion.model_dump(),
                "pinned": history.pin and history.pin.model_dump(mode="json"),
                "history": [entry.model_dump(mode="json") for entry in history.transitions],
                "pins": [entry.model_dump(mode="json") for entry in history.pins],
            }
        )
        return
    from nightshift.cli.screen import styled
    from nightshift.cli.terminal import facts_table, percent, pins_table, transitions_table

    pin, screen = history.pin, console()
    screen.print(
        facts_table(
            {
                "champion": styled(champion.version, "bold"),
                "model": champion.name,
                "test accuracy": percent(champion.test_accuracy),
                "before it": champion.previous or "–",
                "pinned": f"since {pin.at:%Y-%m-%d %H:%M:%S} UTC by {pin.who}: {pin.reason}" if pin else "no",
            }
        )
    )
    screen.print()
    screen.print(styled("history", "bold"))
    screen.print(transitions_table(history.transitions[-limit:]))
    if len(history.transitions) > limit:
        screen.print(styled(f"the newest {limit} of {len(history.transitions)}; for more: --limit N", "dim"))
    if history.pins:
        screen.print()
        screen.print(styled("pins", "bold"))
        screen.print(pins_table(history.pins[-limit:]))
