"""Two ranks choose an epoch as one does, and the same one after a kill."""

import signal
from pathlib import Path

import pytest

from nightshift.checkpoints.payload import read_payload
from nightshift.config.train import TrainConfig
from nightshift.parallel.launch import train_run
from nightshift.records.run import RunRecord, read_record
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.parallel.struck import Blow, struck_by
from tests.training import choices


@pytest.fixture
def ref(workspace: Workspace, tmp_path: Path) -> DatasetRef:
    return choices.images(workspace, tmp_path)


def trained(workspace: Workspace, ref: DatasetRef, run_id: str, config: TrainConfig) -> tuple[int, str, RunRecord]:
    """The step that was chosen, the sha256 of its state, and the record."""
    chosen = train_run(workspace, run_id, config, ref)
    state = state_sha256(read_payload(workspace.store, chosen))
    return chosen.step, state, read_record(workspace.store, run_id)[0]


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_two_ranks_of_which_one_is_killed_keep_the_same_epoch(rank: int, workspace: Workspace, ref: DatasetRef) -> None:
    config = choices.config(epochs=8, patience=3, metric="loss", nproc_per_node=2)
    step, state, record = trained(workspace, ref, "whole", config)
    assert step < record.step < record.total_steps
    with struck_by(Blow(rank, step, signal.SIGKILL)):  # after the look at the images, before the save
        again = trained(workspace, ref, "run", config)
    assert again[:2] == (step, state)
    assert again[2].curve == record.curve
    assert [event.what for event in again[2].events].count("resumed") == 1


def test_two_ranks_see_of_the_validation_images_what_one_sees(workspace: Workspace, ref: DatasetRef) -> None:
    """With SGD, for Adam multiplies the rounding of sums in another order."""
    config = choices.config(optimizer="sgd", lr=0.01)
    one, two = (
        trained(workspace, ref, f"ranks-{ranks}", config.override({"nproc_per_node": ranks}))[2].curve
        for ranks in (1, 2)
    )
    assert [point.validation_loss for point in two] == pytest.approx([point.validation_loss for point in one], abs=1e-5)
    assert [point.validation_accuracy for point in two] == [point.validation_accuracy for point in one]
