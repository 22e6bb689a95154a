"""Restoring a run from its newest whole checkpoint."""

from dataclasses import dataclass

from nightshift import progress
from nightshift.checkpoints.payload import Payload, read_payload
from nightshift.errors import CheckpointCorruptError, StorageError, StorageUnreachableError
from nightshift.records.lease import Run
from nightshift.records.run import Checkpoint, RunRecord


def restore_newest(run: Run) -> tuple[Checkpoint, Payload] | None:
    """The newest committed checkpoint that is whole, and its payload; None if the run has to start over.

    A warning names each skipped checkpoint, and the record drops it: what comes after the restored step is
    written again. Starting over costs time but not correctness: the same bits come out.

    Raises:
        LeaseLostError: another trainer has taken the run over.
        StorageError: the store fails, and no older checkpoint can be read either.
    """
    skipped: list[UnusableCheckpoint] = []
    failure: StorageError | None = None
    restored = None
    for checkpoint in reversed(run.record.checkpoints):
        try:
            payload = read_payload(run.store, checkpoint)
        except StorageUnreachableError:
            raise
        except (CheckpointCorruptError, StorageError) as error:
            failure = error if isinstance(error, StorageError) else failure
            skipped.append(UnusableCheckpoint(checkpoint.key, str(error)))
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


def _resumed(record: RunRecord, restored: Checkpoint | None, skipped: "list[UnusableCheckpoint]") -> RunRecord:
    reasons = {bad.key: bad.reason for bad in skipped}
    for checkpoint in record.checkpoints:
        if checkpoint.key in reasons:
            record = record.with_event("skipped", record.updated_at, f"{checkpoint.key}: {reasons[checkpoint.key]}")
    return record.changed(
        resumed_from_step=restored.step if restored else None,
        checkpoints=[checkpoint for checkpoint in record.checkpoints if checkpoint.key not in reasons],
    )


@dataclass(frozen=True)
class UnusableCheckpoint:
    """A checkpoint that cannot be used, and why."""

    key: str
    reason: str
