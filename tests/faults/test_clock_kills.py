"""SIGKILL around the moment at which the clock ends a training: the step that was recorded is the last, to the bit."""

import os
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import pytest

from nightshift.checkpoints.payload import read_payload
from nightshift.errors import TrainingInterrupted
from nightshift.judging import evaluation
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import Checkpoint, read_record
from nightshift.storage.s3 import S3
from nightshift.training.clock import Clock
from nightshift.training.run import train_alone
from nightshift.training.saver import Saver
from nightshift.workspace import Workspace
from tests import made_up
from tests.bits import state_sha256
from tests.forked import forked

STEP = 9
"""In the middle of the second epoch of three."""
CONFIG = made_up.config_of(
    finish_by=(datetime.now(UTC) + timedelta(hours=9)).isoformat(), checkpoint_every_steps=4, keep_best=False
)
End = tuple[int, str, str]


def strike() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(home: Path, prefix: str, run_id: str, is_up: bool, kill: str, stop: int = 0) -> End:
    """The step, the state and the weights that were tested, unless it is killed.

    Args:
        is_up: whether the clock ends the training at `STEP`.
    """

    def reason(clock: Clock, step: int, save_seconds: float = 0.0) -> str | None:
        if is_up and step == STEP and kill == "before it is recorded":
            strike()
        return "the time is up" if is_up and step == STEP else None

    def commit(saver: Saver, checkpoint: Checkpoint, curve: object) -> None:
        if checkpoint.step == STEP and kill == "before it is saved":
            strike()
        _commit(saver, checkpoint, curve)  # type: ignore[arg-type]
        if checkpoint.step == STEP and kill == "after it is saved":
            strike()

    _commit = Saver._commit
    with (
        embedded_s3(home, prefix) as store,
        mock.patch.object(Saver, "_commit", commit),
        mock.patch.object(Clock, "reason", reason),
    ):
        workspace = Workspace(store, home, lease_seconds=6, save_retry_seconds=5)
        dataset = made_up.known(workspace, 32, 4)
        with suppress(TrainingInterrupted):
            train_alone(workspace, run_id, CONFIG, dataset, should_stop=lambda step: step == stop)
        record, _ = read_record(store, run_id)
        done = record.ref(record.checkpoints[-1])
        if kill == "before it is tested":
            strike()
        tested = evaluation.evaluate(workspace, done, dataset)
        return done.step, state_sha256(read_payload(store, done)), tested.weights_sha256


@pytest.mark.parametrize(
    "kill", ["before it is recorded", "before it is saved", "after it is saved", "before it is tested"]
)
def test_a_run_that_the_clock_has_ended_and_that_is_killed_then_ends_with_the_recorded_step(
    kill: str, home: Path, server: S3, prefix: str
) -> None:
    def in_a_process(run_id: str, is_up: bool, kill: str = "", stop: int = 0) -> End:
        with ProcessPoolExecutor(1, mp_context=forked()) as pool:
            return pool.submit(train, home, prefix, run_id, is_up, kill, stop).result()

    whole = in_a_process("whole", is_up=False, stop=STEP)
    assert whole[0] == STEP
    with pytest.raises(BrokenProcessPool):
        in_a_process("run", is_up=True, kill=kill)
    with embedded_s3(home, prefix) as store:
        recorded = read_record(store, "run")[0].last_step
    assert recorded == (None if kill == "before it is recorded" else STEP)
    # There is time again, and only the record knows that there was none. What was not recorded is decided anew.
    assert in_a_process("run", is_up=recorded is None) == whole
