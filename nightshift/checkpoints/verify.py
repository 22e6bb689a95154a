"""Reading every checkpoint of a run back."""

from collections.abc import Callable, Iterator

from nightshift.checkpoints.payload import Payload, read_payload
from nightshift.checkpoints.restore import UnusableCheckpoint
from nightshift.errors import CheckpointCorruptError, StorageError, StorageUnreachableError
from nightshift.records.run import Checkpoint, RunRecord
from nightshift.storage.store import Store


def verify_checkpoints(
    store: Store, record: RunRecord, check: Callable[[Payload], object] | None = None
) -> Iterator[tuple[Checkpoint, UnusableCheckpoint | None]]:
    """Read every checkpoint of a run back, one after the other, and say which are bad; `check` as of `read_payload`.

    Raises:
        StorageUnreachableError: the store does not answer.
    """
    for checkpoint in record.checkpoints:
        try:
            read_payload(store, checkpoint, check)
        except StorageUnreachableError:
            raise
        except (CheckpointCorruptError, StorageError) as error:
            yield checkpoint, UnusableCheckpoint(checkpoint.key, str(error))
        else:
            yield checkpoint, None
