"""What `nightshift runs` shows of the runs that are over, in one object: their records need not be read.

An entry describes one version of a record, by its ETag. The listing shows the current ETag: an entry with another one
is ignored, and a record without an entry is read. So if the index is late, damaged or deleted, listing runs is slower
but never wrong. `gc` brings the index up to date.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from itertools import islice
from typing import ClassVar, Literal, Self

from pydantic import Field

from nightshift import progress
from nightshift.errors import (
    DocumentDamagedError,
    DocumentNewerError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StorageDeniedError,
    StorageError,
)
from nightshift.ids import RunId
from nightshift.records.keys import record_key
from nightshift.records.lease import status_of
from nightshift.records.run import RunRecord, Status, listed_records, newest_first, read_records
from nightshift.storage import documents
from nightshift.storage.documents import Document, Part
from nightshift.storage.store import Store, Stored
from nightshift.values import Count, Line, Moment, Share

KEY = "index/runs.json"
_OVER: tuple[Status, ...] = ("finished", "failed", "cancelled")
_WORTH = 100
"""The index is rewritten once this many runs lack an entry: reading them costs every later listing 0.2 s."""


class Overview(Part):
    """A run, as it is listed."""

    run_id: RunId
    etag: Line
    """Of the version of the record that says so."""
    status: Status | Literal["lost"]
    step: Count
    total_steps: Count
    test_accuracy: Share | None
    owner: Line
    updated_at: Moment

    @classmethod
    def of(cls, record: RunRecord, etag: str, now: datetime) -> Self:
        return cls(
            run_id=record.run_id,
            etag=etag,
            status=status_of(record, now),
            step=record.step,
            total_steps=record.total_steps,
            test_accuracy=record.test_accuracy,
            owner=record.lease.owner,
            updated_at=record.updated_at,
        )


class Index(Document):
    """The runs that were over when it was written."""

    title: ClassVar[str] = "index of runs"
    if_damaged: ClassVar[str] = "Nothing is lost: the records are read instead, and `nightshift gc` clears it away"
    max_bytes: ClassVar[int] = 64 * documents.MIB

    format: Literal[1] = 1
    runs: list[Overview] = Field(default_factory=list)


class Known:
    """The entries of the index, looked up by key and ETag as a listing shows them."""

    def __init__(self, store: Store) -> None:
        """Read the index. One that is missing, damaged, newer, or not ours to read knows nothing.

        Raises:
            StorageError: it cannot be read.
        """
        self.etag: str | None = None
        self.is_damaged = False
        found = Index()
        try:
            found, self.etag = documents.read(store, KEY, Index)
        except DocumentDamagedError as error:
            self.is_damaged = True
            progress.current().warn(str(error))
        except (ObjectNotFoundError, DocumentNewerError, StorageDeniedError):
            pass
        self._entries = {(record_key(entry.run_id), entry.etag): entry for entry in found.runs if entry.status in _OVER}

    def __len__(self) -> int:
        return len(self._entries)

    def split(self, stored: Iterable[Stored]) -> tuple[list[Overview], list[Stored]]:
        """The entries of these versions of records, and those that have none."""
        found = [(item, self._entries.get((item.key, item.etag))) for item in stored]
        return [entry for _, entry in found if entry], [item for item, entry in found if not entry]


def overviews(store: Store, limit: int) -> list[Overview]:
    """The runs last written to, newest first. A record that cannot be read is left out with a warning.

    Raises:
        StorageError: the store cannot be listed.
    """
    known, now = Known(store), store.now()

    def read(stored: list[Stored]) -> Iterator[Overview]:
        entries, unknown = known.split(stored)
        yield from entries
        yield from _read(store, unknown, now)

    return list(islice(newest_first(listed_records(store), read), limit))


def renew(store: Store) -> None:
    """Write the index anew if it lacks many of the runs that are over; their records are read for it.

    If it cannot be written, that is a warning: there may be no room, or policies of an older nightshift.

    Raises:
        StorageError: the store cannot be listed, or the index not be read.
    """
    known = Known(store)
    entries, unknown = known.split(listed_records(store))
    added: list[Overview] = []
    if len(unknown) >= _WORTH:
        added = [entry for entry in _read(store, unknown, store.now()) if entry.status in _OVER]
    try:
        if known.is_damaged:
            store.delete(KEY)
        if len(added) >= _WORTH:
            documents.write(store, KEY, Index(runs=[*entries, *added]), known.etag)
    except PreconditionFailedError:
        pass  # another gc has written it, or a newer nightshift
    except StorageError as error:
        progress.current().warn(f"the index of runs is not renewed: {error}")


def _read(store: Store, stored: list[Stored], now: datetime) -> Iterator[Overview]:
    for record, etag in read_records(store, stored):
        yield Overview.of(record, etag, now)
