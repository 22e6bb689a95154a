"""SIGKILL while the validation images choose an epoch: the same bits, the same stop, and the same epoch is kept."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from unittest import mock

import pytest

from nightshift.checkpoints.payload import read_payload
from nightshift.local.s3 import embedded_s3
from nightshift.records.curve import CurvePoint
from nightshift.records.run import Checkpoint, read_record
from nightshift.storage.s3 import S3
from nightshift.training.run import train_alone
from nightshift.training.saver import Saver
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.forked import forked
from tests.training import choices

CONFIG = choices.config(epochs=8, patience=3, metric="loss", checkpoint_every_steps=3)
"""Four steps an epoch; the third of eight is the best, so the sixth is the last."""
BEST, LAST = 12, 24
End = tuple[int, str, list[CurvePoint], list[int]]


def strike() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(home: Path, prefix: str, folder: Path, run_id: str, kill_at: int, kill_commit_of: int) -> End:
    """The step that was chosen, its state's sha256, the curve and the steps that are kept, unless it is killed."""

    def commit(saver: Saver, checkpoint: Checkpoint, curve: list[CurvePoint]) -> None:
        if checkpoint.step == kill_commit_of:
            strike()
        _commit(saver, checkpoint, curve)

    def should_stop(step: int) -> bool:
        if step == kill_at:
            strike()
        return False

    _commit = Saver._commit
    with embedded_s3(home, prefix) as store, mock.patch.object(Saver, "_commit", commit):
        workspace = Workspace(store, home, lease_seconds=6, save_retry_seconds=5)
        ref = choices.images(workspace, folder)
        chosen = train_alone(workspace, run_id, CONFIG, ref, should_stop=should_stop)
        record, _ = read_record(store, run_id)
        kept = [checkpoint.step for checkpoint in record.checkpoints]
        return chosen.step, state_sha256(read_payload(store, chosen)), record.curve, kept


@pytest.mark.parametrize(
    "kills",
    [
        # After the look at the images and before the save, in the save before the commit, and after both.
        [{"kill_at": BEST}, {"kill_commit_of": BEST}, {"kill_at": BEST + 1}, {"kill_at": LAST}],
        pytest.param([{"kill_at": step} for step in range(1, LAST + 1)], marks=pytest.mark.soak),
        pytest.param([{"kill_commit_of": step} for step in range(4, LAST + 1, 4)], marks=pytest.mark.soak),
    ],
    ids=["at the best", "at each step", "at each commit"],
)
def test_a_run_that_is_killed_chooses_and_keeps_the_same_epoch(
    kills: list[dict[str, int]], home: Path, server: S3, prefix: str, tmp_path: Path
) -> None:
    def in_a_process(run_id: str, kill_at: int = 0, kill_commit_of: int = 0) -> End:
        with ProcessPoolExecutor(1, mp_context=forked()) as pool:
            return pool.submit(train, home, prefix, tmp_path, run_id, kill_at, kill_commit_of).result()

    whole = in_a_process("whole")
    assert (whole[0], whole[2][-1].step, whole[3]) == (BEST, LAST, [BEST, LAST])
    killed = 0
    for kill in kills:
        try:
            in_a_process("run", **kill)
        except BrokenProcessPool:
            killed += 1
    assert killed
    assert in_a_process("run") == whole
