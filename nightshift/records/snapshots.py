"""The snapshots of a data set: which images there were on a night, and what was said of them.

A history names every snapshot of a data set, by compare-and-swap. A manifest says in brief what is in one, and which
shards it needs. The rows themselves, one an image, lie beside it as Parquet: `data.rows`.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from typing import ClassVar, Literal

from pydantic import Field

from nightshift import progress
from nightshift.errors import ObjectNotFoundError, SourceError, StorageError
from nightshift.ids import DatasetName, RunId, Sha256
from nightshift.records.keys import DATASETS, place_of
from nightshift.refs import Finding
from nightshift.storage import documents
from nightshift.storage.documents import MIB, Document, Part
from nightshift.storage.store import Store, Stored
from nightshift.values import MOST_CLASSES, ClassName, Count, ImageSize, Moment, Resize, Storage

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_IF_DAMAGED = "Bring an older version of it back, or make a new snapshot under another name"
HISTORY = "/history.json"


class Manifest(Document):
    """What is in a snapshot: numbers, and the objects that hold it."""

    title: ClassVar[str] = "manifest of a snapshot"
    if_damaged: ClassVar[str] = _IF_DAMAGED
    max_bytes: ClassVar[int] = 64 * MIB

    format: Literal[1] = 1
    name: DatasetName
    digest: Sha256
    test_digest: Sha256
    """Of the test split alone."""
    image_size: ImageSize
    resize: Resize
    storage: Storage = "pixels"
    images: Count
    splits: dict[Split, Count]
    classes: dict[ClassName, Count] = Field(max_length=MOST_CLASSES)
    """Images of each class, over all splits."""
    refused: Count
    shards: list[Sha256]

    def check(self, key: str) -> None:
        if key != manifest_key(self.name, self.digest):
            raise ValueError("it is the manifest of another snapshot")


class Entry(Part):
    """A snapshot in its data set's history, and how it differs from the one before."""

    digest: Sha256
    at: Moment
    images: Count
    classes: Count
    added: Count
    removed: Count
    relabelled: Count
    refused: Count
    read: Count
    findings: list[Finding] = Field(default_factory=list, max_length=100)

    @property
    def ok(self) -> bool:
        """Whether no rule that stops the night is broken."""
        return all(finding.ok for finding in self.findings)


class Trained(Part):
    """What the last finished run was made of: with the same again, there is nothing to train."""

    run_id: RunId
    snapshot: Sha256
    config_digest: Sha256

    def is_of(self, snapshot: str, config_digest: str) -> bool:
        return (self.snapshot, self.config_digest) == (snapshot, config_digest)


class History(Document):
    """All snapshots of a data set, oldest first."""

    title: ClassVar[str] = "history of a data set"
    if_damaged: ClassVar[str] = _IF_DAMAGED
    max_bytes: ClassVar[int] = 64 * MIB

    format: Literal[1] = 1
    name: DatasetName
    entries: list[Entry] = Field(default_factory=list)
    trained: Trained | None = None

    def check(self, key: str) -> None:
        if key != history_key(self.name):
            raise ValueError("it is the history of another data set")

    @property
    def newest(self) -> Entry | None:
        return self.entries[-1] if self.entries else None

    @property
    def accepted(self) -> Entry | None:
        """The newest snapshot that was fit to train on. Tonight's is compared with it, and with no broken one."""
        return next((entry for entry in reversed(self.entries) if entry.ok), None)

    def find(self, digest: str) -> Entry:
        """The entry whose digest begins so; raises SourceError, which says what there is, if it is not exactly one."""
        known = dict.fromkeys(entry.digest for entry in self.entries)
        found = [name for name in known if digest and name.startswith(digest)]
        if len(found) != 1:
            newest = ", ".join(entry.digest[:12] for entry in self.entries[-5:])
            raise SourceError(
                f"{digest!r} is {'the beginning of several snapshots' if found else 'no snapshot'} of {self.name}. "
                f"The newest are: {newest or 'none'}"
            )
        return next(entry for entry in reversed(self.entries) if entry.digest == found[0])


