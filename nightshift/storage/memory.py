"""The store in the memory of one process: it keeps every promise of `Store` and needs no server."""

import copy
import hashlib
import io
import secrets
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO

from nightshift.errors import ObjectNotFoundError, PreconditionFailedError
from nightshift.storage.store import Stored, Upload, check_size, limited, split_url


@dataclass(frozen=True)
class _Object:
    body: bytes
    etag: str
    modified: datetime


class MemoryStore:
    """A `Store`. What it holds is gone with the process, and no other process sees it."""

    endpoint = "memory"

    def __init__(
        self,
        prefix: str = "",
        bucket: str = "memory",
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`clock`: what `now` returns, in UTC."""
        self.bucket = bucket
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self.clock = clock
        # By URL, so that stores made by `at` share them.
        self._objects: dict[str, _Object] = {}
        self._uploads: dict[str, tuple[str, datetime]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"MemoryStore({self.url('')!r})"

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    def at(self, url: str) -> tuple["MemoryStore", str]:
        other = copy.copy(self)
        other.prefix = ""
        other.bucket, key = split_url(url)
        return other, key

    def now(self) -> datetime:
        return self.clock()

    def get(self, key: str, max_bytes: int | None = None) -> tuple[bytes, str]:
        with self._lock:
            found = self._objects.get(self.url(key))
        if not found:
            raise ObjectNotFoundError(f"cannot read {self.url(key)}: there is no such object")
        check_size(len(found.body), max_bytes, self.url(key))
        return found.body, found.etag

    def head(self, key: str) -> Stored | None:
        with self._lock:
            found = self._objects.get(self.url(key))
        return self._stored(key, found) if found else None

    def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        written = _Object(bytes(body), f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"', self.clock())
        with self._lock:
            found = self._objects.get(self.url(key))
            if (if_absent and found) or (if_match is not None and (not found or found.etag != if_match)):
                raise PreconditionFailedError(f"cannot write {self.url(key)}: the condition does not hold")
            self._objects[self.url(key)] = written
        return written.etag

    def upload(self, key: str, body: IO[bytes], advance: Callable[[int], object] | None = None) -> None:
        content = body.read()
        self.put(key, content)
        if advance:
            advance(len(content))

    def download(
        self, key: str, into: IO[bytes], advance: Callable[[int], object] | None = None, max_bytes: int | None = None
    ) -> None:
        body, _ = self.get(key)
        limited(into, max_bytes, self.url(key)).write(body)
        if advance:
            advance(len(body))

    def download_bytes(self, key: str, max_bytes: int | None = None) -> bytes:
        buffer = io.BytesIO()
        self.download(key, buffer, max_bytes=max_bytes)
        return buffer.getvalue()

    def list(self, prefix: str) -> Iterator[Stored]:
        with self._lock:
            found = sorted(self._objects.items())
        ours = self.url("")
        for url, item in found:
            if url.startswith(ours + prefix):
                yield self._stored(url.removeprefix(ours), item)

    def folders(self, prefix: str) -> Iterator[str]:
        below = (item.key.removeprefix(prefix) for item in self.list(prefix))
        yield from dict.fromkeys(rest.partition("/")[0] for rest in below if "/" in rest)

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(self.url(key), None)

    def begin_upload(self, key: str) -> Upload:
        """Begin a multipart upload that nobody will complete, such as a killed process leaves behind."""
        upload = Upload(key, secrets.token_hex(8), self.clock())
        with self._lock:
            self._uploads[upload.upload_id] = self.url(key), upload.started
        return upload

    def list_uploads(self, prefix: str) -> Iterator[Upload]:
        with self._lock:
            found = [*self._uploads.items()]
        ours = self.url("")
        for upload_id, (url, started) in found:
            if url.startswith(ours + prefix):
                yield Upload(url.removeprefix(ours), upload_id, started)

    def abort_upload(self, upload: Upload) -> None:
        with self._lock:
            self._uploads.pop(upload.upload_id, None)

    def check_access(self) -> None:
        pass

    def check_fencing(self) -> None:
        pass

    def _stored(self, key: str, item: _Object) -> Stored:
        # To the second, as S3's listings have it.
        return Stored(key, len(item.body), item.etag, item.modified.replace(microsecond=0))
