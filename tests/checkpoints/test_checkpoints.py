"""Payloads are verified on the way back; what cannot be used is skipped by name."""

import hashlib
import io
import math
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nightshift.checkpoints.payload import read_payload
from nightshift.checkpoints.restore import restore_newest
from nightshift.checkpoints.retention import retained
from nightshift.checkpoints.verify import verify_checkpoints
from nightshift.errors import CheckpointCorruptError, StorageError
from nightshift.records.run import Checkpoint, RunRecord, read_record
from nightshift.refs import DatasetRef
from nightshift.storage.store import Store
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.checkpoints.conftest import resume, run_with_checkpoints, train, train_in_parts
from tests.conftest import small_config
from tests.stores import Faulty


def overwrite(workspace: Workspace, key: str, change: Callable[[bytes], bytes]) -> None:
    workspace.store.put(key, change(workspace.store.get(key)[0]))


def flip_one_bit(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


def test_the_newest_checkpoint_is_restored_without_a_warning(
    workspace: Workspace, cifar10: DatasetRef, record: RunRecord
) -> None:
    resumed, warnings = resume(workspace, cifar10)
    assert (resumed.resumed_from_step, warnings) == (15, [])


DAMAGE: dict[str, Callable[[bytes], bytes] | None] = {
    "its sha256": flip_one_bit,
    "bytes instead of": lambda body: body[:-1],
    "missing": None,
}


def damage(workspace: Workspace, key: str, reason: str) -> None:
    change = DAMAGE[reason]
    if change:
        overwrite(workspace, key, change)
    else:
        workspace.store.delete(key)


@pytest.mark.parametrize("reason", DAMAGE)
def test_a_damaged_newest_checkpoint_is_skipped_by_name(
    workspace: Workspace, cifar10: DatasetRef, record: RunRecord, reason: str
) -> None:
    newest = record.checkpoints[-1].key
    damage(workspace, newest, reason)
    resumed, warnings = resume(workspace, cifar10)
    assert resumed.resumed_from_step == 10
    assert len(warnings) == 1
    skips = [event.detail for event in resumed.events if event.what == "skipped"]
    assert len(skips) == 1
    for told in (warnings[0], skips[0]):
        assert newest in told
        assert reason in told


def test_a_run_whose_newest_three_of_five_are_damaged_resumes_from_the_fourth_back_to_the_same_bits(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    whole = train_in_parts(workspace, cifar10, 3, 6, 9, 12, keep_last=5)
    expected = state_sha256(read_payload(workspace.store, whole))
    before, _ = read_record(workspace.store, "run")
    assert [checkpoint.step for checkpoint in before.checkpoints] == [3, 6, 9, 12, 15]
    for checkpoint, reason in zip(before.checkpoints[2:], DAMAGE, strict=True):
        damage(workspace, checkpoint.key, reason)
    resumed, warnings = resume(workspace, cifar10)
    assert resumed.resumed_from_step == 6
    assert [event.step for event in resumed.events if event.what == "resumed"][-1] == 6
    assert len(warnings) == 3
    assert [(event.step, event.detail.partition(":")[0]) for event in resumed.events if event.what == "skipped"] == [
        (checkpoint.step, checkpoint.key) for checkpoint in before.checkpoints[2:]
    ]
    assert state_sha256(read_payload(workspace.store, resumed.checkpoints[-1])) == expected


def test_a_run_all_of_whose_checkpoints_are_damaged_begins_anew_says_so_and_ends_with_the_same_bits(
    workspace: Workspace, cifar10: DatasetRef, record: RunRecord
) -> None:
    expected = state_sha256(read_payload(workspace.store, record.checkpoints[-1]))
    for checkpoint in record.checkpoints:
        overwrite(workspace, checkpoint.key, flip_one_bit)
    resumed, warnings = resume(workspace, cifar10)
    assert resumed.resumed_from_step is None
    assert [message for message in warnings if "begins anew" in message]
    assert state_sha256(read_payload(workspace.store, resumed.checkpoints[-1])) == expected


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
        read_payload(workspace.store, forged)
    assert not trap.exists()
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert trap.exists(), "the trap itself does not work"


def test_verify_names_each_bad_checkpoint_and_its_reason(workspace: Workspace, record: RunRecord) -> None:
    assert [bad for _, bad in verify_checkpoints(workspace.store, record)] == [None, None, None]
    overwrite(workspace, record.checkpoints[1].key, flip_one_bit)
    verdicts = [bad for _, bad in verify_checkpoints(workspace.store, record)]
    assert [bad.key for bad in verdicts if bad] == [record.checkpoints[1].key]


def test_only_the_newest_checkpoints_are_kept_in_record_and_store(workspace: Workspace, cifar10: DatasetRef) -> None:
    train_in_parts(workspace, cifar10, 3, 6, 9, 12, keep_last=2)
    record, _ = read_record(workspace.store, "run")
    assert [checkpoint.step for checkpoint in record.checkpoints] == [12, 15]
    assert {item.key for item in workspace.store.list("checkpoints/")} == {item.key for item in record.checkpoints}


def checkpoint(step: int, loss: float | None = None) -> Checkpoint:
    """One of a run of ten steps an epoch; `loss` of its last whole epoch."""
    metrics = {"train_seconds": 1.0} if loss is None else {"train_seconds": 1.0, "epoch_loss": loss}
    now = datetime.now(UTC)
    key = f"checkpoints/run/{step}-1.pt"
    return Checkpoint(step=step, epoch=step // 10, key=key, bytes=1, sha256="0" * 64, written_at=now, metrics=metrics)


def kept_steps(stored: list[Checkpoint], **overrides: Any) -> list[int]:
    return [kept.step for kept in retained(stored, small_config(**overrides).saving)]


def test_the_best_checkpoint_is_kept_beside_the_newest() -> None:
    stored = [checkpoint(5), checkpoint(10, 0.9), checkpoint(20, 0.3), checkpoint(30, 0.5), checkpoint(40, 0.4)]
    assert kept_steps(stored, keep_last=1) == [20, 40]
    assert kept_steps(stored, keep_last=1, keep_best=False) == [40]


def test_the_first_checkpoint_after_every_so_many_epochs_is_kept() -> None:
    stored = [checkpoint(step) for step in range(4, 80, 4)]
    assert kept_steps(stored, keep_last=1, keep_every_epochs=2) == [20, 40, 60, 76]


@given(
    losses=st.lists(st.one_of(st.none(), st.floats(0, 9)), min_size=1, max_size=20),
    keep_last=st.integers(1, 5),
    keep_best=st.booleans(),
    keep_every_epochs=st.one_of(st.none(), st.integers(1, 9)),
)
def test_the_newest_checkpoint_survives_any_retention(
    losses: list[float | None], keep_last: int, keep_best: bool, keep_every_epochs: int | None
) -> None:
    stored = [checkpoint(3 * number, loss) for number, loss in enumerate(losses)]
    kept = kept_steps(stored, keep_last=keep_last, keep_best=keep_best, keep_every_epochs=keep_every_epochs)
    assert kept[-1] == stored[-1].step
    assert kept == sorted(kept)


def test_a_failed_upload_commits_nothing(workspace: Workspace, cifar10: DatasetRef) -> None:
    class NoUploads(type(workspace.store)):  # type: ignore[misc]
        def upload(self, *_: Any, **__: Any) -> None:
            raise StorageError("the disk of the store is full")

    broken = NoUploads.__new__(NoUploads)
    broken.__dict__.update(workspace.store.__dict__)
    with pytest.raises(StorageError, match="full"):
        train(Workspace(broken, workspace.home, 60, 0), cifar10)
    record, _ = read_record(workspace.store, "run")
    assert (record.status, record.checkpoints) == ("interrupted", [])


def test_a_store_that_fails_at_every_checkpoint_ends_the_run_with_nothing_dropped(store: Store) -> None:
    """One throttled GET counted as damage, and cost the newest checkpoint for good."""
    run = run_with_checkpoints(store)
    faulty = Faulty(store)
    faulty.fail("download", StorageError("503 Slow Down"), times=math.inf)
    run.store = faulty
    with pytest.raises(StorageError, match="503"):
        restore_newest(run, retry_seconds=0)
    assert [checkpoint.step for checkpoint in read_record(store, "run")[0].checkpoints] == [1, 2]


def test_a_store_that_fails_for_a_while_is_asked_again_and_costs_no_step(store: Store) -> None:
    run = run_with_checkpoints(store)
    faulty = Faulty(store)
    faulty.fail("download", StorageError("503 Slow Down"), times=2)
    run.store = faulty
    found = restore_newest(run, retry_seconds=30)
    assert found
    assert found[0].step == 2
    assert run.record.events[-1].what != "skipped"


def test_what_the_store_cannot_read_is_passed_over_and_stays_in_the_record(store: Store) -> None:
    """Some stores answer 500 forever for an object in which a bit has flipped."""
    run = run_with_checkpoints(store)
    faulty = Faulty(store)
    faulty.fail("download", StorageError("500 InternalError"), key="checkpoints/run/2-", times=math.inf)
    run.store = faulty
    found = restore_newest(run, retry_seconds=0)
    assert found
    assert found[0].step == 1
    record, _ = read_record(store, "run")
    assert [checkpoint.step for checkpoint in record.checkpoints] == [1, 2]
    assert (record.resumed_from_step, record.events[-1].what) == (1, "skipped")
