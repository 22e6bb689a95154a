"""The commands for a team's own images: `init`, and `data` with `check`, `snapshot`, `list` and `diff`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nightshift.cli.common import AsJson, app, configured_workspace, console, error_console, print_json
from nightshift.errors import ConfigError

if TYPE_CHECKING:
    from nightshift.config.project import DatasetConfig
    from nightshift.refs import Finding
    from nightshift.workspace import Workspace

data = typer.Typer(no_args_is_help=True, help="Look at your images, and at what they were on other nights.")
app.add_typer(data, name="data", rich_help_panel="Images")

NameOrPlace = Annotated[str, typer.Argument(metavar="NAME|PLACE", help="A data set, or a folder, prefix or table.")]
_CLASSES_SHOWN = 20
Digest = Annotated[str | None, typer.Argument(help="A snapshot, by the beginning of its digest.")]


@app.command(rich_help_panel="Images")
def init(
    place: Annotated[str, typer.Argument(metavar="PLACE", help="A folder, an s3:// prefix or a table of labels.")],
    as_json: AsJson = False,
) -> None:
    """Write a commented nightshift.toml for the images of a place."""
    from importlib.resources import files

    from nightshift.config.project import DatasetConfig
    from nightshift.data.names import check_places, check_source, short_name
    from nightshift.settings import Settings
    from nightshift.text import as_json as quoted

    check_places([place])
    path = Settings.load().project
    if path.exists():
        raise ConfigError(f"{path} is there already: add [datasets.NAME] to it, or move it away")
    name, config = short_name(place), DatasetConfig(source=place)
    check_source(config)
    # What stands in the file is relative to its folder, what was typed is relative to this one.
    is_as_typed = place.startswith("s3://") or path.absolute().parent == Path.cwd()
    written = place if is_as_typed else str(Path(place).expanduser().absolute())
    template = files("nightshift.config").joinpath("nightshift.toml").read_text(encoding="utf-8")
    path.write_text(template.replace("NAME", name).replace('"PLACE"', quoted(written)), encoding="utf-8")
    if as_json:
        print_json({"path": str(path), "dataset": name})
    else:
        console().print(f"{path} names the data set {name}. Next: nightshift data check {name}", soft_wrap=True)


@data.command()
def check(dataset: NameOrPlace, as_json: AsJson = False) -> None:
    """Read the images and say what is wrong with them. Nothing is stored; exit 1 if they would not be trained on."""
    name, config = _resolved(dataset)
    with _shown() as workspace:
        from nightshift.data.rows import iterate, kept
        from nightshift.data.rules import classes_of, conflicts_of, duplicates_of, torn_of
        from nightshift.data.snapshot import look_at
        from nightshift.records.snapshots import SPLITS

        look = look_at(workspace.store, name, config)
    used = kept(look.rows)
    splits = used["split"].to_pylist()
    ok = all(finding.ok for finding in look.findings)
    answer = {
        "ok": ok,
        "images": len(used),
        "classes": classes_of(look.rows),
        "splits": {split: splits.count(split) for split in SPLITS},
        "unreadable": [
            {"image": image, "reason": reason} for image, reason in iterate(look.rows, "id", "unreadable") if reason
        ],
        "duplicates": duplicates_of(look.rows),
        "conflicts": len(conflicts_of(look.rows)),
        "leaks": len(torn_of(look.rows)),
        "findings": [finding.model_dump() for finding in look.findings],
    }
    if as_json:
        print_json(answer)
    else:
        _print_check(answer, look.findings)
    if not ok:
        raise typer.Exit(1)


@data.command()
def snapshot(dataset: NameOrPlace, as_json: AsJson = False) -> None:
    """Make tonight's snapshot: read what is new, and note what came, went and changed."""
    name, config = _resolved(dataset)
    with _shown() as workspace:
        from nightshift.data.snapshot import make_snapshot

        made = make_snapshot(workspace.store, name, config)
    if as_json:
        print_json({**made.model_dump(mode="json"), "ok": made.ok})
    else:
        _print_findings(made.findings)
        console().print(f"{made.digest}  {made.images:,} images", soft_wrap=True)


@data.command("list")
def list_snapshots(dataset: NameOrPlace, as_json: AsJson = False) -> None:
    """List the snapshots of a data set, the newest last."""
    from nightshift.records.snapshots import read_history

    name = _name_of(dataset)
    with configured_workspace() as workspace:
        entries = read_history(workspace.store, name).entries
    if as_json:
        print_json({"snapshots": [entry.model_dump(mode="json") for entry in entries]})
        return
    if not entries:
        console().print(f"{name} has no snapshot yet: nightshift data snapshot {dataset}", soft_wrap=True)
        return
    from rich.table import Table

    table = Table("snapshot", "made (UTC)", "images", "classes", "added", "removed", "relabelled", "left out", "rules")
    for entry in entries:
        counts = (entry.images, entry.classes, entry.added, entry.removed, entry.relabelled, entry.refused)
        rules = "stopped" if not entry.ok else "warned" if entry.findings else "kept"
        table.add_row(entry.digest[:12], f"{entry.at:%Y-%m-%d %H:%M}", *(f"{count:,}" for count in counts), rules)
    console().print(table)


