"""How long a run on a worker stands still when its process is killed, on a machine that lives on.

In each round a run (recipe tutorial, CIFAR-10, a checkpoint every 10 steps) is submitted to the server and worker of
`nightshift up`, and killed by SIGKILL after a checkpoint. The time is measured from the kill until a checkpoint with a
new step is committed: the worker sees its child die, the flow run is scheduled again and taken up, a process starts,
imports torch and Prefect, takes the lease over, restores and trains ten steps.

With `--lost` the worker is killed first, so that nobody sees the process die, as if the machine were gone. Then another
worker has to find out: that of `nightshift up` that takes its place.

It is compared with `python -c "import torch, prefect"` in the same round. In the end each run has to be finished, and
the fencing token of its lease has to be 2: nobody else has held it meanwhile.

2 cores, n = 20: 16 minutes.

    python benchmarks/crash_time.py [--lost] [--rounds N] [--quick] [--json FILE]
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from common import Summary, machine, show, tell, temporary_home, write_json
from resume_time import environment, import_seconds

from nightshift.errors import RunNotFoundError
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import RunRecord, read_record
from nightshift.storage.s3 import S3

_SECONDS = 600
_CONFIG = ("epochs=1", "max_train_images=8000", "checkpoint_every_steps=10")


def nightshift(home: Path, *arguments: str) -> None:
    program = Path(sys.executable).with_name("nightshift")
    subprocess.run([program, *arguments], env=environment(home), cwd=home, stdout=subprocess.DEVNULL, check=True)


def wait_for(store: S3, run_id: str, is_so: Callable[[RunRecord], bool]) -> RunRecord:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        with suppress(RunNotFoundError):
            record, _ = read_record(store, run_id)
            if is_so(record):
                return record
        time.sleep(0.05)
    raise RuntimeError(f"run {run_id} is not where it should be after {_SECONDS} s")


def kill(home: Path, store: S3, run_id: str, lost: bool) -> float:
    """Kill whoever trains a run. Returns the seconds until it has a checkpoint of a new step."""
    before = wait_for(store, run_id, lambda record: record.status == "running" and bool(record.checkpoints))
    if lost:
        wrapper = (home / "worker" / "server.pid").read_text().split()[2]
        os.kill(int(Path(f"/proc/{wrapper}/task/{wrapper}/children").read_text()), signal.SIGKILL)
    os.kill(int(before.lease.owner.split("/")[1]), signal.SIGKILL)
    killed_at = time.monotonic()
    wait_for(store, run_id, lambda record: record.lease.token > before.lease.token and record.step > before.step)
    return time.monotonic() - killed_at


def main(
    lost: Annotated[bool, typer.Option("--lost", help="The worker is killed too.")] = False,
    rounds: Annotated[int, typer.Option(help="Runs, each of which is killed once.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works: two rounds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """How long a run on a worker stands still when its process is killed."""
    facts, imports, pauses = machine(), list[float](), list[float]()
    with temporary_home() as home, embedded_s3(home) as store:
        nightshift(home, "up")
        try:
            for number in range(2 if quick else rounds):
                tell(f"round {number + 1}")
                imports.append(import_seconds(home))
                pauses.append(kill_once(home, store, f"crash-{number}", lost))
        finally:
            nightshift(home, "down")
    report(
        Summary.of(pauses), Summary.of(imports), {"crash": pauses, "import": imports}, facts | {"lost": lost}, json_file
    )


def kill_once(home: Path, store: S3, run_id: str, lost: bool) -> float:
    """Submit a run, kill it once, and see it end. Returns the seconds it stood still."""
    settings = [f"--set={setting}" for setting in _CONFIG]
    nightshift(home, "submit", "train-cifar/adhoc", "--recipe=tutorial", f"--run-id={run_id}", *settings)
    seconds = kill(home, store, run_id, lost)
    ended = wait_for(store, run_id, lambda record: record.status not in ("running", "interrupted"))
    if (ended.status, ended.lease.token) != ("finished", 2):
        raise RuntimeError(f"{run_id} is {ended.status}, and its lease has token {ended.lease.token} after one kill")
    return seconds


def report(
    crash: Summary, imports: Summary, samples: dict[str, list[float]], facts: dict[str, object], json_file: Path | None
) -> None:
    show(
        "From the kill to a checkpoint with a new step",
        facts,
        ["seconds", "n", "median", "p99", "min", "max"],
        [
            [name, str(value.n), *(f"{figure:.2f}" for figure in (value.median, value.p99, value.min, value.max))]
            for name, value in (("import torch, prefect", imports), ("kill → new checkpoint", crash))
        ],
    )
    write_json(
        json_file,
        {
            "benchmark": "crash_time",
            "machine": facts,
            "crash_seconds": crash,
            "import_seconds": imports,
            "samples": samples,
        },
    )


if __name__ == "__main__":
    typer.run(main)
