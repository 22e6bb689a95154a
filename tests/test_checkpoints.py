"""Payloads are verified on the way back; what cannot be used is skipped by name."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nightshift import checkpoints, progress, runs, training
from nightshift.errors import CheckpointCorruptError, StorageError
from nightshift.progress import LogProgress
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.runs import RunRecord
from nightshift.workspace import Workspace
from tests.conftest import small_config


class Warnings(LogProgress):
    """Keeps what was warned of."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def warn(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture
def record(workspace: Workspace, cifar10: DatasetRef) -> RunRecord:
    """A finished training with checkpoints at steps 5, 10 and 15."""
    train(workspace, cifar10)
    return runs.read_record(workspace.store, "run")[0]


def train(workspace: Workspace, cifar10: DatasetRef, run_id: str = "run", **overrides: Any) -> CheckpointRef:
    config = small_config(**{"max_train_images": 480, "epochs": 1, "checkpoint_every_steps": 5, **overrides})
    return training.train(workspace, run_id, config, cifar10)


def overwrite(workspace: Workspace, key: str, change: Callable[[bytes], bytes]) -> None:
    workspace.store.put(key, change(workspace.store.get(key)[0]))


def flip_one_bit(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def restored_step(workspace: Workspace, record: RunRecord) -> tuple[int | None, list[str]]:
    warnings = Warnings()
    with progress.shown_by(warnings):
        found = checkpoints.latest(workspace.store, record)
    return (found[0].step if found else None), warnings.messages


def test_the_newest_checkpoint_is_restored_without_a_warning(workspace: Workspace, record: RunRecord) -> None:
    assert restored_step(workspace, record) == (15, [])


@pytest.mark.parametrize(
    ("change", "reason"), [(flip_one_bit, "sha256"), (lambda body: body[:-1], "bytes instead of"), (None, "missing")]
)
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    workspace: Workspace, record: RunRecord, change: Callable[[bytes], bytes] | None, reason: str
) -> None:
    newest = record.checkpoints[-1].key
    if change:
        overwrite(workspace, newest, change)
    else:
        workspace.store.delete(newest)
    step, warnings = restored_step(workspace, record)
    assert step == 10
    assert len(warnings) == 1
    assert newest in warnings[0]
    assert reason in warnings[0]


def test_a_run_all_of_whose_checkpoints_are_damaged_begins_anew_and_says_so(
    workspace: Workspace, record: RunRecord
) -> None:
    for checkpoint in record.checkpoints:
        overwrite(workspace, checkpoint.key, flip_one_bit)
    step, warnings = restored_step(workspace, record)
    assert step is None
    assert [message for message in warnings if "begins anew" in message]


def test_a_run_resumed_past_damaged_checkpoints_ends_with_the_same_bits(
    workspace: Workspace, cifar10: DatasetRef, record: RunRecord
) -> None:
    expected = checkpoints.read(workspace.store, record.checkpoints[-1])
    for checkpoint in record.checkpoints[1:]:
        overwrite(workspace, checkpoint.key, flip_one_bit)
    again = train(workspace, cifar10)
    resumed, _ = runs.read_record(workspace.store, "run")
    assert resumed.resumed_from_step == 5
    for key, weight in checkpoints.read(workspace.store, again)["model"].items():
        assert torch.equal(weight, expected["model"][key])


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_stored_pickle_that_would_execute_something_is_refused(
    workspace: Workspace, record: RunRecord, tmp_path: Path
) -> None:
    trap = tmp_path / "executed"
    buffer = io.BytesIO()
    torch.save({"model": Payload(trap)}, buffer)
    newest = record.checkpoints[-1]
    workspace.store.put(newest.key, buffer.getvalue())
    forged = newest.model_copy(
        update={"bytes": len(buffer.getvalue()), "sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    )
    with pytest.raises(CheckpointCorruptError, match="not plain tensors"):
        checkpoints.read(workspace.store, forged)
    assert not trap.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert trap.exists(), "the trap itself does not work"


def test_verify_names_each_bad_checkpoint_and_its_reason(workspace: Workspace, record: RunRecord) -> None:
    assert [bad for _, bad in checkpoints.verify(workspace.store, record)] == [None, None, None]
    overwrite(workspace, record.checkpoints[1].key, flip_one_bit)
    verdicts = [bad for _, bad in checkpoints.verify(workspace.store, record)]
    assert [bad.key for bad in verdicts if bad] == [record.checkpoints[1].key]


def test_only_the_newest_checkpoints_are_kept_in_record_and_store(workspace: Workspace, cifar10: DatasetRef) -> None:
    train(workspace, cifar10, checkpoint_every_steps=3, keep_last=2)
    record, _ = runs.read_record(workspace.store, "run")
    assert [checkpoint.step for checkpoint in record.checkpoints] == [12, 15]
    assert {item.key for item in workspace.store.list("checkpoints/")} == {item.key for item in record.checkpoints}


def test_a_failed_upload_commits_nothing(workspace: Workspace, cifar10: DatasetRef) -> None:
    class NoUploads(type(workspace.store)):  # type: ignore[misc]
        def upload(self, *_: Any, **__: Any) -> None:
            raise StorageError("the disk of the store is full")

    broken = NoUploads.__new__(NoUploads)
    broken.__dict__.update(workspace.store.__dict__)
    with pytest.raises(StorageError, match="full"):
        train(Workspace(broken, workspace.home, 60), cifar10)
    record, _ = runs.read_record(workspace.store, "run")
    assert (record.status, record.checkpoints) == ("failed", [])
