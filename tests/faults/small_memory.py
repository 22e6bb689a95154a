"""A training in a process that may have little memory, for `test_small_memory`: what it found, as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from nightshift.data import jpeg
from nightshift.data.sources.listed import Listed
from nightshift.errors import TrainingInterrupted
from nightshift.judging.evaluation import evaluate
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import small_config

SIZE, CLASSES = 224, 10
_GROUPS = Path("/sys/fs/cgroup/memory")
_LIMIT, _PEAK = "memory.limit_in_bytes", "memory.max_usage_in_bytes"


@dataclass(frozen=True)
class Many:
    """A source of as many JPEG files as one likes, all different, which costs little to read."""

    count: int
    readers: int = 1

    def list(self) -> Iterator[Listed]:
        for number in range(self.count):
            yield Listed(f"{number:07}.jpg", str(number), "made up", f"class {number % CLASSES}")

    def read(self, listed: Listed) -> bytes:
        number = int(listed.place)
        body, comment = _picture(number % 100), number.to_bytes(4)
        return body[:2] + b"\xff\xfe" + (2 + len(comment)).to_bytes(2) + comment + body[2:]


@cache
def _picture(number: int) -> bytes:
    colours = np.random.default_rng(number).integers(0, 255, (SIZE // 4, SIZE // 4, 3), dtype=np.uint8)
    return jpeg.encoded(np.kron(colours, np.ones((4, 4, 1), np.uint8)))


def may_limit() -> bool:
    """Whether a process here may be given little memory, by a cgroup of version 1."""
    return os.geteuid() == 0 and (_GROUPS / _LIMIT).exists()


def run(home: Path, prefix: str, dataset: DatasetRef, limit: int, environment: dict[str, str]) -> Any:
    """What `main` finds in a process that may have so many bytes."""
    group = _GROUPS / f"nightshift-{os.getpid()}"
    group.mkdir()
    try:
        (group / _LIMIT).write_text(str(limit))
        command = f'echo $$ > {group}/tasks; exec "$0" -m {__name__} "$@"'
        done = subprocess.run(
            ["sh", "-c", command, sys.executable, str(home), prefix, dataset.model_dump_json()],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            text=True,
            timeout=1500,
        )
        assert done.returncode == 0, done.returncode
        return {**json.loads(done.stdout.splitlines()[-1]), "peak": int((group / _PEAK).read_text())}
    finally:
        group.rmdir()


def main(home: Path, prefix: str, dataset: DatasetRef) -> None:
    """Train an epoch, interrupted in the middle, and evaluate."""
    config = small_config(
        "quick", model="ournets:PartsNet", max_train_images=None, batch_size=128, epochs=1, tta="off", ema_decay=0
    )
    with embedded_s3(home, prefix) as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=60)
        with suppress(TrainingInterrupted):
            train_alone(workspace, "large", config, dataset, should_stop=lambda step: step == 300)
        checkpoint = train_alone(workspace, "large", config, dataset)
        record = read_record(store, "large")[0]
        evaluated = evaluate(workspace, checkpoint, dataset)
    status = Path("/proc/self/status").read_text()
    of_ours = next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]
    found = {"step": record.step, "resumed": record.resumed_from_step, "tested": evaluated.images}
    print(json.dumps({**found, "own": 1024 * int(of_ours)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], DatasetRef.model_validate_json(sys.argv[3]))
