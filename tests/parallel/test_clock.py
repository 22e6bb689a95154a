"""Two ranks of which one looks at the clock end with the same step, also if that one is killed then."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial, update_wrapper
from unittest import mock

import pytest

from nightshift.checkpoints.payload import read_payload
from nightshift.parallel import agent, worker
from nightshift.parallel.launch import train_run
from nightshift.parallel.worker import RankSetup
from nightshift.records.run import read_record
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.training.clock import Clock
from nightshift.training.recorder import RunRecorder
from nightshift.training.state import TrainState
from nightshift.workspace import Workspace
from tests import made_up
from tests.bits import state_sha256

STEP = 8
"""The second of the second epoch of three."""


def _run_rank(is_killed: bool, setup: RankSetup, job_text: str | None) -> str:
    """A rank's life, in which the time is up at a step; but only before the ranks are started again."""
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    decide = RunRecorder.is_last

    def reason(clock: Clock, step: int, save_seconds: float = 0.0) -> str | None:
        return "the time is up" if step == STEP and is_first else None

    def is_last(recorder: RunRecorder, state: TrainState) -> bool:
        decided = decide(recorder, state)
        if decided and is_killed and is_first:  # after it was recorded, before another rank knows
            os.kill(os.getpid(), signal.SIGKILL)
        return decided

    with mock.patch.object(Clock, "reason", reason), mock.patch.object(RunRecorder, "is_last", is_last):
        return worker.run_rank(setup, job_text)


@contextmanager
def time_is_up(is_killed: bool) -> Iterator[None]:
    with mock.patch.object(agent, "run_rank", update_wrapper(partial(_run_rank, is_killed), worker.run_rank)):
        yield


def state_of(workspace: Workspace, checkpoint: CheckpointRef) -> str:
    return state_sha256(read_payload(workspace.store, checkpoint))


@pytest.fixture
def dataset(workspace: Workspace) -> DatasetRef:
    return made_up.known(workspace, 32, 4)


def test_two_ranks_end_with_the_step_that_the_clock_of_one_names_and_so_they_do_after_a_kill(
    workspace: Workspace, dataset: DatasetRef
) -> None:
    due = datetime.now(UTC) + timedelta(hours=9)
    config = made_up.config_of(finish_by=due.isoformat(), nproc_per_node=2, checkpoint_every_steps=3)
    with time_is_up(is_killed=False):
        whole = train_run(workspace, "whole", config, dataset)
    with time_is_up(is_killed=True):
        again = train_run(workspace, "run", config, dataset)
    assert (whole.step, again.step) == (STEP, STEP)
    assert whole.clock == again.clock == "the time is up"
    assert state_of(workspace, again) == state_of(workspace, whole)
    record = read_record(workspace.store, "run")[0]
    assert record.last_step == STEP
    assert [event.what for event in record.events] == ["started", "clock", "resumed"]
