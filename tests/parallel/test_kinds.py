"""Two ranks, however images are augmented, sampled and learnt from: the losses of one, and the bits after a kill."""

import signal
from typing import Any

import pytest

from nightshift.checkpoints.payload import read_payload
from nightshift.config.train import TrainConfig
from nightshift.errors import TrainingInterrupted
from nightshift.parallel.launch import train_run
from nightshift.records.run import RunRecord, read_record
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.conftest import small_config
from tests.parallel.struck import Blow, struck_by
from tests.training.kinds import KINDS


def trained(workspace: Workspace, cifar10: DatasetRef, run_id: str, config: TrainConfig) -> tuple[str, RunRecord]:
    """sha256 of everything a run ends with, and its record."""
    last = train_run(workspace, run_id, config, cifar10)
    return state_sha256(read_payload(workspace.store, last)), read_record(workspace.store, run_id)[0]


def config_of(**overrides: Any) -> TrainConfig:
    return small_config("tutorial", max_train_images=200, checkpoint_every_steps=4, **overrides)


def test_two_ranks_have_the_losses_of_one_with_everything_that_there_is(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    """With SGD, for Adam multiplies the rounding of sums in another order."""
    config = config_of(**KINDS["everything"], optimizer="sgd", lr=0.01)
    curves = [
        trained(workspace, cifar10, f"ranks-{ranks}", config.override({"nproc_per_node": ranks}))[1].curve
        for ranks in (1, 2)
    ]
    one, two = ([point.loss for point in curve] for curve in curves)
    assert two == pytest.approx(one, abs=1e-5, rel=0)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=pytest.mark.soak) for kind in KINDS],
)
def test_a_run_of_two_ranks_of_which_one_is_killed_within_an_epoch_ends_with_the_same_bits(
    kind: str, workspace: Workspace, cifar10: DatasetRef
) -> None:
    config = config_of(**KINDS[kind], nproc_per_node=2)  # an epoch has seven steps
    whole, record = trained(workspace, cifar10, "whole", config)
    with struck_by(Blow(0, 3, signal.SIGTERM)), pytest.raises(TrainingInterrupted):  # so that something is saved
        train_run(workspace, "run", config, cifar10)
    with struck_by(Blow(1, 10, signal.SIGKILL)):
        state, after = trained(workspace, cifar10, "run", config)
    assert after.resumed_from_step in (3, 4, 8)  # as far as saving had come
    assert [event.what for event in after.events].count("resumed") == 2
    assert state == whole
    assert after.curve == record.curve
