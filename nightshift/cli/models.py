"""The commands for networks and what was trained with them: `models`, `export`, `republish`, `predict`, `report`."""

import io
import json
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

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


@app.command(rich_help_panel="Models")
def models(as_json: AsJson = False) -> None:
    """List every network that a config can name here, and the sizes of images it takes."""
    from importlib.util import find_spec

    from models.names import MODELS, TORCHVISION, shown_sizes, sizes_of
    from nightshift.plugins import is_own, own_networks

    names = [
        *((name, "nightshift") for name in MODELS),
        *((f"torchvision:{name}", "torchvision") for name in TORCHVISION),
    ]
    names += [(name, "plugins") for name in own_networks()]
    if find_spec("timm"):
        from models import from_timm

        names += [(f"timm:{name}", "timm") for name in from_timm.names()]
    rows = [(name, source, None if is_own(name) else sizes_of(name)) for name, source in names]
    if as_json:
        listed = [
            {"name": name, "source": source, "sizes": sizes and {"from": sizes[0], "to": sizes[-1], "step": sizes.step}}
            for name, source, sizes in rows
        ]
        print_json({"models": listed})
        return
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), header_style="bold")
    for column in ("model", "from", "sides of images"):
        table.add_column(column)
    for name, source, sizes in rows:
        table.add_row(name, source, shown_sizes(sizes) if sizes else "found out when it is made")
    console().print(table)


@app.command(rich_help_panel="Models")
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where to write it.")],
    kind: Annotated[str, typer.Option("--format", help="state_dict, safetensors, pt2 or onnx.")] = "state_dict",
    as_json: AsJson = False,
) -> None:
    """Write a run's model to a file others can load, after checking that the file does what the model does."""
    import hashlib

    from nightshift.cli.terminal import size_text
    from nightshift.publishing.publish import export_run
    from nightshift.records.run import read_record

    with configured_workspace() as workspace:
        body = export_run(workspace, read_record(workspace.store, run)[0], kind)
    out.write_bytes(body)
    sha256 = hashlib.sha256(body).hexdigest()
    if as_json:
        print_json({"path": str(out), "bytes": len(body), "sha256": sha256, "format": kind})
    else:
        console().print(f"{out}  {size_text(len(body))}  sha256 {sha256}", soft_wrap=True)


@app.command(rich_help_panel="Models")
def republish(run: RunArgument, as_json: AsJson = False) -> None:
    """Make what is damaged of a run's published version again, from its checkpoint and to the same sha256."""
    from nightshift.publishing.republish import republish as make_again
    from nightshift.records.run import read_record

    with configured_workspace() as workspace:
        made = make_again(workspace, read_record(workspace.store, run)[0])
    if as_json:
        print_json({"run_id": run, "made_again": made})
    else:
        console().print(f"made again: {', '.join(made) or 'nothing, as all of it is whole'}")


@app.command(rich_help_panel="Models")
def predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGES…", help="Files, folders or s3://BUCKET/PREFIX.")],
    model: Annotated[str, typer.Option("--model", help="The version (a run's id), or `champion`.")] = "champion",
    name: Name = "cifar10",
    out: Annotated[str | None, typer.Option("--out", help="A .csv or .jsonl file, or s3://BUCKET/KEY of one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict the classes of images: CSV on standard output, or a file."""
    from nightshift.cli.screen import styled
    from nightshift.data.names import check_places

    check_places(images)
    from nightshift.publishing import prediction

    if out is not None:
        prediction.output_format(out)  # raises for a mistake, before anything is done
    rows = io.StringIO()
    with configured_workspace() as workspace:
        store = workspace.store
        classifier = prediction.Classifier(store, name, model)
        found = classifier.predict(store, images)
        if out is not None:
            good, bad = prediction.write_to(store, out, found)
        else:
            good, bad = prediction.write(found, *((rows, "jsonl") if as_json else (sys.stdout, "csv")))
    if as_json:
        print_json(
            {
                "model": classifier.version,
                "predicted": good,
                "bad": [{"image": item.image, "reason": item.error} for item in bad],
                "out": out,
                "predictions": [json.loads(row) for row in rows.getvalue().splitlines()],
            }
        )
    screen = error_console()
    for item in bad:
        screen.print(styled("!", "yellow"), f"{item.image}: {item.error}", soft_wrap=True)
    summary = f"· {good} predicted by {classifier.version}, {len(bad)} not readable{f', in {out}' if out else ''}"
    screen.print(summary, soft_wrap=True)


@app.command(rich_help_panel="Models")
def report(
    run: RunArgument,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Where to write it.")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run's report, as it stands now, to one HTML file that needs no network."""
    from nightshift.judging.report import build_report
    from nightshift.records.run import read_record
    from nightshift.settings import Settings

    settings = Settings.load()
    with configured_workspace() as workspace:
        record, _ = read_record(workspace.store, run)
        page = build_report(
            workspace, record, record.result.verdict if record.result else None, settings.price_per_hour
        )
    path = (out or settings.home / "reports" / f"{run}.html").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page.html, encoding="utf-8")
    if as_json:
        print_json({"run_id": run, "path": str(path), "bytes": path.stat().st_size})
    else:
        console().print(path, soft_wrap=True)
    if open_it and not webbrowser.open(path.as_uri()):
        error_console().print("There is no browser here: open the file by hand.")
