"""Choosing an epoch by the validation images: which it is, when it is enough, and that its checkpoint is there."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nightshift.checkpoints.payload import read_payload, read_weights, weights_sha256
from nightshift.config.sections import EvaluationConfig
from nightshift.config.train import TrainConfig
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.data.names import checked_config
from nightshift.errors import ConfigError, RunNotFoundError, StorageUnreachableError, TrainingInterrupted
from nightshift.judging import evaluation
from nightshift.judging.report import build_report
from nightshift.publishing.publish import publish_model
from nightshift.records import orphans
from nightshift.records.curve import CurvePoint, best_of, is_enough, is_validated
from nightshift.records.run import RunRecord, read_record
from nightshift.records.versions import read_card
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.tracking.metrics import TrainingLine, read_lines
from nightshift.training import run as training
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.judging.nights import NAME
from tests.made_up import in_memory
from tests.records.test_orphans import NOW
from tests.stores import Faulty
from tests.training import choices


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return replace(in_memory(tmp_path / "home"), save_retry_seconds=0)


@pytest.fixture
def ref(workspace: Workspace, tmp_path: Path) -> DatasetRef:
    return choices.images(workspace, tmp_path / "photos")


def curve_of(*accuracies: float | None, losses: tuple[float, ...] = ()) -> list[CurvePoint]:
    return [
        CurvePoint(
            epoch=epoch,
            step=10 * epoch,
            loss=1.0,
            accuracy=0.5,
            validation_accuracy=accuracy,
            validation_loss=losses[epoch - 1] if losses else None if accuracy is None else 1 - accuracy,
        )
        for epoch, accuracy in enumerate(accuracies, 1)
    ]


def record_of(workspace: Workspace, run_id: str = "run") -> RunRecord:
    return read_record(workspace.store, run_id)[0]


def state_of(workspace: Workspace, checkpoint: CheckpointRef) -> str:
    return state_sha256(read_payload(workspace.store, checkpoint))


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ((0.1, 0.3, 0.2), 2),
        ((0.3, 0.3, 0.2), 1),  # of equal ones, the first
        ((None, 0.2, None, 0.2, None, 0.4), 6),
        ((0.0,), 1),
        ((None, None), None),
        ((), None),
    ],
)
def test_the_best_epoch_is_the_first_with_the_highest_accuracy(
    accuracies: tuple[float | None, ...], best: int | None
) -> None:
    found = best_of(curve_of(*accuracies), EvaluationConfig())
    assert (found and found.epoch) == best


def test_the_best_epoch_by_loss_is_the_first_with_the_lowest() -> None:
    found = best_of(curve_of(0.9, 0.1, 0.5, losses=(0.3, 0.2, 0.2)), EvaluationConfig(metric="loss"))
    assert found
    assert found.epoch == 2


@pytest.mark.parametrize(
    ("accuracies", "patience", "enough"),
    [
        ((0.1, 0.3, 0.3, 0.2), 2, True),
        ((0.1, 0.3, 0.2), 2, False),
        ((0.1, 0.3, 0.2, 0.4), 2, False),
        ((0.3, None, 0.2, None, None), 2, False),  # looks count, not epochs
        ((0.3, None, 0.2, None, 0.1), 2, True),
        ((0.3, 0.2, 0.1), None, False),
        ((), 1, False),
    ],
)
def test_it_is_enough_after_so_many_looks_without_a_better_epoch(
    accuracies: tuple[float | None, ...], patience: int | None, enough: bool
) -> None:
    assert is_enough(curve_of(*accuracies), EvaluationConfig(patience=patience)) == enough


def test_the_last_epoch_is_always_looked_at() -> None:
    every = EvaluationConfig(validate_every=3)
    assert [epoch for epoch in range(1, 9) if is_validated(epoch, 8, every)] == [3, 6, 8]
    assert not is_validated(8, 8, EvaluationConfig())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"keep": "best"}, "evaluation.keep=best rests on the validation images: set evaluation.validate_every=1"),
        ({"patience": 2}, "evaluation.patience=2 rests on the validation images: set evaluation.validate_every=1"),
        ({"validate_every": 1}, "evaluation.validate_every=1 needs validation images, and cifar10 has none: train on"),
    ],
)
def test_a_choice_without_images_to_choose_by_is_told(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        checked_config("quick", overrides)


def test_images_of_ones_own_without_such_a_split_are_told_before_anything_is_stored(
    workspace: Workspace, tmp_path: Path
) -> None:
    ref = choices.images(workspace, tmp_path / "photos", validation=0)
    with pytest.raises(ConfigError, match=rf"{NAME} has none: give some to that split, .* \[datasets.{NAME}\]"):
        train_alone(workspace, "run", choices.config(), ref)
    with pytest.raises(RunNotFoundError):
        record_of(workspace)


def measured(workspace: Workspace, ref: DatasetRef, config: TrainConfig, checkpoint: CheckpointRef) -> float:
    """The accuracy of stored weights on the validation images, by what tests a model."""
    dataset = open_dataset(workspace, ref)
    assert dataset.validation_images is not None
    assert dataset.validation_labels is not None
    asked = replace(dataset, test_images=dataset.validation_images, test_labels=dataset.validation_labels)
    model = evaluation.load_model(config, read_weights(workspace.store, checkpoint), 3, image_size=dataset.image_size)
    answers = evaluation.answer_test_images(model, asked, config)
    return (answers.predicted == answers.labels).double().mean().item()


@pytest.mark.parametrize("changed", [{}, {"metric": "loss"}, {"ema_decay": 0.9}, {"patience": 2, "lr": 0.01}])
def test_the_checkpoint_of_the_best_epoch_is_kept_and_is_what_is_tested_and_published(
    workspace: Workspace, ref: DatasetRef, changed: dict[str, Any]
) -> None:
    config = choices.config(**changed)
    chosen = train_alone(workspace, "run", config, ref)
    record = record_of(workspace)
    best = best_of(record.curve, config.evaluation)
    assert best
    assert best.epoch < record.curve[-1].epoch
    assert (chosen.step, chosen.epoch) == (best.step, best.epoch)
    assert [checkpoint.step for checkpoint in record.checkpoints] == [best.step, record.curve[-1].step]
    assert {item.key for item in workspace.store.list("checkpoints/")} == {item.key for item in record.checkpoints}
    assert orphans.find(workspace.store, NOW).objects == []
    assert measured(workspace, ref, config, chosen) == best.validation_accuracy
    tested = evaluation.evaluate(workspace, chosen, ref)
    assert tested.weights_sha256 == weights_sha256(read_weights(workspace.store, chosen))
    publish_model(workspace, chosen, ref, tested)
    assert read_card(workspace.store, NAME, "run").weights_sha256 == tested.weights_sha256
    assert train_alone(workspace, "run", config, ref).key == chosen.key
    assert record.summary()["kept_epoch"] == best.epoch


def test_a_run_stops_early_and_stays_so(workspace: Workspace, ref: DatasetRef) -> None:
    config = choices.config(patience=2, keep="last")
    last = train_alone(workspace, "run", config, ref)
    record = record_of(workspace)
    assert len(record.curve) < config.schedule.epochs
    assert is_enough(record.curve, config.evaluation)
    assert not is_enough(record.curve[:-1], config.evaluation)
    assert last.step == record.curve[-1].step
    again = train_alone(workspace, "run", config, ref)
    assert (again.key, record_of(workspace).curve) == (last.key, record.curve)


def test_looking_at_the_validation_images_changes_no_bit_of_the_training(workspace: Workspace, ref: DatasetRef) -> None:
    found = []
    for every in (1, None):
        last = train_alone(workspace, f"run-{every}", choices.config(keep="last", validate_every=every), ref)
        payload = read_payload(workspace.store, last)
        del payload["curve"]
        found.append(state_sha256(payload))
    assert found[0] == found[1]


def test_the_test_images_are_not_needed_to_choose(
    workspace: Workspace, ref: DatasetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_alone(workspace, "whole", choices.config(), ref)

    def without(workspace: Workspace, ref: DatasetRef, threads: int) -> Dataset:
        empty = torch.empty(0)
        return replace(open_dataset(workspace, ref), test_images=empty, test_labels=empty)

    monkeypatch.setattr(training, "open_dataset", without)
    assert state_of(workspace, train_alone(workspace, "run", choices.config(), ref)) == state_of(workspace, whole)


def test_a_run_stopped_after_any_step_chooses_the_same_epoch(workspace: Workspace, ref: DatasetRef) -> None:
    config = choices.config(patience=3)
    whole = train_alone(workspace, "whole", config, ref)
    for stop in range(1, record_of(workspace, "whole").step):
        with pytest.raises(TrainingInterrupted):
            train_alone(workspace, "run", config, ref, should_stop=lambda step, stop=stop: step == stop)  # type: ignore[misc]
    chosen = train_alone(workspace, "run", config, ref)
    assert (chosen.step, state_of(workspace, chosen)) == (whole.step, state_of(workspace, whole))
    assert record_of(workspace).curve == record_of(workspace, "whole").curve


def test_where_the_best_epoch_cannot_be_stored_the_run_does_not_go_on_and_ends_with_the_same_bits_later(
    workspace: Workspace, ref: DatasetRef
) -> None:
    config = choices.config()
    whole = train_alone(workspace, "whole", config, ref)
    store = Faulty(workspace.store)
    failing = replace(workspace, store=store)
    store.fail("upload", StorageUnreachableError("no answer"), f"checkpoints/run/{whole.step}-", times=100)
    with pytest.raises(StorageUnreachableError):
        train_alone(failing, "run", config, ref)
    record = record_of(workspace)
    assert record.status == "interrupted"
    assert record.step < whole.step
    chosen = train_alone(workspace, "run", config, ref)
    assert state_of(workspace, chosen) == state_of(workspace, whole)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_where_the_best_epoch_is_lost_it_is_trained_again(workspace: Workspace, ref: DatasetRef, how: str) -> None:
    config = choices.config(keep_last=4)
    whole = train_alone(workspace, "whole", config, ref)
    chosen = train_alone(workspace, "run", config, ref)
    if how == "damaged":
        workspace.store.put(chosen.key, b"x" * chosen.bytes)
    else:
        workspace.store.delete(chosen.key)
    again = train_alone(workspace, "run", config, ref)
    assert state_of(workspace, again) == state_of(workspace, whole)
    assert record_of(workspace).curve == record_of(workspace, "whole").curve


def test_lines_and_report_show_the_validation_and_which_epoch_was_kept(workspace: Workspace, ref: DatasetRef) -> None:
    config = choices.config(validate_every=2)
    chosen = train_alone(workspace, "run", config, ref)
    evaluation.evaluate(workspace, chosen, ref)
    record = record_of(workspace)
    ends = [line for line in read_lines(workspace.store, "run") if isinstance(line, TrainingLine)]
    shown = {line.epoch: line.validation_accuracy for line in ends if line.validation_accuracy is not None}
    assert shown == {point.epoch: point.validation_accuracy for point in record.curve if point.epoch % 2 == 0}
    report = build_report(workspace, record, None, None)
    best = record.curve[chosen.epoch - 1]
    assert f"| {100 * (best.validation_accuracy or 0):.2f} % | kept |" in report.markdown
    assert report.markdown.count("| – | – |  |") == 3
    assert "Validation accuracy" in report.html
    assert "kept epoch" in report.plots["accuracy"]