def unnamed(
    store: Store, is_old: Callable[[Stored], bool], without: Collection[tuple[str, str]] = frozenset()
) -> list[Stored]:
    """The old objects under `datasets/` that no history names: what interrupted snapshots have left.

    `without`: name and digest of snapshots that count as named no more.

    While any part is not old, a snapshot may be about to name any shard, so all objects stay. They also stay if a
    history or a manifest cannot be read.
    """
    by_kind = defaultdict[str, list[Stored]](list)
    for item in store.list(DATASETS):
        if place := place_of(item.key):
            by_kind[place.kind].append(item)
    parts, shards = by_kind["part"], by_kind["shard"]
    try:
        histories = [
            read_history(store, item.key.split("/")[1]) for item in by_kind["snapshot"] if item.key.endswith(HISTORY)
        ]
        named = {(history.name, entry.digest) for history in histories for entry in history.entries} - set(without)
        needed = {digest for name, snapshot in named for digest in read_manifest(store, name, snapshot).shards}
    except (StorageError, SourceError) as error:
        progress.current().warn(f"snapshots and their shards are left alone: {error}")
        return []
    if not all(map(is_old, parts)):
        return []
    loose = [
        item
        for item in by_kind["snapshot"]
        if not item.key.endswith(HISTORY) and (item.key.split("/")[1], _digest_of(item.key)) not in named
    ]
    return [item for item in [*parts, *loose, *(s for s in shards if _digest_of(s.key) not in needed)] if is_old(item)]


def _digest_of(key: str) -> str:
    return key.rpartition("/")[2].partition(".")[0]


def history_key(name: str) -> str:
    return f"{DATASETS}{name}{HISTORY}"


def manifest_key(name: str, digest: str) -> str:
    return f"{DATASETS}{name}/snapshots/{digest}.json"


def rows_key(name: str, digest: str) -> str:
    return f"{DATASETS}{name}/snapshots/{digest}.parquet"


def part_key(name: str, digest: str) -> str:
    """Of rows that were read for a snapshot which is not complete yet."""
    return f"{DATASETS}{name}/parts/{digest}.parquet"


def shard_key(digest: str) -> str:
    return f"{DATASETS}shards/{digest}"


def read_history(store: Store, name: str) -> History:
    """A data set's history, empty if there is none yet.

    Raises:
        DocumentDamagedError, StorageError: it cannot be read.
    """
    try:
        return documents.read(store, history_key(name), History)[0]
    except ObjectNotFoundError:
        return History(name=name)


def read_manifest(store: Store, name: str, digest: str) -> Manifest:
    """Raises SourceError if there is no such snapshot, DocumentDamagedError or StorageError if it cannot be read."""
    key = manifest_key(name, digest)
    try:
        return documents.read(store, key, Manifest)[0]
    except ObjectNotFoundError:
        raise SourceError(f"there is no snapshot {digest[:12]} of {name}: {store.url(key)} is gone") from None


def write_manifest(store: Store, manifest: Manifest) -> None:
    """Store a manifest. What another machine has written of the same snapshot is as good."""
    documents.change(store, manifest_key(manifest.name, manifest.digest), Manifest, lambda found: found or manifest)


def append(store: Store, name: str, entry: Entry) -> History:
    """Add a snapshot to its data set's history, unless the newest is the same and the rules say the same of it."""

    def change(found: History | None) -> History:
        history = found or History(name=name)
        newest = history.newest
        if newest and (newest.digest, newest.findings) == (entry.digest, entry.findings):
            return history
        return history.changed(entries=[*history.entries, entry])

    return documents.change(store, history_key(name), History, change)


def forget(store: Store, name: str, digests: Collection[str]) -> None:
    """Take snapshots out of their data set's history; `unnamed` then finds what only they have stored.

    The newest, the one that tonight's is compared with, and the one trained last stay.
    """

    def change(found: History | None) -> History | None:
        if not found:
            return None
        kept = needed(found)
        return found.changed(
            entries=[entry for entry in found.entries if entry.digest in kept or entry.digest not in digests]
        )

    documents.change(store, history_key(name), History, change)


def needed(history: History) -> set[str]:
    """The snapshots that the next night needs."""
    entries = [entry.digest for entry in (history.newest, history.accepted) if entry]
    return {*entries, *([history.trained.snapshot] if history.trained else [])}


def note_trained(store: Store, name: str, trained: Trained) -> None:
    """Note what the last finished run was made of."""
    documents.change(
        store, history_key(name), History, lambda found: (found or History(name=name)).changed(trained=trained)
    )
