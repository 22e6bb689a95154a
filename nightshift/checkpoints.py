"""Snapshot → serialize → upload → commit, and the way back.

A checkpoint exists when the run record names it, and not before: first the payload goes up under a key that
holds the step and the writer's fencing token, then the record is put by compare-and-swap. Whatever happens
in between leaves an orphan, never a damaged checkpoint. Retention drops from the record first and deletes
after.
"""

import hashlib
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nightshift import progress
from nightshift.errors import CheckpointCorruptError, ObjectNotFoundError, StorageError, StorageUnreachableError
from nightshift.refs import CheckpointRef
from nightshift.runs import Checkpoint, Run, RunRecord
from nightshift.s3 import S3
from nightshift.state import Payload, TrainState


def save(run: Run, state: TrainState, epoch: int, keep_last: int, train_seconds: float) -> CheckpointRef:
    """Store the state of this step and commit it; then delete what retention no longer keeps.

    Args:
        epoch: finished epochs.
        train_seconds: seconds trained so far, over all resumes.

    Raises:
        LeaseLostError: another trainer has taken the run over; nothing was committed.
        StorageError: it could not be stored.
    """
    buffer = io.BytesIO()
    torch.save(state.capture(), buffer)
    images = max(state.epoch_images, 1)
    checkpoint = Checkpoint(
        step=state.step,
        epoch=epoch,
        key=f"checkpoints/{run.run_id}/{state.step}-{run.token}.pt",
        bytes=buffer.getbuffer().nbytes,
        sha256=hashlib.sha256(buffer.getbuffer()).hexdigest(),
        written_at=run.store.now(),
        metrics={
            "loss": float(state.epoch_loss) / images,
            "accuracy": int(state.epoch_correct) / images,
            "train_seconds": train_seconds,
        },
    )
    curve = list(state.curve)
    buffer.seek(0)
    run.store.upload(checkpoint.key, buffer)
    before = run.record.checkpoints

    def commit(record: RunRecord) -> RunRecord:
        others = [known for known in record.checkpoints if known.key != checkpoint.key]
        return record.changed(checkpoints=[*others, checkpoint][-keep_last:], curve=curve)

    kept = {known.key for known in run.update(commit).checkpoints}
    for known in before:
        if known.key not in kept:
            run.store.delete(known.key)
    return run.record.ref(checkpoint)


def read(store: S3, checkpoint: Checkpoint | CheckpointRef) -> Payload:
    """A checkpoint's payload on the CPU, after its size and sha256 were found right.

    Nothing stored can execute: only tensors and plain values are accepted.

    Raises:
        CheckpointCorruptError: the object is missing, damaged, or not such a payload.
        StorageError: it cannot be read.
    """
    try:
        body = store.download_bytes(checkpoint.key)
    except ObjectNotFoundError as error:
        raise CheckpointCorruptError("the object is missing") from error
    if len(body) != checkpoint.bytes:
        raise CheckpointCorruptError(f"it has {len(body)} bytes instead of {checkpoint.bytes}")
    if hashlib.sha256(body).hexdigest() != checkpoint.sha256:
        raise CheckpointCorruptError("its sha256 is not the recorded one")
    try:
        payload: Payload = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointCorruptError(
            f"refused, because it is not plain tensors and values: {str(error).splitlines()[0]}"
        ) from error
    return payload


def latest(store: S3, record: RunRecord) -> tuple[Checkpoint, Payload] | None:
    """The newest committed checkpoint that is whole, or None if the run has to begin anew.

    Each one skipped is warned of by name. Beginning anew costs time but not correctness: the same bits
    come out.

    Raises:
        StorageError: the store fails, and no older checkpoint can be read either.
    """
    failure: StorageError | None = None
    for checkpoint in reversed(record.checkpoints):
        try:
            return checkpoint, read(store, checkpoint)
        except StorageUnreachableError:
            raise
        except (CheckpointCorruptError, StorageError) as error:
            failure = error if isinstance(error, StorageError) else failure
            progress.current().warn(f"checkpoint {store.url(checkpoint.key)} is skipped: {error}")
    if failure:
        raise failure
    if record.checkpoints:
        progress.current().warn(f"run {record.run_id} has no usable checkpoint: it begins anew")
    return None


@dataclass(frozen=True)
class Bad:
    """A checkpoint that cannot be used, and why."""

    key: str
    reason: str


def verify(store: S3, record: RunRecord) -> Iterator[tuple[Checkpoint, Bad | None]]:
    """Read every checkpoint of a run back, one after the other, and say which are bad.

    Raises:
        StorageUnreachableError: the store does not answer.
    """
    for checkpoint in record.checkpoints:
        try:
            read(store, checkpoint)
        except StorageUnreachableError:
            raise
        except (CheckpointCorruptError, StorageError) as error:
            yield checkpoint, Bad(checkpoint.key, str(error))
        else:
            yield checkpoint, None
