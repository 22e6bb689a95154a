"""What the benchmarks share: the machine's facts, statistics, a temporary home, and how results are shown."""

import fcntl
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from nightshift.settings import Settings

console = Console(width=None if Console().is_terminal else 140, highlight=False)

_progress = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Summary:
    """Some samples in a few numbers. With n below 100, p99 lies between the two largest."""

    n: int
    median: float
    p99: float
    min: float
    max: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        return cls(
            n=len(samples),
            median=float(np.median(samples)),
            p99=float(np.percentile(samples, 99)),
            min=min(samples),
            max=max(samples),
        )


def machine() -> dict[str, Any]:
    """What absolute figures depend on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


@contextmanager
def temporary_home() -> Iterator[Path]:
    """A NIGHTSHIFT_HOME that is deleted at the end, after the servers that were started in it have stopped."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as directory:
        home = Path(directory)
        try:
            yield home
        finally:
            for path in home.glob("*/supervisor.lock"):
                with open(path, "a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX)  # a supervisor holds it until its server has ended


def copy_data_cache(home: Path) -> None:
    """Give a new home the data sets that are already on this machine, so that they are not downloaded again."""
    known = Settings.load().home / "datasets"
    if known.exists():
        shutil.copytree(known, home / "datasets", dirs_exist_ok=True)


def installed(peers: Mapping[str, Sequence[str]]) -> list[str]:
    """The peers whose packages are installed. Prints what to do about the others."""
    names = []
    for name, packages in peers.items():
        absent = [package for package in packages if find_spec(package) is None]
        if absent:
            console.print(
                f"[yellow]![/] {name} is left out: {', '.join(absent)} not installed. In an environment of its own: "
                "uv pip install --group bench"
            )
        else:
            names.append(name)
    return names


def tell(what: str) -> None:
    """Say how far a benchmark is, on standard error: standard output has only the results."""
    _progress.print(f"[dim]· {what}[/]")


def show(title: str, facts: Mapping[str, Any], columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, with the circumstances below it."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)
    console.print("[dim]" + "  ".join(f"{name}={value}" for name, value in facts.items()) + "[/]", soft_wrap=True)


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write what was measured, if a file is asked for."""
    if path:
        path.write_text(json.dumps(result, indent=1, default=asdict) + "\n")
