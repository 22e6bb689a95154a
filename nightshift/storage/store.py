"""What the rest of nightshift asks of a store of objects, and what it may rely on.

`S3` keeps these promises over a network, `MemoryStore` in the memory of one process.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Protocol, cast

from nightshift.errors import ConfigError, ObjectTooLargeError


@dataclass(frozen=True)
class Stored:
    """An object's name, size in bytes, ETag and time of last write."""

    key: str
    size: int
    etag: str
    modified: datetime


@dataclass(frozen=True)
class Upload:
    """A multipart upload that was begun and neither completed nor aborted."""

    key: str
    upload_id: str
    started: datetime


@dataclass(frozen=True)
class Contents:
    """Some objects and unfinished uploads of a store."""

    objects: list[Stored]
    uploads: list[Upload]

    @property
    def keys(self) -> list[str]:
        return [*(item.key for item in self.objects), *(upload.key for upload in self.uploads)]

    @property
    def bytes(self) -> int:
        return sum(item.size for item in self.objects)


def split_url(url: str) -> tuple[str, str]:
    """The bucket and the key of an address such as `Store.url` gives.

    Raises:
        ConfigError: it is not of the form s3://BUCKET/KEY.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket:
        raise ConfigError(f"{url!r} is not of the form s3://BUCKET/KEY")
    return bucket, key


def limited(into: IO[bytes], max_bytes: int | None, url: str) -> IO[bytes]:
    """`into`, or a wrapper of it that takes at most `max_bytes` bytes of the object `url`."""
    return into if max_bytes is None else cast("IO[bytes]", _Limited(into, max_bytes, url))


class _Limited:
    """The part of a file's interface that a download uses, with a limit on the bytes written."""

    def __init__(self, into: IO[bytes], max_bytes: int, url: str) -> None:
        self._into, self._limit, self._url = into, max_bytes, url
        self.seek, self.tell, self.seekable = into.seek, into.tell, into.seekable

    def write(self, part: bytes) -> int:
        if self.tell() + len(part) > self._limit:
            raise ObjectTooLargeError(f"{self._url} has more than the {self._limit:,} bytes that it may have")
        return self._into.write(part)


def check_size(size: int, max_bytes: int | None, url: str) -> None:
    """Raise ObjectTooLargeError if an object has more than so many bytes."""
    if max_bytes is not None and size > max_bytes:
        raise ObjectTooLargeError(f"{url} has {size:,} bytes, and at most {max_bytes:,} are read")


class Store(Protocol):
    """A bucket and a prefix, safe to use from several threads. Keys given to it and by it are without the prefix.

    A write is whole or not there at all, and every read that begins after it sees it. Every method raises errors of
    `nightshift.errors`: a StorageError, whose kind says what is wrong.
    """

    @property
    def endpoint(self) -> str:
        """Where the store is, for people: a URL, or a name."""

    def url(self, key: str) -> str:
        """An object's address, s3://BUCKET/PREFIX/KEY."""

    def at(self, url: str) -> tuple["Store", str]:
        """Another bucket of the same server, or this one without the prefix, and the key `url` names in it.

        Raises:
            ConfigError: it is not of the form s3://BUCKET/KEY.
        """

    def now(self) -> datetime:
        """The store's clock, in UTC, exact to a second: it is the same for all who use the store.

        Raises:
            StorageError: the store cannot be asked.
        """

    def get(self, key: str, max_bytes: int | None = None) -> tuple[bytes, str]:
        """An object's bytes and ETag; for small objects.

        Raises:
            ObjectNotFoundError: there is none.
            ObjectTooLargeError: it has more than `max_bytes`; they are not fetched.
            StorageError: it cannot be read.
        """

    def head(self, key: str) -> Stored | None:
        """What is stored under `key`, or None."""

    def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        """Write a small object in one request and return its ETag.

        Args:
            if_match: write only over the version with this ETag. Versions with the same bytes may share one.
            if_absent: write only where nothing is.

        Raises:
            PreconditionFailedError: the condition does not hold. After a lost response this can follow
                upon one's own write: read back and compare.
            StorageError: it may or may not have been written.
        """

    def upload(self, key: str, body: IO[bytes], advance: Callable[[int], object] | None = None) -> None:
        """Write an object of any size, in parts if it is large. A failure leaves no unfinished parts.

        Args:
            body: if it cannot seek, few of its parts are in memory at a time, and it has 160 GiB at most.
            advance: called with the number of bytes just sent, perhaps from other threads.

        Raises:
            StorageError: it was not written.
        """

    def download(
        self, key: str, into: IO[bytes], advance: Callable[[int], object] | None = None, max_bytes: int | None = None
    ) -> None:
        """Read an object into a seekable file; `advance` as for `upload`.

        Args:
            max_bytes: how many bytes it may have at most. Hardly more are fetched, whatever has been put in its place.

        Raises:
            ObjectNotFoundError: there is none.
            ObjectTooLargeError: it has more than `max_bytes` bytes.
            StorageError: it cannot be read.
        """

    def download_bytes(self, key: str, max_bytes: int | None = None) -> bytes:
        """`download` into memory."""

    def list(self, prefix: str) -> Iterator[Stored]:
        """All objects whose key begins with `prefix`, in the order of their keys."""

    def folders(self, prefix: str) -> Iterator[str]:
        """The distinct parts between `prefix` and the next / of the keys that have one there, in their order."""

    def delete(self, key: str) -> None:
        """Remove an object; one that is not there is no error."""

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        """All unfinished multipart uploads to keys that begin with `prefix`."""

    def abort_upload(self, upload: Upload) -> None:
        """End an unfinished upload and free its parts; one that is gone already is no error."""

    def check_access(self) -> None:
        """Ask the store for anything, to find out early whether it can be used.

        Raises:
            StorageUnreachableError, StorageDeniedError, BucketNotFoundError: as named.
        """

    def check_fencing(self) -> None:
        """Find out whether the store honours conditional writes, by trying them on a throw-away key.

        Raises:
            UnfencedStoreError: it does not, and the settings do not allow that.
        """
