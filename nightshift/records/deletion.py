"""Deleting a run with everything that belongs to it: record, checkpoints, metrics, report, published versions.

First the record is marked under a fencing token of its own, so that no earlier trainer goes on and nobody recovers it.
Then the cards go, then the record, and then what nothing names any more. Whoever is interrupted leaves a run that can
be deleted again, or orphans, which `gc` finds.
"""

from collections.abc import Iterable
from datetime import timedelta

from nightshift import processes
from nightshift.errors import RunInUseError, RunNotFoundError
from nightshift.records.history import read_copy, read_history
from nightshift.records.keys import MODELS, PAYLOADS, RECORDS, REPORTS, place_of, record_key
from nightshift.records.lease import is_live
from nightshift.records.rebuild import check_never_begun
from nightshift.records.run import dataset_of, read_record, write_record
from nightshift.refs import DatasetRef
from nightshift.storage import documents
from nightshift.storage.store import Contents, Store, Stored


class Belongings(Contents):
    """All that the store has of a run, in the order in which it is deleted."""


def belongings(store: Store, run_id: str) -> Belongings:
    """What belongs to a run, if it may be deleted.

    Raises:
        RunNotFoundError: there is nothing of such a run.
        RunInUseError: it is being trained, or a history of champions names its version.
        HistoryLostError, DocumentDamagedError: nobody can say whether it is or was champion, or whether it is live.
        StorageError: the store cannot be read.
    """
    return _belongings(store, run_id, [MODELS])


def delete(store: Store, run_id: str) -> Belongings:
    """Delete what belongs to a run, and return it. It may be interrupted and done again.

    Raises:
        StorageError: not all was deleted. Also as `belongings`, which then has deleted nothing.
    """
    before, dataset = belongings(store, run_id), dataset_of(store, run_id)
    _mark(store, run_id)
    # What a trainer that was thought dead has written until then. It publishes under no other name.
    names = _names(before.objects, dataset)
    found = _belongings(store, run_id, [f"{MODELS}{name}/{run_id}/" for name in names])
    for item in found.objects:
        store.delete(item.key)
    for upload in found.uploads:
        store.abort_upload(upload)
    return found


def _belongings(store: Store, run_id: str, models: list[str]) -> Belongings:
    """As `belongings`; `models`: the prefixes below which there may be versions of it."""
    places = (record_key(run_id), f"{PAYLOADS}{run_id}/", f"{REPORTS}{run_id}/", *models)
    objects = [item for prefix in places for item in store.list(prefix) if _is_of(run_id, item.key)]
    uploads = [upload for prefix in places for upload in store.list_uploads(prefix) if _is_of(run_id, upload.key)]
    if not objects and not uploads:
        raise RunNotFoundError(
            f"there is nothing of a run {run_id!r} in {store.url('')}: `nightshift runs` lists those there are"
        )
    is_stored = any(item.key.startswith(RECORDS) for item in objects)
    record = read_record(store, run_id)[0] if is_stored else None
    # Its version may have gone live and be lost. Then the checkpoint is all that makes it again.
    for name in _names(objects, record.dataset if record else None):
        _check_never_live(store, name, run_id)
    if record and is_live(record.lease, store.now()):
        raise RunInUseError(
            f"run {run_id} is being trained by {record.lease.owner} until "
            f"{record.lease.expires_at:%Y-%m-%d %H:%M:%S} UTC at least: stop it first"
        )
    return Belongings(sorted(objects, key=lambda item: (_order(item.key), item.key)), uploads)


def _mark(store: Store, run_id: str) -> None:
    """Write into the record that the run is deleted, and take its lease away from whoever had it."""
    writer = processes.new_writer_id()

    def once() -> None:
        record, etag = read_record(store, run_id)
        now = store.now()
        if is_live(record.lease, now):
            raise RunInUseError(f"run {run_id} was taken up by {record.lease.owner} just now, and is left alone")
        lease = record.lease.changed(
            owner=writer, process="", token=record.lease.token + 1, expires_at=now - timedelta(seconds=1)
        )
        marked = record.changed(status="cancelled", lease=lease, sequence=record.sequence + 1, updated_at=now)
        write_record(store, marked.with_event("deleted", now, f"by {processes.user_at_host()}"), etag)

    if store.head(record_key(run_id)):  # else an earlier deletion was interrupted after it
        documents.settled(store.url(record_key(run_id)), once)


def _check_never_live(store: Store, name: str, version: str) -> None:
    history = read_history(store, name)
    if not history.transitions:
        check_never_begun(store, name)
    if version in {*history.versions, *read_copy(store, name).versions}:
        is_live_now = history.champion and history.champion.version == version
        raise RunInUseError(
            f"{version} {'is' if is_live_now else 'was'} champion of {name}, and a champion is never deleted: somebody "
            "may roll back to it"
        )


def _names(objects: Iterable[Stored], dataset: DatasetRef | None) -> list[str]:
    """Of which models there are versions among these, or may have been, by the data set of the run."""
    of_versions = {item.key.split("/")[1] for item in objects if item.key.startswith(MODELS)}
    return sorted(of_versions | ({dataset.name} if dataset else set()))


def _is_of(run_id: str, key: str) -> bool:
    place = place_of(key)
    return place is not None and place.run_id == run_id


def _order(key: str) -> int:
    """Cards, the record, the rest: a version without a card is none, and what no record names is an orphan."""
    return 0 if key.endswith("/card.json") else 1 if key.startswith(RECORDS) else 2
