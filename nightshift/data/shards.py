"""Shards on this machine's disk: fetched when they are needed, and the least recently used deleted when they are many.

They lie in NIGHTSHIFT_HOME/shards, by their sha256, for all processes of the machine. One that is in use may be
deleted: whoever has opened it keeps it.
"""

import hashlib
import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from pathlib import Path
from threading import Event, Lock
from typing import IO

from filelock import FileLock

from nightshift import progress
from nightshift.disk import complete_file
from nightshift.errors import (
    DISK_IS_FULL,
    DataCorruptError,
    DiskError,
    ObjectNotFoundError,
    ObjectTooLargeError,
)
from nightshift.records import snapshots
from nightshift.storage.patience import patient
from nightshift.storage.store import Store
from nightshift.workspace import Workspace

MAX_BYTES = 1024**3
"""Of a shard."""
_FETCHED_AT_ONCE = 2
_SHA256_DIGITS, _STALE_SECONDS = 64, 3600
_OPEN = 32
"""How many shards a process has open at most. One that was deleted takes room as long as it is."""


def fetch(store: Store, digest: str, into: IO[bytes]) -> None:
    """Write a shard to an empty file. One that arrives damaged is fetched a second time.

    Raises:
        DataCorruptError: it is gone, or damaged.
        StorageError: it cannot be read.
    """
    key = snapshots.shard_key(digest)
    for _ in range(2):
        into.seek(0)
        into.truncate()
        try:
            store.download(key, into, max_bytes=MAX_BYTES)
        except (ObjectNotFoundError, ObjectTooLargeError) as error:
            raise DataCorruptError(f"{error}: bring an older version of it back, or make a new snapshot") from error
        into.seek(0)
        if hashlib.file_digest(into, "sha256").hexdigest() == digest:  # type: ignore[arg-type]
            return
        progress.current().warn(f"{store.url(key)} arrived damaged")
    raise DataCorruptError(f"{store.url(key)} is damaged: bring an older version of it back")


class Shard:
    """A shard as an open file, which is closed when nobody has it any more."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError):  # it could not be opened
            os.close(self._file)

    def touch(self) -> None:
        """So that it is not the next to be deleted."""
        os.utime(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """So many bytes, or as many as there are; raises OSError if the disk cannot read them."""
        return os.pread(self._file, length, offset)


class Shards:
    """The shards of a store, as open files. Safe to use from several threads."""

    def __init__(self, workspace: Workspace) -> None:
        self._store, self._folder = workspace.store, workspace.home / "shards"
        self._max_bytes = int(workspace.cache_gigabytes * 1e9)
        self._patience = workspace.save_retry_seconds
        self._pool = ThreadPoolExecutor(_FETCHED_AT_ONCE, "shards")
        self._opened: OrderedDict[str, Future[Shard]] = OrderedDict()
        self._stopped = Event()
        self._lock = Lock()
        self._context = copy_context()  # whoever shows warnings shows those of the threads too

    def expect(self, digests: Iterable[str]) -> None:
        """Begin to fetch those that are not here. Nothing is raised; `open` will."""
        for digest in digests:
            self._begin(digest)

    def open(self, digest: str) -> Shard:
        """A shard. A store that does not answer and a disk without room are waited for.

        Raises:
            DataCorruptError: it is gone, or damaged.
            DiskError, StorageError: it cannot be fetched, or not be written, for NIGHTSHIFT_SAVE_RETRY_SECONDS.
        """
        return self._begin(digest).result()

    def stop(self) -> None:
        """Wait for nothing any more, because this process is to end. `open` raises CancelledError from then on."""
        with self._lock:
            self._stopped.set()
            self._pool.shutdown(wait=False, cancel_futures=True)

    def forget(self, digest: str) -> None:
        """Delete what is here of a shard, because it is damaged."""
        with self._lock:
            self._opened.pop(digest, None)
            (self._folder / digest).unlink(missing_ok=True)

    def _begin(self, digest: str) -> "Future[Shard]":
        with self._lock:
            if self._stopped.is_set():
                raise CancelledError
            known = self._opened.get(digest)
            if known is None or (known.done() and known.exception()):  # whoever asks again has another try
                self._opened[digest] = self._pool.submit(self._context.copy().run, self._open, digest)
            self._opened.move_to_end(digest)
            while len(self._opened) > _OPEN:
                self._opened.popitem(last=False)
            return self._opened[digest]

    def _open(self, digest: str) -> Shard:
        path = self._folder / digest
        self._folder.mkdir(parents=True, exist_ok=True)
        for attempt in patient(self._patience, 5, self._stopped, _say_that_we_wait, also=(DiskError,)):
            with attempt, FileLock(self._folder / f"{digest[:2]}.lock"):
                return self._opened_here(path) or self._fetched(digest, path)
        raise AssertionError

    def _opened_here(self, path: Path) -> Shard | None:
        with suppress(FileNotFoundError):
            shard = Shard(path)
            shard.touch()
            return shard
        return None

    def _fetched(self, digest: str, path: Path) -> Shard:
        try:
            with complete_file(path) as file:
                fetch(self._store, digest, file)
                opened = Shard(Path(file.name))  # before it has the name by which another may delete it
        except OSError as error:
            if error.errno not in DISK_IS_FULL:
                raise
            self._keep(0)  # all others can be had again
            with self._lock:  # and as long as they are open they take room
                for known in [name for name, future in self._opened.items() if future.done()]:
                    del self._opened[known]
            raise DiskError(
                f"there is no room for {path}: make room there, or let NIGHTSHIFT_HOME be elsewhere"
            ) from error
        self._keep(self._max_bytes, path)
        return opened

    def _keep(self, most: int, newest: Path | None = None) -> None:
        """Delete the shards that were used least lately, until they have at most so many bytes; but not the newest."""
        found, stale = [], time.time() - _STALE_SECONDS
        for path in self._folder.iterdir():
            with suppress(FileNotFoundError):
                status = path.stat()
                if len(path.name) == _SHA256_DIGITS:
                    found.append((status.st_mtime, status.st_size, path))
                elif path.suffix != ".lock" and status.st_mtime < stale:  # begun by a process that was killed
                    path.unlink()
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total > most and path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _say_that_we_wait(error: BaseException) -> None:
    progress.current().warn(f"the images are waited for: {error}")
