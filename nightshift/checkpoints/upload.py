"""A payload is uploaded while it is serialized, so that no more than a few parts of it are in memory beside it."""

import hashlib
import io
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from nightshift.checkpoints.payload import Payload
from nightshift.storage.store import Store

_PIECE_BYTES = 1024 * 1024
"""What is handed on at a time: less would wake both threads too often, more would hold Python's lock too long."""


@dataclass(frozen=True)
class Written:
    """How long a stored payload is, and its sha256."""

    bytes: int
    sha256: str


def upload_payload(store: Store, key: str, payload: Payload) -> Written:
    """Upload what `torch.save` makes of a payload. The same payload has the same bytes each time.

    Its tensors lie in host memory, and must not change until this returns.

    Raises:
        StorageError: as `Store.upload`.
    """
    stream, written = _Stream(), Future[Written]()
    # Not a daemon, unlike the saver's thread: a process that ended with a thread in torch's writer would abort.
    threading.Thread(target=_serialize, args=(payload, stream, written), name="payload", daemon=False).start()
    try:
        store.upload(key, io.BufferedReader(stream))
    finally:
        stream.abandon()
        if stream.failure:  # the store only saw that nothing more came
            raise stream.failure
    return written.result()


def _serialize(payload: Payload, stream: "_Stream", written: Future[Written]) -> None:
    try:
        output = _Output(stream)
        # `read_archive` reads protocol 2, whatever torch's default becomes.
        torch.save(payload, output, pickle_protocol=2)  # type: ignore[arg-type]
        output.flush()
        written.set_result(Written(output.size, output.sha256.hexdigest()))
        stream.finish()
    except BaseException as error:
        written.set_exception(error)
        stream.finish(error)


class _Output:
    """What torch writes to. Only large pieces are handed on: each wakes two threads."""

    def __init__(self, stream: "_Stream") -> None:
        self._stream = stream
        self._small = bytearray()
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, content: bytes | memoryview) -> int:
        self.size += len(content)
        self.sha256.update(content)
        if len(content) < _PIECE_BYTES:
            self._small += content
            if len(self._small) >= _PIECE_BYTES:
                self.flush()
        else:
            self.flush()
            self._stream.offer(content)
        return len(content)

    def flush(self) -> None:
        small, self._small = self._small, bytearray()
        self._stream.offer(small)


class _Stream(io.RawIOBase):
    """What one thread offers, another reads. A pipe would do, but for a child that is forked meanwhile and holds it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._offered: bytes | bytearray | memoryview = b""
        self._is_finished = self._is_abandoned = False
        self.failure: BaseException | None = None
        """Why not everything was offered."""

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        with self._changed:
            self._changed.wait_for(lambda: self._offered or self._is_finished)
            if self.failure:
                raise self.failure  # at its end a store would believe that it has the whole object
            count = min(len(into), len(self._offered), _PIECE_BYTES)
            into[:count] = self._offered[:count]
            self._offered = memoryview(self._offered)[count:]
            if not self._offered:
                self._changed.notify()
        return count

    def offer(self, content: bytes | bytearray | memoryview) -> None:
        """Return when all of it was read; raise BrokenPipeError if it will not be."""
        with self._changed:
            self._offered = content
            self._changed.notify()
            self._changed.wait_for(lambda: not self._offered or self._is_abandoned)
            self._offered = b""
            if self._is_abandoned:
                raise BrokenPipeError

    def finish(self, failure: BaseException | None = None) -> None:
        """Nothing more is offered, for this failure if there is one."""
        with self._changed:
            self._is_finished, self.failure = True, None if self._is_abandoned else failure
            self._changed.notify()

    def abandon(self) -> None:
        """Nothing more is read."""
        with self._changed:
            self._is_abandoned = True
            self._changed.notify()
