"""Letting go of what grows with the nights: runs with all they have stored, sweeps, and snapshots.

Nothing goes that is live, and no version that may be needed: the champion, those before it, and those of the last
thirty nights, with which the gate compares. A version that once was live is first retired in its history, by
compare-and-swap, so that nobody can roll back to it while it is deleted. A snapshot goes once no stored run names it.

If a cleanup is interrupted, the next one continues it: what is half deleted is found again, here or as orphans.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import TypeVar

from nightshift import progress
from nightshift.errors import NightshiftError, StorageDeniedError, StorageError, StorageUnreachableError
from nightshift.records import deletion, index, orphans, snapshots
from nightshift.records.history import History, history_key, keep_copy, read_history
from nightshift.records.keys import DATASETS, MODELS, PAYLOADS, RECORDS, REPORTS, SWEEPS, place_of
from nightshift.records.lease import is_live
from nightshift.records.orphans import Orphans
from nightshift.records.rebuild import check_never_begun
from nightshift.records.run import RunRecord, newest_records
from nightshift.settings import KeepSettings
from nightshift.storage import documents
from nightshift.storage.store import Contents, Store, Stored

T = TypeVar("T")
CHAMPIONS = 10
"""So many of the last champions stay, whatever their age."""
_COMPARED = timedelta(days=30)


@dataclass(frozen=True)
class Spent:
    """What is kept no longer."""

    runs: dict[str, list[Stored]] = field(default_factory=dict)
    """Of each run all that it has stored."""
    sweeps: list[Stored] = field(default_factory=list)
    snapshots: list[tuple[str, str]] = field(default_factory=list)
    """Name of the data set, and digest."""
    retired: list[tuple[str, str]] = field(default_factory=list)
    """Name of the model and version, of those runs that once were live."""

    @property
    def objects(self) -> list[Stored]:
        return [item for items in self.runs.values() for item in items] + self.sweeps


def find(store: Store, keep: KeepSettings) -> Spent:
    """What the settings keep no longer. What cannot be read is left alone, with a warning.

    Raises:
        StorageError: the store cannot be listed.
    """
    if not (keep.nights or keep.models or keep.snapshots):
        return Spent()
    now = store.now()
    records = list(newest_records(store))
    once_live: dict[str, Collection[str]] = {}
    spent: dict[str, RunRecord] = {}
    for name, of_name in _grouped((record.dataset.name, record) for record in records).items():
        try:
            history = read_history(store, name)
            if not history.transitions:
                check_never_begun(store, name)
        except StorageError as error:
            progress.current().warn(f"the runs of {name} are left alone: {error}")
            continue
        once_live[name] = history.versions
        kept = _needed(history, now)
        spent |= {record.run_id: record for record in _spent(of_name, keep, now) if record.run_id not in kept}
    of_run = defaultdict[str, list[Stored]](list)
    for prefix in (RECORDS, PAYLOADS, REPORTS, MODELS):
        for item in store.list(prefix):
            if (place := place_of(item.key)) and place.run_id in spent:
                of_run[place.run_id].append(item)
    return Spent(
        runs=dict(of_run),
        sweeps=[item for item in store.list(SWEEPS) if place_of(item.key) and _is_old(item.modified, keep, now)],
        snapshots=list(_snapshots(store, keep, now, [record for record in records if record.run_id not in spent])),
        retired=[
            (record.dataset.name, record.run_id)
            for record in spent.values()
            if record.run_id in once_live[record.dataset.name]
        ],
    )


def tidy(store: Store, keep: KeepSettings, older_than: timedelta, dry_run: bool = False) -> tuple[Spent, Contents]:
    """Delete what is kept no longer, then all orphans of this age, and bring the index of runs up to date.

    Returns both; the second with all that is deleted.

    Raises:
        StorageError: the store cannot be listed, or an object not be deleted.
    """
    spent = find(store, keep)
    if dry_run:
        found = orphans.find(store, older_than, set(spent.snapshots))
        return spent, Orphans(_merged(spent.objects, found.objects), found.uploads)
    gone = _let_go(store, spent)
    collected = orphans.collect(store, orphans.find(store, older_than))
    index.renew(store)
    return spent, Orphans(_merged(gone, collected.objects), collected.uploads)


def _let_go(store: Store, spent: Spent) -> list[Stored]:
    for name, versions in _grouped(spent.retired).items():
        _retire(store, name, versions)
    gone: list[Stored] = []
    for run_id in list(spent.runs):
        try:
            gone += deletion.delete(store, run_id).objects
        except (StorageUnreachableError, StorageDeniedError):
            raise
        except NightshiftError as error:  # it was taken up again, or made champion, since
            progress.current().warn(f"run {run_id} is left alone: {error}")
            del spent.runs[run_id]
    for item in spent.sweeps:
        store.delete(item.key)
    for name, digests in _grouped(spent.snapshots).items():
        snapshots.forget(store, name, digests)
    return gone + spent.sweeps


def _retire(store: Store, name: str, versions: Collection[str]) -> None:
    """Write into a model's history that these versions can be gone, but for those that are needed by now."""

    def change(found: History | None) -> History | None:
        if not found:
            return None
        kept = _needed(found, store.now())
        more = [version for version in versions if version in found.versions and version not in kept]
        return found.changed(retired=[*found.retired, *more])

    history = documents.change(store, history_key(name), History, change)
    if history:
        keep_copy(store, history)


def _needed(history: History, now: datetime) -> set[str]:
    """The versions that stay: the last champions, and those with which the gate compares."""
    transitions = [*history.transitions[-CHAMPIONS:], *history.live_since(now - _COMPARED)]
    return {entry.version for entry in transitions}


def _grouped(named: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    """What belongs to each name."""
    found = defaultdict[str, list[T]](list)
    for name, item in named:
        found[name].append(item)
    return found


def _is_old(moment: datetime, keep: KeepSettings, now: datetime) -> bool:
    return keep.nights is not None and now - moment > timedelta(days=keep.nights)


def _spent(records: list[RunRecord], keep: KeepSettings, now: datetime) -> Iterator[RunRecord]:
    """Those of a data set's records that are too old, or too many."""
    finished = sorted((record for record in records if record.result), key=lambda record: record.created_at)
    too_many = {record.run_id for record in finished[: -keep.models]} if keep.models else set()
    for record in records:
        if not is_live(record.lease, now) and (_is_old(record.updated_at, keep, now) or record.run_id in too_many):
            yield record


def _snapshots(store: Store, keep: KeepSettings, now: datetime, records: list[RunRecord]) -> Iterator[tuple[str, str]]:
    """The snapshots that no run needs, and that are too old or too many."""
    used = {(record.dataset.name, record.dataset.digest) for record in records}
    for item in store.list(DATASETS):
        if not item.key.endswith(snapshots.HISTORY) or not place_of(item.key):
            continue
        name = item.key.split("/")[1]
        try:
            history = snapshots.read_history(store, name)
        except StorageError as error:
            progress.current().warn(f"the snapshots of {name} are left alone: {error}")
            continue
        newest = {entry.digest: entry.at for entry in history.entries}
        in_order = list(dict.fromkeys(entry.digest for entry in reversed(history.entries)))
        too_many = set(in_order[keep.snapshots :]) if keep.snapshots else set()
        for digest in set(in_order) - snapshots.needed(history):
            if (name, digest) not in used and (digest in too_many or _is_old(newest[digest], keep, now)):
                yield name, digest


def _merged(*several: list[Stored]) -> list[Stored]:
    """Each object once."""
    return list({item.key: item for items in several for item in items}.values())
