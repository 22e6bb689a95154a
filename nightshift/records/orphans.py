"""Objects that no record names: left behind by whoever was killed between an upload and its commit.

The store is listed first and the records are read after it, so that whatever was committed in between is seen. An
object under the token of a live lease may be about to be committed, and is left alone at any age. Only keys of exactly
our shapes are looked at: in a bucket without a prefix, all others are other people's.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from itertools import groupby

from nightshift import progress
from nightshift.errors import ModelNotFoundError, RunNotFoundError, StorageError
from nightshift.records import serving, snapshots
from nightshift.records.history import read_copy, read_history
from nightshift.records.keys import (
    DATASETS,
    MODELS,
    PAYLOADS,
    PROBES,
    RECORDS,
    REPORTS,
    SERVED,
    WEIGHTS,
    Kind,
    is_written_under,
    place_of,
    weights_key,
)
from nightshift.records.lease import is_live
from nightshift.records.parents import Parent
from nightshift.records.run import READERS, listed_records, read_record
from nightshift.records.versions import read_card
from nightshift.storage.store import Contents, Store, Stored

_A_MINUTE = timedelta(minutes=1)


class Orphans(Contents):
    """Objects and unfinished multipart uploads that nothing will ever ask for."""


def find(store: Store, older_than: timedelta, forgotten: Collection[tuple[str, str]] = frozenset()) -> Orphans:
    """All orphans that are at least as old as `older_than`; `forgotten`: snapshots that no longer count as named.

    The objects are:
    - payloads that no record names, and reports of runs without a record;
    - versions without a card, unless a run may still finish them or a history of champions names them;
    - weights that no run and no version began with;
    - models that a Triton repository no longer serves, probes of the store, and leftovers of interrupted snapshots.

    CIFAR-10 as an older nightshift has stored it is kept.

    Raises:
        StorageError: the store cannot be listed.
    """
    now = store.now()

    def old(prefix: str, kind: Kind, older_than: timedelta = older_than) -> list[Stored]:
        return [item for item in store.list(prefix) if now - item.modified >= older_than and _is(kind, item.key)]

    uploads = [
        upload
        for prefix in (PAYLOADS, MODELS, DATASETS, WEIGHTS)
        for upload in store.list_uploads(prefix)
        if now - upload.started >= older_than and place_of(upload.key)
    ]
    versions = [item for item in _without_card(store.list(MODELS)) if now - item.modified >= older_than]
    found = [*old(PAYLOADS, "payload"), *old(REPORTS, "report"), *versions]
    is_needed = _need_of_runs(store, [*(item.key for item in found), *(upload.key for upload in uploads)])
    return Orphans(
        # A probe is in use for milliseconds, and no lease protects it.
        objects=[item for item in found if not is_needed(item.key)]
        + old(PROBES, "probe", max(older_than, _A_MINUTE))
        + _begun_with_by_none(store, old(WEIGHTS, "weights"))
        + serving.replaced(store, old(SERVED, "served"))
        + snapshots.unnamed(store, lambda item: now - item.modified >= older_than, forgotten),
        uploads=[upload for upload in uploads if not is_needed(upload.key)],
    )


def collect(store: Store, orphans: Orphans) -> Orphans:
    """Delete those that still are orphans, and return them. It may be interrupted and done again.

    Each run's are looked at once more just before: since they were found, the run may have been resumed, and have
    published the same keys.
    """
    uploads, objects = [], []
    for upload in orphans.uploads:
        if not _need_of_runs(store, [upload.key])(upload.key):
            store.abort_upload(upload)
            uploads.append(upload)
    for _, of_run in groupby(orphans.objects, key=lambda item: item.key.rpartition("/")[0]):
        items = list(of_run)
        if _is("weights", items[0].key):
            items = _begun_with_by_none(store, items)
        is_needed = _need_of_runs(store, [item.key for item in items])
        for item in items:
            if not is_needed(item.key) and _is_as_found(store, item):
                store.delete(item.key)
                objects.append(item)
    return Orphans(objects, uploads)


def _is_as_found(store: Store, item: Stored) -> bool:
    now = store.head(item.key)
    folder = item.key.rpartition("/")[0]
    published = _is("version", item.key) and store.head(f"{folder}/card.json")
    return bool(now and (now.etag, now.modified) == (item.etag, item.modified) and not published)


def _need_of_runs(store: Store, keys: Iterable[str]) -> Callable[[str], bool]:
    """A function that says whether one of these keys is needed: named, or perhaps soon to be, by its run or a history.

    A version without a card is needed as long as its run can still publish it, or has.
    """

    def need_of(run_id: str) -> Callable[[str], bool]:
        try:
            record, _ = read_record(store, run_id)
        except RunNotFoundError:
            return lambda key: False
        except StorageError as error:
            progress.current().warn(f"what belongs to run {run_id} is left alone: {error}")
            return lambda key: True
        named = {checkpoint.key for checkpoint in record.checkpoints}
        live = is_live(record.lease, store.now())
        publishes = record.status not in ("failed", "cancelled")
        return lambda key: (
            key in named
            or _is("report", key)
            or (_is("version", key) and (live or publishes))
            or (live and is_written_under(key, record.lease.token))
        )

    keys = list(keys)
    run_ids = sorted({place.run_id for key in keys if (place := place_of(key)) and place.run_id})
    with ThreadPoolExecutor(READERS) as pool:
        needs = dict(zip(run_ids, pool.map(need_of, run_ids), strict=True))
    once_live = {name: _once_live(store, name) for name in {key.split("/")[1] for key in keys if _is("version", key)}}

    def is_needed(key: str) -> bool:
        place = place_of(key)
        if not place or not place.run_id:
            return False
        if place.kind == "version" and once_live[key.split("/")[1]](place.run_id):
            return True
        return needs[place.run_id](key)

    return is_needed


def _begun_with_by_none(store: Store, weights: list[Stored]) -> list[Stored]:
    """Those of these weights with which no run and no version began; none if a record or a card cannot be read."""
    if not weights:
        return []
    cards = [item.key.split("/")[1:3] for item in store.list(MODELS) if item.key.endswith("/card.json")]

    def of_run(item: Stored) -> Parent | None:
        with suppress(RunNotFoundError):
            return read_record(store, item.key.removeprefix(RECORDS).removesuffix(".json"))[0].parent
        return None

    def of_version(names: list[str]) -> Parent | None:
        with suppress(ModelNotFoundError):
            return read_card(store, *names).parent
        return None

    try:
        with ThreadPoolExecutor(READERS) as pool:
            parents = [*pool.map(of_run, listed_records(store)), *pool.map(of_version, cards)]
    except StorageError as error:
        progress.current().warn(f"the weights that runs have begun with are left alone: {error}")
        return []
    keys = {weights_key(parent.sha256) for parent in parents if parent and parent.sha256}
    return [item for item in weights if item.key not in keys]


def _once_live(store: Store, name: str) -> Callable[[str], bool]:
    """A function that says whether a version of this model is in its history of champions; all are if it is unreadable.

    If the history is missing, its copy counts. The runs of champions are finished, and so are needed anyway.
    """
    try:
        versions = {*read_history(store, name).versions, *read_copy(store, name).versions}
    except StorageError as error:
        progress.current().warn(f"the versions of {name} are left alone: {error}")
        return lambda version: True
    return versions.__contains__


def _is(kind: Kind, key: str) -> bool:
    place = place_of(key)
    return place is not None and place.kind == kind


def _without_card(models: Iterable[Stored]) -> Iterator[Stored]:
    """The files of versions whose card was never written."""
    ours = (item for item in models if _is("version", item.key))
    for _, files in groupby(ours, key=lambda item: item.key.rpartition("/")[0]):
        version = list(files)
        if not any(item.key.endswith("/card.json") for item in version):
            yield from version
