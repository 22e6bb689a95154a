"""Restoring a run from its newest whole checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass

from nightshift import progress
from nightshift.checkpoints.payload import Payload, read_payload
from nightshift.errors import CheckpointCorruptError, StorageError, StorageUnreachableError
from nightshift.records.lease import Run
from nightshift.records.run import Checkpoint, RunRecord
from nightshift.storage.patience import patient


@dataclass(frozen=True)
class UnusableCheckpoint:
    """A checkpoint that cannot be used, and why."""

    key: str
    reason: str
    is_damaged: bool = True
    """Otherwise the store could not read it, which may pass."""


def restore_newest(
    run: Run, retry_seconds: float, check: Callable[[Payload], object] | None = None
) -> tuple[Checkpoint, Payload] | None:
    """The newest committed checkpoint that is whole, and its payload; None if the run has to start over.

    A warning and an event name each skipped checkpoint. Only a damaged one is dropped from the record: what comes
    after the restored step is written again. Starting over costs time but not correctness: the same bits come out.

    A store that fails is asked again for a while. If it then still cannot read a checkpoint but can read an older one,
    the run goes on from that: some stores answer 500 forever for an object in which a bit has flipped. The record goes
    on naming what could not be read.

    Args:
        retry_seconds: how long the store may fail at a checkpoint before an older one is tried.
        check: raises CheckpointCorruptError for a payload that the run's network cannot go on from: it is damaged too.

    Raises:
        LeaseLostError: another trainer has taken the run over.
        StorageError: the store fails, also at the older checkpoints. The record is as it was.
    """
    skipped: list[UnusableCheckpoint] = []
    failure: StorageError | None = None
    restored = None
    reading = patient(retry_seconds)
    for checkpoint in reversed(run.record.checkpoints):
        run.check()
        try:
            payload = reading(read_payload, run.store, checkpoint, check)
        except StorageUnreachableError:
            raise
        except (CheckpointCorruptError, StorageError) as error:
            is_damaged = isinstance(error, CheckpointCorruptError)
            failure = failure if isinstance(error, CheckpointCorruptError) else error
            skipped.append(UnusableCheckpoint(checkpoint.key, str(error), is_damaged))
            progress.current().warn(f"checkpoint {run.store.url(checkpoint.key)} is skipped: {error}")
        else:
            restored = checkpoint
            break
    if failure and not restored:
        raise failure
    if skipped and not restored:
        progress.current().warn(f"run {run.run_id} has no usable checkpoint: it begins anew")
    if restored or skipped:
        run.update(lambda record: _resumed(record, restored, skipped))
    return (restored, payload) if restored else None


def _resumed(record: RunRecord, restored: Checkpoint | None, skipped: list[UnusableCheckpoint]) -> RunRecord:
    reasons = {unusable.key: unusable.reason for unusable in skipped}
    for checkpoint in record.checkpoints:
        if checkpoint.key in reasons:
            detail = f"{checkpoint.key}: {reasons[checkpoint.key]}"
            record = record.with_event("skipped", record.updated_at, detail, checkpoint.step)
    damaged = {unusable.key for unusable in skipped if unusable.is_damaged}
    step = restored.step if restored else 0
    events = [
        event.changed(step=step) if event.what == "resumed" and event.owner == record.lease.owner else event
        for event in record.events
    ]
    return record.changed(
        events=events,
        resumed_from_step=restored.step if restored else None,
        checkpoints=[checkpoint for checkpoint in record.checkpoints if checkpoint.key not in damaged],
    )
