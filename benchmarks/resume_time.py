"""How long a killed run takes to resume, compared with importing torch and Prefect.

In each round a run (recipe quick, CIFAR-10, a checkpoint every 2 s) trains until a checkpoint is committed and
a second longer. It is killed by SIGKILL, and `nightshift resume` is started at once. The time is measured from
the kill until the first new step is done: the end of the old process, the start of the new one, all imports,
the Prefect flow with its tasks before training, the lease, the restore, the step. It is compared with
`python -c "import torch, prefect"`, from its start until both are imported, measured in the same round with
nothing else running but the same idle servers.

The samples read again are counted too: those in batches before the restored step that the resumed process
asked for. Loaders that skip through the epoch to find their place ask for all of them; here it must be 0.

The embedded S3 and the local Prefect server keep running, as they do when a run is killed, and the data set is
in the local cache. 2 cores, n = 5: about 5 minutes.

    python benchmarks/resume_time.py [--quick] [--json FILE]
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from common import Summary, machine, show, tell, temporary_home, write_json
from first_step import MARK

from nightshift.data.known import fetch, pack
from nightshift.errors import RunNotFoundError
from nightshift.local.prefect import local_prefect
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import RunRecord, read_record
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace

_IMPORTS = "import torch, prefect, time; print(time.monotonic())"
_COMMIT_SECONDS = 120


@dataclass(frozen=True)
class Resumption:
    """One kill and what came after it."""

    seconds: float
    """From the kill until the first new step was done."""
    restored_step: int
    first_step: int
    samples_read_again: int


class Trainer:
    """`nightshift …` as a process of its own."""

    def __init__(self, home: Path, *arguments: str) -> None:
        program = str(Path(__file__).with_name("first_step.py"))
        self._process = subprocess.Popen(
            [sys.executable, program, *arguments],
            env=environment(home),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def first_step(self) -> dict[str, Any]:
        """Wait for the first step. Returns what `first_step.py` reports about it."""
        assert self._process.stderr
        printed = []
        for line in self._process.stderr:
            if line.startswith(MARK):
                facts: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return facts
            printed.append(line)
        raise RuntimeError(f"the training ended before its first step:\n{''.join(printed)}")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def started(home: Path, *arguments: str) -> Iterator[Trainer]:
    """A trainer, killed at the end if it is still there."""
    trainer = Trainer(home, *arguments)
    try:
        yield trainer
    finally:
        trainer.kill()


def environment(home: Path) -> dict[str, str]:
    """Our environment without the variables that would lead to other servers than those of `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NIGHTSHIFT_", "PREFECT_"))}
    return {**kept, "NIGHTSHIFT_HOME": str(home), "PREFECT_HOME": str(home / "prefect-client")}


def import_seconds(home: Path) -> float:
    """From the start of a process until it has imported torch and Prefect."""
    begun = time.monotonic()
    process = subprocess.run(
        [sys.executable, "-c", _IMPORTS], env=environment(home), cwd=home, capture_output=True, text=True, check=True
    )
    return float(process.stdout) - begun


def committed(store: S3, run_id: str) -> RunRecord:
    """Wait until a run has a checkpoint. Returns its record."""
    deadline = time.monotonic() + _COMMIT_SECONDS
    while time.monotonic() < deadline:
        try:
            record, _ = read_record(store, run_id)
        except RunNotFoundError:
            record = None
        if record and record.checkpoints:
            return record
        time.sleep(0.05)
    raise RuntimeError(f"run {run_id} has committed no checkpoint within {_COMMIT_SECONDS} s")


def kill_and_resume(home: Path, store: S3, run_id: str) -> Resumption:
    with started(home, "train", "--run-id", run_id, "--set", "checkpoint_every_seconds=2") as trainer:
        trainer.first_step()
        committed(store, run_id)
        time.sleep(1)  # so that steps are lost, as they are in a kill at any moment
        killed_at = time.monotonic()
        trainer.kill()
    with started(home, "resume", run_id) as resumed:
        observed = resumed.first_step()
        restored_step = read_record(store, run_id)[0].resumed_from_step or 0
    return Resumption(
        seconds=observed["done_at"] - killed_at,
        restored_step=restored_step,
        first_step=observed["step"],
        samples_read_again=sum(images for step, images in observed["asked"] if step < restored_step),
    )


def main(
    rounds: Annotated[int, typer.Option(help="Kills, and imports to compare them with.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works: one round.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """How long a killed run takes to resume."""
    facts, resumptions, imports = machine(), [], []
    with temporary_home() as home, embedded_s3(home) as store, local_prefect(home) as (_, wait_for_prefect):
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=60)
        pack(workspace, fetch(workspace, "cifar10"))
        wait_for_prefect()
        for number in range(1 if quick else rounds):
            tell(f"round {number + 1}")
            imports.append(import_seconds(home))
            resumptions.append(kill_and_resume(home, store, f"resume-time-{number}"))
    report(resumptions, imports, facts, json_file)


def report(resumptions: list[Resumption], imports: list[float], facts: dict[str, Any], json_file: Path | None) -> None:
    baseline, resume = Summary.of(imports), Summary.of([resumption.seconds for resumption in resumptions])
    read_again = sum(resumption.samples_read_again for resumption in resumptions)
    show(
        "From the kill to the first new step",
        facts,
        ["seconds", "n", "median", "p99", "min", "max", "- import", "/ import", "samples read again"],
        [
            [
                name,
                str(seconds.n),
                *(f"{value:.2f}" for value in (seconds.median, seconds.p99, seconds.min, seconds.max)),
                f"{seconds.median - baseline.median:+.2f}",
                f"{seconds.median / baseline.median:.2f}",
                again,
            ]
            for name, seconds, again in (
                ("import torch, prefect", baseline, ""),
                ("kill → first new step", resume, str(read_again)),
            )
        ],
    )
    write_json(
        json_file,
        {
            "benchmark": "resume_time",
            "machine": facts,
            "import_seconds": baseline,
            "resume_seconds": resume,
            "resume_minus_import_seconds": resume.median - baseline.median,
            "resume_over_import": resume.median / baseline.median,
            "samples_read_again": read_again,
            "samples": {"import": imports, "resume": resumptions},
        },
    )


if __name__ == "__main__":
    typer.run(main)
