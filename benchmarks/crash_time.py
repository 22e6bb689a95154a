"""How long a run on a worker stands still when its process is killed, on a machine that lives on.

In each round a run (recipe tutorial, CIFAR-10, a checkpoint every 10 steps) is submitted to the server and worker of
`nightshift up`, and killed by SIGKILL after a checkpoint. The time is measured from the kill until a checkpoint with a
new step is committed: the worker sees its child die, the flow run is scheduled again and taken up, a process starts,
imports torch and Prefect, takes the lease over, restores and trains ten steps.

    at once     the worker has it started again
    automation  it is killed a second time within a minute. The worker then leaves it to Prefect's automation, which
                was the only way before

In the end each run has to be finished, and the fencing token of its lease has to be one more than its kills: nobody
else has held it meanwhile.

2 cores, 20 rounds, 5 of them with a second kill: about 12 minutes.

    python benchmarks/crash_time.py [--rounds N] [--twice N] [--quick] [--json FILE]
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
from resume_time import environment

from nightshift.errors import RunNotFoundError
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import RunRecord, read_record
from nightshift.storage.s3 import S3

_SECONDS = 180
_CONFIG = ("epochs=8", "max_train_images=12800", "checkpoint_every_steps=10")


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


def kill(store: S3, run_id: str) -> float:
    """Kill whoever trains a run. Returns the seconds until it has a checkpoint of a new step."""
    before = wait_for(store, run_id, lambda record: record.status == "running" and bool(record.checkpoints))
    os.kill(int(before.lease.owner.split("/")[1]), signal.SIGKILL)
    killed_at = time.monotonic()
    wait_for(store, run_id, lambda record: record.lease.token > before.lease.token and record.step > before.step)
    return time.monotonic() - killed_at


def main(
    rounds: Annotated[int, typer.Option(help="Runs, each of which is killed.")] = 20,
    twice: Annotated[int, typer.Option(help="How many of them are killed a second time.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Two rounds, one of them with a second kill.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """How long a run on a worker stands still when its process is killed."""
    if quick:
        rounds, twice = 2, 1
    facts = machine()
    seconds: dict[str, list[float]] = {"at once": [], "automation": []}
    with temporary_home() as home, embedded_s3(home) as store:
        nightshift(home, "up")
        try:
            for number in range(rounds):
                tell(f"round {number + 1} of {rounds}")
                run_id = f"crash-{number}"
                settings = [f"--set={setting}" for setting in _CONFIG]
                nightshift(home, "submit", "train-cifar/adhoc", "--recipe=tutorial", f"--run-id={run_id}", *settings)
                seconds["at once"].append(kill(store, run_id))
                if number < twice:
                    seconds["automation"].append(kill(store, run_id))
                ended = wait_for(store, run_id, lambda record: record.status not in ("running", "interrupted"))
                kills = 1 + (number < twice)
                if (ended.status, ended.lease.token) != ("finished", 1 + kills):
                    raise RuntimeError(
                        f"{run_id} is {ended.status}, with token {ended.lease.token} after {kills} kills"
                    )
        finally:
            nightshift(home, "down")
    report({name: Summary.of(values) for name, values in seconds.items() if values}, seconds, facts, json_file)


def report(
    found: dict[str, Summary], samples: dict[str, list[float]], facts: dict[str, object], json_file: Path | None
) -> None:
    show(
        "From the kill to a checkpoint with a new step",
        facts,
        ["started again", "n", "median s", "p99", "min", "max"],
        [
            [name, str(value.n), *(f"{figure:.1f}" for figure in (value.median, value.p99, value.min, value.max))]
            for name, value in found.items()
        ],
    )
    write_json(json_file, {"benchmark": "crash_time", "machine": facts, "seconds": found, "samples": samples})


if __name__ == "__main__":
    typer.run(main)
