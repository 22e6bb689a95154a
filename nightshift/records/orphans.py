"""Objects that no record names: left behind by whoever was killed between an upload and its commit.

The store is listed first and the records are read after it, so that whatever was committed in between is seen. An
object under the token of a live lease may be about to be committed, and is left alone at any age.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

from nightshift import progress
from nightshift.errors import ConfigError, RunNotFoundError, StorageError
from nightshift.records.keys import PAYLOADS, REPORTS, is_written_under
from nightshift.records.lease import is_live
from nightshift.records.run import READERS, read_record
from nightshift.records.versions import MODELS
from nightshift.storage.store import Store, Stored, Upload

_PROBES = "probe/"


@dataclass(frozen=True)
class Orphans:
    """Objects and unfinished multipart uploads that nothing will ever ask for."""

    objects: list[Stored]
    uploads: list[Upload]

    @property
    def keys(self) -> list[str]:
        return [*(item.key for item in self.objects), *(upload.key for upload in self.uploads)]

    @property
    def bytes(self) -> int:
        return sum(item.size for item in self.objects)


def find(store: Store, older_than: timedelta) -> Orphans:
    """All orphans that are at least as old as `older_than`.

    The objects are payloads that no record names, reports of runs without a record, versions of a model without a
    card, and probes of the store. Data sets are a cache and stay.

    Raises:
        StorageError: the store cannot be listed.
    """
    before = store.now() - older_than

    def old(items: Iterable[Stored]) -> list[Stored]:
        return [item for item in items if item.modified <= before]

    uploads = [upload for upload in store.list_uploads("") if upload.started <= before]
    found = old([*store.list(PAYLOADS), *store.list(REPORTS), *_without_card(store.list(MODELS))])
    probes = old(store.list(_PROBES))
    is_needed = _need_of_runs(store, [*(item.key for item in found), *(upload.key for upload in uploads)])
    return Orphans(
        objects=[item for item in found if not is_needed(item.key)] + probes,
        uploads=[upload for upload in uploads if not is_needed(upload.key)],
    )


def collect(store: Store, orphans: Orphans) -> None:
    """Delete them. It may be interrupted and done again: none of them is ever named by anything."""
    for upload in orphans.uploads:
        store.abort_upload(upload)
    for item in orphans.objects:
        store.delete(item.key)


def _need_of_runs(store: Store, keys: Iterable[str]) -> Callable[[str], bool]:
    """A function of these keys: whether the run a key belongs to names it, or may be about to."""

    def need_of(run_id: str) -> Callable[[str], bool]:
        try:
            record, _ = read_record(store, run_id)
        except RunNotFoundError:
            return lambda key: False
        except (StorageError, ConfigError) as error:
            progress.current().warn(f"what belongs to run {run_id} is left alone: {error}")
            return lambda key: True
        named = {checkpoint.key for checkpoint in record.checkpoints}
        live = is_live(record.lease, store.now())
        return lambda key: (
            key in named
            or key.startswith(REPORTS)
            or (live and (key.startswith(MODELS) or is_written_under(key, record.lease.token)))
        )

    run_ids = sorted({run_id for key in keys if (run_id := _run_id_in(key))})
    with ThreadPoolExecutor(READERS) as pool:
        needs = dict(zip(run_ids, pool.map(need_of, run_ids), strict=True))
    return lambda key: (run_id := _run_id_in(key)) in needs and needs[run_id](key)


def _run_id_in(key: str) -> str:
    """The run id in `checkpoints/<run_id>/…`, `reports/<run_id>/…` or `models/<name>/<run_id>/…`; else nothing."""
    parts = key.split("/")
    if key.startswith((PAYLOADS, REPORTS)):
        return parts[1]
    return parts[2] if key.startswith(MODELS) and len(parts) > 3 else ""


def _without_card(models: Iterable[Stored]) -> Iterator[Stored]:
    """The files of versions whose card was never written; the champion pointers are not files of a version."""
    for _, files in groupby(models, key=lambda item: item.key.rpartition("/")[0]):
        version = list(files)
        if _run_id_in(version[0].key) and not any(item.key.endswith("/card.json") for item in version):
            yield from version
