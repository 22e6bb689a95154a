"""Reading every checkpoint of a run back."""

from collections.abc import Iterator

from nightshift.checkpoints.payload import read_payload
from nightshift.checkpoints.restore import UnusableCheckpoint
from nightshift.errors import CheckpointCorruptError, StorageError, StorageUnreachableError
from nightshift.records.run import Checkpoint, RunRecord
from nightshift.storage.store import Store


def verify_checkpoints(store: Store, record: RunRecord) -> Iterator[tuple[Checkpoint, UnusableCheckpoint | None]]:
    """Read every checkpoint of a run back, one after the other, and say which are bad.

    Raises:
        StorageUnreachableError: the store does not answer.
    """
    for checkpoint in record.checkpoints:
        try:
            read_payload(store, checkpoint)
        except StorageUnreachableError:
            raise
        except (CheckpointCorruptError, StorageError) as error:
            yield checkpoint, UnusableCheckpoint(checkpoint.key, str(error))
        else:
            yield checkpoint, None
