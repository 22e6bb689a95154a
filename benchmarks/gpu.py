"""What a GPU does with nightshift: whether it keeps what is promised, and how fast it is.

This needs torch, numpy and what gpu.txt beside it names. It needs no network, Prefect or S3 server (docs/gpu.md).
Each part of tests/gpu is a process of its own, because a GPU that has failed is of no use to its process
any more. A part shows what it finds as it finds it. One that fails or takes too long does not stop the others, and one
that needs a GPU says so where there is none.

    PYTHONPATH=. python benchmarks/gpu.py [--minutes N] [--part NAME …] [--data FILE] [--json FILE]
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from threading import Timer
from typing import IO, Annotated, Any

import typer
from common import console, machine, show, write_json

from tests.gpu.stage import Figure, NoGpuError, Stage

# In the order of what one would want to know first, each with the seconds that it may take.
PARTS = {
    "card": ("preflight:card", 120),
    "preflight": ("preflight:preflight", 120),
    "snapshots": ("snapshots:under_fire", 150),
    "bits": ("bits:exact_resume", 420),
    "moves": ("bits:moves", 120),
    "numerics": ("bits:numerics", 120),
    "ranks": ("ranks:one_rank", 150),
    "classes": ("speed:classes", 60),
    "speedrun": ("speed:speedrun", 180),
    "step": ("speed:one_step", 90),
    "saving": ("speed:saving", 120),
    "tutorial": ("speed:tutorial", 120),
    "decoding": ("loading:decoding", 90),
    "nvjpeg": ("loading:nvjpeg", 60),
    "fed": ("loading:fed", 120),
}
_NO_GPU = "no GPU here"


@dataclass
class Found:
    """What is known of a part."""

    part: str
    state: str = ""
    """"holds", "no GPU here", or what went wrong."""
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return self.state in ("holds", _NO_GPU)


def main(
    minutes: Annotated[float, typer.Option(help="After these no further part begins, and none goes on.")] = 10,
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; none: all.")] = None,
    data: Annotated[Path | None, typer.Option(help="CIFAR-10, packed; none: images are made up.")] = None,
    json_file: Annotated[Path, typer.Option("--json", metavar="FILE", help="Where the figures go.")] = Path(
        ".nightshift/gpu.json"
    ),
    child: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """What a GPU does with nightshift: whether it keeps what is promised, and how fast it is."""
    names = part or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise typer.BadParameter(f"there is no part {unknown[0]!r}. The parts are: {', '.join(PARTS)}")
    if data and not data.is_file():
        raise typer.BadParameter(f"{data} is no file. Leave --data out, or make one: docs/gpu.md")
    if child:
        _be_child(names[0], Stage(child, data))
        return
    end = time.monotonic() + 60 * minutes
    found = [_run(name, data, end) for name in names]
    facts = machine()
    json_file.parent.mkdir(parents=True, exist_ok=True)
    write_json(json_file, {"benchmark": "gpu", "machine": facts, "parts": [_as_json(one) for one in found]})
    rows = [row for one in found for row in _rows(one)]
    show("On this machine's GPU", facts, ["part", "", "figure", "value"], rows)
    console.print(f"written to {json_file}")
    if bad := [one.part for one in found if not one.is_good]:
        console.print(f"[red]does not hold:[/] {', '.join(bad)}")
        raise typer.Exit(1)


def _run(name: str, data: Path | None, end: float) -> Found:
    """One part, in a process of its own, which with all its children is gone afterwards."""
    limit = min(PARTS[name][1], end - time.monotonic())
    found = Found(name)
    console.print(f"[bold]{name}[/]")
    if limit < 5:
        found.state = "no time was left"
        return found
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="nightshift-gpu-") as home, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, __file__, "--part", name, "--child", home, *(["--data", str(data)] if data else [])]
        with _process(command, errors, limit) as process:
            assert process.stdout
            for line in process.stdout:
                _take(line, found)
        if not found.state:
            late = time.monotonic() - started >= limit
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
            found.state = f"took longer than {limit:.0f} s" if late else f"ended with {process.returncode}: {last}"
    if found.is_good and not all(figure.holds for figure in found.figures):
        found.state = "does not hold"
    found.seconds = round(time.monotonic() - started, 1)
    console.print(f"  [{'dim' if found.is_good else 'red'}]{found.state}, {found.seconds} s[/]", markup=True)
    return found


@contextmanager
def _process(command: Sequence[str], errors: IO[str], seconds: float) -> "Iterator[subprocess.Popen[str]]":
    environment = {**os.environ, "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    )

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = Timer(seconds, kill)
    timer.start()
    try:
        with process:
            yield process
    finally:
        timer.cancel()
        kill()


def _take(line: str, found: Found) -> None:
    """Show and keep what a part has written; a library may have written something else."""
    try:
        said = json.loads(line)
        if "state" in said:
            found.state = said["state"]
            return
        figure = Figure(**said)
    except (TypeError, ValueError):
        return
    found.figures.append(figure)
    mark = "" if figure.holds else "does not hold: "
    console.print(f"  {mark}{figure.name}: {_value(figure)}", markup=False)


def _be_child(name: str, stage: Stage) -> None:
    module, _, function = PARTS[name][0].partition(":")
    part: Callable[[Stage], Iterator[Figure]] = getattr(import_module(f"tests.gpu.{module}"), function)
    state = "holds"
    try:
        for figure in part(stage):
            print(json.dumps(figure._asdict()), flush=True)
    except NoGpuError as error:
        state = str(error)
    except Exception as error:
        state = f"{type(error).__name__}: {error}"
    print(json.dumps({"state": state}), flush=True)


def _value(figure: Figure) -> str:
    return f"{figure.value:,.4g}" if isinstance(figure.value, float) else str(figure.value)


def _rows(found: Found) -> list[list[str]]:
    lines = [[figure.name, _value(figure)[:80]] for figure in found.figures] or [["", ""]]
    return [
        [found.part if not number else "", found.state.partition("\n")[0][:40] if not number else "", *line]
        for number, line in enumerate(lines)
    ]


def _as_json(found: Found) -> dict[str, Any]:
    return {**asdict(found), "figures": [figure._asdict() for figure in found.figures]}


if __name__ == "__main__":
    typer.run(main)
