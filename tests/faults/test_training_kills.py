"""SIGKILL within an epoch, whatever the augmentation, the loss and the sampling: the run ends with the same bits."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from nightshift.checkpoints.payload import read_payload
from nightshift.errors import TrainingInterrupted
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import read_record
from nightshift.storage.s3 import S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.forked import forked
from tests.made_up import config_of, known
from tests.training.kinds import BINARY, KINDS

End = tuple[str, list[Any], int | None]


def train(home: Path, prefix: str, run_id: str, kind: str, killed_at: int = 0) -> End:
    """sha256 of everything a run ends with, its curve, and where it was resumed; in a process that may be killed."""

    def strike(step: int) -> bool:
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    with embedded_s3(home, prefix) as store:
        workspace = Workspace(store, home, lease_seconds=6, save_retry_seconds=5)
        dataset = known(workspace, 16, 2 if kind == "binary" else 4, train=100)  # an epoch has seven steps
        config = config_of(**KINDS.get(kind, BINARY), epochs=2, drop_last=False, checkpoint_every_steps=2)
        if killed_at:  # something is saved, whatever comes
            with pytest.raises(TrainingInterrupted):
                train_alone(workspace, run_id, config, dataset, should_stop=lambda step: step == 3)
        last = train_alone(workspace, run_id, config, dataset, should_stop=strike)
        record, _ = read_record(store, run_id)
        return state_sha256(read_payload(store, last)), record.curve, record.resumed_from_step


@pytest.mark.parametrize(
    "kind",
    [
        "everything",
        *(pytest.param(kind, marks=pytest.mark.soak) for kind in [*KINDS, "binary"] if kind != "everything"),
    ],
)
def test_a_run_killed_within_an_epoch_ends_with_the_same_bits(kind: str, home: Path, server: S3, prefix: str) -> None:
    def in_a_process(run_id: str, killed_at: int = 0) -> End:
        with ProcessPoolExecutor(1, mp_context=forked()) as pool:
            return pool.submit(train, home, prefix, run_id, kind, killed_at).result()

    whole = in_a_process("whole")
    with pytest.raises(BrokenProcessPool):
        in_a_process("run", killed_at=10)
    state, curve, resumed = in_a_process("run")
    assert resumed in (3, 4, 6, 8, 10)  # as far as saving had come
    assert (state, curve) == whole[:2]
