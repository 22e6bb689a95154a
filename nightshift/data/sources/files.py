"""Files of a folder on a disk, or of a prefix in a bucket: the two look alike to whoever lists and reads them."""

import os
import stat
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from nightshift.data.images import MAX_BYTES, check_size, open_at_once
from nightshift.errors import ObjectNotFoundError, ObjectTooLargeError, SourceError, UnreadableImageError
from nightshift.storage.store import Store

_READERS_OF_A_BUCKET = 8
_MAX_TABLE = 4 * 1024**3
_COPIES: dict[tuple[str, str], IO[bytes]] = {}
"""The tables of buckets that this process has fetched, by address and ETag."""
_COPYING = threading.Lock()


class File(NamedTuple):
    """A file below a root: its name, with / between folders, its size in bytes, and what changes when it does."""

    name: str
    size: int
    hint: str


Seen = dict[str, dict[str, File]]
"""The files of folders in buckets, by the folder's address and by name."""


class Files(Protocol):
    """A root with files below it. It is pickled."""

    @property
    def readers(self) -> int:
        """How many files of it are read at once."""

    def walk(self) -> Iterator[File]:
        """All files, by their names below the root.

        Raises:
            SourceError: there is no such root, or a part of it may not be listed.
            StorageError: the bucket cannot be listed.
        """

    def folders(self, prefix: str = "") -> list[str]:
        """The names of the folders directly below the root, or below `prefix`, which ends with a /."""

    def find(self, names: Iterable[str], seen: Seen) -> dict[str, File]:
        """Those of these names that there are: below the root, or absolute.

        Args:
            seen: what was listed of folders for names before these; it is added to.
        """

    def read(self, name: str, hint: str) -> bytes:
        """The bytes of a file that was found with this hint.

        Raises:
            UnreadableImageError: it is gone, too large, no regular file, or has changed.
            StorageError: the bucket does not answer.
        """

    def on_disk(self, name: str) -> Path:
        """A file of any kind on this machine, until this process ends; raises SourceError if it is not there."""

    def url(self, name: str) -> str:
        """Where a file is, for people."""


@dataclass(frozen=True)
class LocalFiles:
    """Files below a folder. Links are followed, but not in a circle. What begins with a dot is passed over."""

    root: Path
    readers: int = 1

    def walk(self) -> Iterator[File]:
        if not self.root.is_dir():
            raise SourceError(f"{self.root} is no folder: name a folder with one folder of images a class, or a table")
        yield from self._below(self.root, "", ())

    def _below(self, folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[File]:
        try:
            status = folder.stat()
            here = (status.st_dev, status.st_ino)
            if here in above:  # a link that leads back to a folder it lies in
                return
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise SourceError(
                f"{folder} cannot be listed ({error.strerror}): its images would seem to be gone"
            ) from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                yield from self._below(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
            else:
                yield _local(f"{prefix}{entry.name}", entry)

    def folders(self, prefix: str = "") -> list[str]:
        try:
            with os.scandir(self.root / prefix) as entries:
                return sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
        except OSError:  # `walk` says what is wrong
            return []

    def find(self, names: Iterable[str], seen: Seen) -> dict[str, File]:
        found = {name: _local(name, self.root / name) for name in names}
        return {name: file for name, file in found.items() if file.hint}

    def read(self, name: str, hint: str) -> bytes:
        # A Path, a buffer and a closure together cost as much as the decoding of a small image.
        path = f"{self.root}/{name}" if name[:1] != "/" else name
        try:
            with open(path, "rb", buffering=0, opener=open_at_once) as file:
                before = os.fstat(file.fileno())
                if not stat.S_ISREG(before.st_mode):
                    raise UnreadableImageError("it is no regular file")
                check_size(before.st_size)
                body = file.read(before.st_size + 1)
                after = os.fstat(file.fileno())
        except (OSError, ValueError) as error:
            raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from None
        if not _hint(before) == _hint(after) == hint or len(body) != before.st_size:
            raise UnreadableImageError("it changed while it was read")
        return body

    def on_disk(self, name: str) -> Path:
        path = self.root / name
        if not path.is_file():
            raise SourceError(f"there is no table {path}")
        return path

    def url(self, name: str) -> str:
        return str(self.root / name)


@dataclass(frozen=True)
class S3Files:
    """Objects below `place`, s3://BUCKET/PREFIX, on the server of a store."""

    store: Store
    place: str
    readers: int = _READERS_OF_A_BUCKET

    def walk(self) -> Iterator[File]:
        bucket, prefix = self._root()
        yield from self._list(bucket, prefix)

    def _list(self, bucket: Store, prefix: str) -> Iterator[File]:
        for stored in bucket.list(prefix):
            name = stored.key.removeprefix(prefix)
            if name and not name.endswith("/") and not any(part.startswith(".") for part in name.split("/")):
                yield File(name, stored.size, f"{stored.size} {stored.etag}")

    def folders(self, prefix: str = "") -> list[str]:
        bucket, root = self._root()
        return [name for name in bucket.folders(root + prefix) if not name.startswith(".")]

    def find(self, names: Iterable[str], seen: Seen) -> dict[str, File]:
        found = {}
        for name in names:
            folder, _, last = (name if name.startswith("s3://") else self.url(name)).rpartition("/")
            if folder not in seen:  # a folder is listed at once: to ask for each object takes much longer
                bucket, prefix = self.store.at(f"{folder}/")
                seen[folder] = {file.name: file for file in self._list(bucket, prefix)}
            if file := seen[folder].get(last):
                found[name] = File(name, file.size, file.hint)
        return found

    def read(self, name: str, hint: str) -> bytes:
        bucket, key = self.store.at(name if name.startswith("s3://") else self.url(name))
        try:
            body, etag = bucket.get(key, MAX_BYTES)
        except ObjectNotFoundError:
            raise UnreadableImageError("it is gone since it was listed") from None
        except ObjectTooLargeError as error:
            raise UnreadableImageError(str(error)) from None
        check_size(len(body))
        if hint != f"{len(body)} {etag}":
            raise UnreadableImageError("it changed while it was read")
        return body

    def on_disk(self, name: str) -> Path:
        bucket, key = self.store.at(self.url(name))
        stored = bucket.head(key)
        if not stored:
            raise SourceError(f"there is no table {self.url(name)}")
        with _COPYING:
            copy = _COPIES.get((self.url(name), stored.etag))
            if not copy:
                copy = tempfile.NamedTemporaryFile(suffix=Path(name).suffix)  # noqa: SIM115
                bucket.download(key, copy, max_bytes=_MAX_TABLE)
                copy.flush()
                _COPIES[self.url(name), stored.etag] = copy
        return Path(copy.name)

    def url(self, name: str) -> str:
        return f"{self.place.rstrip('/')}/{name}"

    def _root(self) -> tuple[Store, str]:
        bucket, prefix = self.store.at(self.place)
        return bucket, prefix.rstrip("/") + "/" if prefix.strip("/") else ""


def _local(name: str, path: "Path | os.DirEntry[str]") -> File:
    """A file whose hint is empty if it is not there."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return File(name, 0, "")
    return File(name, status.st_size, _hint(status))


def _hint(status: os.stat_result) -> str:
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False
