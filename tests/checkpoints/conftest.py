"""A run with checkpoints, and what is said while it is resumed."""

import hashlib
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from nightshift import progress
from nightshift.errors import TrainingInterrupted
from nightshift.progress import LogProgress
from nightshift.records.keys import payload_key
from nightshift.records.lease import Run
from nightshift.records.run import Checkpoint, CheckpointMetrics, RunRecord, read_record
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.storage.store import Store
from nightshift.training.run import train_alone
from nightshift.training.state import TrainState
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.records.test_lease import acquire


class Warnings(LogProgress):
    """Keeps what was warned of."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


def train(workspace: Workspace, cifar10: DatasetRef, stop: int | None = None, **overrides: Any) -> CheckpointRef:
    config = small_config(**{"max_train_images": 480, "epochs": 1, **overrides})
    return train_alone(workspace, "run", config, cifar10, should_stop=lambda step: step == stop)


def train_in_parts(workspace: Workspace, cifar10: DatasetRef, *stops: int, **overrides: Any) -> CheckpointRef:
    """Train with a checkpoint at each of these steps and one at the end."""
    for stop in stops:
        with pytest.raises(TrainingInterrupted):
            train(workspace, cifar10, stop, **overrides)
    return train(workspace, cifar10, **overrides)


@pytest.fixture
def record(workspace: Workspace, cifar10: DatasetRef) -> RunRecord:
    """A finished training with checkpoints at steps 5, 10 and 15."""
    train_in_parts(workspace, cifar10, 5, 10)
    return read_record(workspace.store, "run")[0]


def resume(workspace: Workspace, cifar10: DatasetRef) -> tuple[RunRecord, list[str]]:
    """The record and the warnings of a training that goes on, or finds that it has nothing left to do."""
    warnings = Warnings()
    with progress.shown_by(warnings):
        train(workspace, cifar10)
    return read_record(workspace.store, "run")[0], warnings.messages


def run_with_checkpoints(store: Store) -> Run:
    """A run that is held, with checkpoints of steps 1 and 2."""
    run, network = acquire(store), nn.Linear(1, 1)
    state = TrainState(network, SGD(network.parameters(), lr=0.1), torch.device("cpu"))
    for step in (1, 2):
        body, state.step = io.BytesIO(), step
        torch.save(state.capture(), body)
        key = payload_key("run", step, run.token)
        store.put(key, body.getvalue())
        checkpoint = Checkpoint(
            step=step,
            epoch=0,
            key=key,
            bytes=len(body.getvalue()),
            sha256=hashlib.sha256(body.getvalue()).hexdigest(),
            written_at=store.now(),
            metrics=CheckpointMetrics(train_seconds=1),
        )
        checkpoints = [*run.record.checkpoints, checkpoint]
        run.update(partial(RunRecord.changed, checkpoints=checkpoints))
    return run