@data.command()
def diff(dataset: NameOrPlace, before: Digest = None, after: Digest = None, as_json: AsJson = False) -> None:
    """Say what differs between two snapshots; by default the last two."""
    name = _name_of(dataset)
    with configured_workspace() as workspace:
        from nightshift.data.snapshot import difference
        from nightshift.data.stored import read_rows
        from nightshift.records.snapshots import read_history

        history = read_history(workspace.store, name)
        newest = [entry.digest for entry in history.entries[-2:]]
        if len(newest) < 2 and not (before and after):
            raise ConfigError(
                f"{name} has {len(newest)} snapshots, and two are compared: make one with nightshift data snapshot"
            )
        digests = [history.find(chosen or newest[at]).digest for at, chosen in enumerate((before, after))]
        (old, old_rows), (new, new_rows) = (read_rows(workspace.store, name, digest) for digest in digests)
        changes = dict(zip(("added", "removed", "relabelled"), difference(old_rows, new_rows), strict=True))
    classes = {
        "added": sorted(new.classes.keys() - old.classes.keys()),
        "removed": sorted(old.classes.keys() - new.classes.keys()),
    }
    if as_json:
        counts = {what: len(images) for what, images in changes.items()}
        print_json({"before": old.digest, "after": new.digest, **counts, "classes": classes, "images": changes})
        return
    screen = console()
    for what, images in changes.items():
        screen.print(f"{len(images):,} {what}")
        for image in images:
            screen.print(f"  {image}", soft_wrap=True)
    for what, names in classes.items():
        if names:
            screen.print(f"classes {what}: {', '.join(names)}", soft_wrap=True)


def _resolved(dataset: str) -> tuple[str, "DatasetConfig"]:
    from nightshift.config.project import load_project
    from nightshift.data.names import check_source, named_or_placed
    from nightshift.settings import Settings

    name, config = named_or_placed(load_project(Settings.load().project), dataset)
    check_source(config)
    return name, config


def _name_of(dataset: str) -> str:
    """The name of a data set. It may be only in the store, as is one whose images were trained on from a place."""
    from nightshift.config.project import load_project
    from nightshift.data.names import is_place, name_of_place
    from nightshift.ids import parse_dataset_name
    from nightshift.settings import Settings

    is_named = dataset in load_project(Settings.load().project).datasets
    return parse_dataset_name(dataset) if is_named or not is_place(dataset) else name_of_place(dataset)


@contextmanager
def _shown() -> Iterator["Workspace"]:
    """The workspace, while what happens is shown."""
    from nightshift import progress
    from nightshift.cli.terminal import TerminalProgress

    with (
        TerminalProgress(error_console()) as display,
        progress.shown_by(display),
        configured_workspace() as workspace,
    ):
        yield workspace


def _print_check(answer: dict[str, Any], findings: "list[Finding]") -> None:
    from nightshift.cli.screen import styled
    from nightshift.cli.terminal import facts_table

    screen, classes = console(), answer["classes"]
    shown = [f"{name} {count:,}" for name, count in list(classes.items())[:_CLASSES_SHOWN]]
    rest = f", and {len(classes) - _CLASSES_SHOWN:,} more" if len(classes) > _CLASSES_SHOWN else ""
    screen.print(
        facts_table(
            {
                "images": f"{answer['images']:,}",
                "splits": ", ".join(f"{name} {count:,}" for name, count in answer["splits"].items()),
                "classes": f"{len(classes):,}: {', '.join(shown)}{rest}",
                "copies": f"{answer['duplicates']:,}",
                "under several labels": f"{answer['conflicts']:,}",
                "in two splits": f"{answer['leaks']:,}",
                "unreadable": f"{len(answer['unreadable']):,}",
            }
        )
    )
    for image in answer["unreadable"]:
        screen.print(f"  {image['image']}: {image['reason']}", soft_wrap=True)
    _print_findings(findings)
    if answer["ok"]:
        screen.print(styled("ok", "green"), "to be trained on")
    else:
        screen.print(styled("stop:", "red"), "these images would not be trained on", soft_wrap=True)


def _print_findings(findings: "list[Finding]") -> None:
    from nightshift.cli.screen import styled

    for finding in findings:
        word = styled("warn", "yellow") if finding.ok else styled("stop", "red")
        console().print(word, f"{finding.rule}: {finding.detail}", soft_wrap=True)
