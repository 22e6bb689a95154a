"""The course of a training, line by line, and while it goes on."""

import json
import operator
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from nightshift import progress
from nightshift.errors import StorageUnreachableError, TrainingInterrupted
from nightshift.progress import LogProgress, StepReport
from nightshift.refs import DatasetRef
from nightshift.storage.documents import MIB
from nightshift.storage.memory import MemoryStore
from nightshift.storage.s3 import S3
from nightshift.storage.store import Store
from nightshift.tracking.metrics import CheckpointLine, MetricsLog, TrainingLine, read_lines
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import eventually, small_config


def test_the_lines_of_a_run_that_was_stopped_are_those_of_one_that_was_not(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    config = small_config(max_train_images=320)

    def lines(run_id: str) -> list[tuple[Any, ...]]:
        found = read_lines(workspace.store, run_id)
        assert [line.at for line in found] == sorted(line.at for line in found)
        return [(line.step, line.loss, line.learning_rate) for line in found if isinstance(line, TrainingLine)]

    train_alone(workspace, "whole", config, cifar10)
    assert [step for step, _, _ in lines("whole")] == [10, 20]
    for stop in (7, 13):
        with pytest.raises(TrainingInterrupted):
            train_alone(workspace, "parts", config, cifar10, should_stop=partial(operator.eq, stop))
    train_alone(workspace, "parts", config, cifar10)
    assert lines("parts") == lines("whole")
    saved = [line for line in read_lines(workspace.store, "parts") if isinstance(line, CheckpointLine)]
    assert [line.step for line in saved] == [7, 13, 20]
    assert all(line.stall_seconds >= 0 and line.bytes > 0 for line in saved)


def line_of(step: int) -> TrainingLine:
    return TrainingLine(
        at=datetime(2026, 11, 25, tzinfo=UTC),
        step=step,
        epoch=1,
        loss=1.0,
        accuracy=0.5,
        learning_rate=0.1,
        images_per_second=100,
        train_seconds=1,
    )


WRONG = [
    json.dumps({**line_of(6).model_dump(mode="json"), **wrong}).encode()
    for wrong in (
        {"at": "9999-12-31T23:59:59.999999-23:59"},
        {"at": "0001-01-01T00:00:00Z"},
        {"step": 10**30},
        {"step": -1},
        {"loss": float("nan")},
        {"loss": 1e300},
        {"images_per_second": float("inf")},
        {"accuracy": 2},
        {"train_seconds": 1e308},
    )
]
"""Lines with a value that no training has."""


def put_lines(store: Store, *lines: bytes) -> None:
    store.put("reports/run/metrics.jsonl", b"".join(line + b"\n" for line in lines))


def test_the_lines_after_the_restored_step_are_dropped(store: Store) -> None:
    put_lines(store, *(line_of(step).model_dump_json().encode() for step in (5, 9)))
    assert MetricsLog(store, "run", 5).lines == [line_of(5)]
    assert MetricsLog(store, "run", 0).lines == []


@pytest.mark.parametrize(
    "damaged", [b'{"kind"', b"\xff", b"null", b'{"kind":"training","step":9}', b'{"kind":"else"}', *WRONG]
)
def test_a_damaged_line_is_left_out_with_a_warning(damaged: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    put_lines(store, line_of(5).model_dump_json().encode(), damaged, line_of(7).model_dump_json().encode())
    assert read_lines(store, "run") == [line_of(5), line_of(7)]
    assert "1 of its lines" in caplog.text


def test_metrics_that_are_too_large_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    put_lines(store, b"x" * (32 * MIB))
    assert read_lines(store, "run") == []
    assert "metrics of run run are left out" in caplog.text


def test_a_line_that_an_older_nightshift_wrote_is_read() -> None:
    store = MemoryStore()
    put_lines(
        store,
        b'{"kind": "training", "at": "2026-11-25T22:54:33.089+00:00", "step": 20, "epoch": 1, "loss": 2.1, '
        b'"accuracy": 0.25, "learning_rate": 0.0025, "images_per_second": 273.1, "train_seconds": 4.7}',
        b'{"kind": "checkpoint", "at": "2026-11-25T22:54:33.120+00:00", "step": 20, "epoch": 1, "bytes": 2728577, '
        b'"stall_seconds": 0.0015, "save_seconds": 0.05}',
    )
    assert [(line.kind, line.step) for line in read_lines(store, "run")] == [("training", 20), ("checkpoint", 20)]


def test_metrics_that_cannot_be_stored_do_not_stop_the_training(
    workspace: Workspace, cifar10: DatasetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = S3.put

    def refuse_metrics(self: S3, key: str, body: bytes, **condition: Any) -> str:
        if key.endswith("metrics.jsonl"):
            raise StorageUnreachableError("no answer")
        return put(self, key, body, **condition)

    monkeypatch.setattr(S3, "put", refuse_metrics)
    assert train_alone(workspace, "run", small_config(max_train_images=320), cifar10).step == 20


def test_tensorboard_reads_the_event_files(workspace: Workspace, cifar10: DatasetRef) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_alone(workspace, "events", small_config(max_train_images=320, tensorboard=True), cifar10)
    events = EventAccumulator(str(workspace.home / "tensorboard" / "events"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [10, 20]
    assert {"accuracy", "learning_rate", "images_per_second"} <= set(events.Tags()["scalars"])


def step_report(step: int) -> StepReport:
    return StepReport(step=step, total_steps=9, epoch=1, epochs=1, loss=1.0, accuracy=0.5, images_per_second=100)


def test_the_live_view_shows_the_newest_step_now_and_then_and_the_last_one_at_the_end() -> None:
    shown: list[int] = []
    with progress.watched(lambda report: shown.append(report.step), seconds=0.05):
        progress.current().trained(step_report(1), epoch_ended=False)
        eventually(lambda: shown == [1])
        for step in range(2, 9):
            progress.current().trained(step_report(step), epoch_ended=False)
        progress.current().trained(step_report(9), epoch_ended=True)
    assert shown[-1] == 9
    assert len(shown) < 9


def test_a_live_view_that_fails_is_warned_of_and_stops_nothing() -> None:
    warnings: list[str] = []

    class Warnings(LogProgress):
        def warn(self, message: str) -> None:
            warnings.append(message)

    def fail(report: StepReport) -> None:
        raise OSError("the server is away")

    with progress.shown_by(Warnings()), progress.watched(fail, seconds=60):
        progress.current().trained(step_report(1), epoch_ended=False)
    assert warnings == ["the live view could not be updated: the server is away"]
