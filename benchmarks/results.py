"""Run every benchmark and write what they print to RESULTS.md: the quick forms in about 18 minutes, or the full ones.

python benchmarks/results.py [--full]
"""

import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from common import console, machine

_HERE = Path(__file__).parent
_RESULTS = _HERE / "RESULTS.md"
_SCRIPTS = (
    "time_to_accuracy",
    "throughput",
    "checkpoint_stall",
    "checkpoint_memory",
    "resume_time",
    "crash_time",
    "flow_overhead",
    "s3_throughput",
    "scale_runs",
    "snapshot",
    "loading",
    "gate_nights",
)


def main(
    full: Annotated[bool, typer.Option("--full", help="The full forms, which take hours.")] = False,
    only: Annotated[list[str] | None, typer.Option(help="Run only this one; the others' results stay.")] = None,
) -> None:
    """Run the benchmarks one after the other, and write RESULTS.md."""
    sections = _written()
    for name in only or _SCRIPTS:
        console.rule(name)
        command = [sys.executable, str(_HERE / f"{name}.py"), *([] if full else ["--quick"])]
        started = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        console.print(done.stdout, markup=False, soft_wrap=True)
        when = (
            f"{datetime.now(UTC):%Y-%m-%d}, the {'full' if full else 'quick'} form, {time.monotonic() - started:.0f} s"
        )
        sections[f"{name}.py"] = f"{when}\n\n```\n{_tables(done.stdout)}\n```\n"
        _write(sections)


def _tables(printed: str) -> str:
    """What a benchmark has printed, without trailing spaces."""
    return "\n".join(line.rstrip() for line in printed.splitlines()).strip()


def _written() -> dict[str, str]:
    """The sections RESULTS.md has, by their titles."""
    text = _RESULTS.read_text() if _RESULTS.exists() else ""
    parts = [part.partition("\n") for part in text.split("\n## ")[1:]]
    return {title: body.strip() + "\n" for title, _, body in parts}


def _write(sections: dict[str, str]) -> None:
    """Sections that belong to no script were written by hand, and come last."""
    scripts = [f"{name}.py" for name in _SCRIPTS]
    titles = sorted(sections, key=lambda title: scripts.index(title) if title in scripts else len(scripts))
    facts = ", ".join(f"{name} {value}" for name, value in machine().items() if name != "load_before")
    _RESULTS.write_text(
        f"# Results\n\nWritten by `make bench`. What each figure means is in the script's first lines.\n\n"
        f"Machine, where a section names no other: {facts}.\n\n"
        + "\n".join(f"## {title}\n\n{sections[title]}" for title in titles)
    )


if __name__ == "__main__":
    typer.run(main)
