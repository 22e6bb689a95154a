"""Images become pixels in child processes, so a decoder that crashes or hangs loses one image and not the night."""

import hashlib
import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import forkserver
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from pebble import CONSTS, ProcessExpired, ProcessFuture, ProcessPool

from nightshift import processes
from nightshift.data.images import fit, open_image
from nightshift.data.jpeg import as_stored
from nightshift.data.sources.listed import Listed, Source
from nightshift.errors import UnreadableImageError
from nightshift.values import Resize, Storage

_CHUNK, _CHUNK_BYTES = 128, 16 * 1024**2
"""How many images a process takes at once, and about how many bytes, as files and as they are stored. More would make
the loss of a process longer to repair; fewer small ones take longer on their way than to decode."""
_AHEAD = 4
"""Chunks a process that may be decoded before somebody asks for them."""
_PRELOADED = ["nightshift.data.decode", "nightshift.data.sources.files", "nightshift.data.sources.folder"]
"""What each process would import by itself, in half a second."""
_CHUNK_SECONDS, _IMAGE_SECONDS = 60, 20
CONSTS.sleep_unit = 0.02  # a pool ends when it next looks, by default every tenth of a second


@dataclass(frozen=True)
class Shape:
    """How one is stored: uint8 (size, size, 3), made square by cropping, padding or stretching, or that as JPEG."""

    size: int
    resize: Resize
    storage: Storage = "pixels"

    @property
    def bytes(self) -> int:
        """Of an image; encoded, about so many."""
        pixels = 3 * self.size**2
        return pixels if self.storage == "pixels" else pixels // 5


class Decoded(NamedTuple):
    """An image that was read: its pixels as they are stored, and the sha256 of its file and of these; or why not."""

    stored: bytes = b""
    content: bytes | None = None
    pixels: bytes | None = None
    width: int = 0
    height: int = 0
    refused: str = ""


def prepare() -> None:
    """Begin to import what the processes of `Decoders` need, in a process of its own. It is not waited for."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    forkserver.ensure_running()


class Decoders:
    """A pool of processes that read images of one source. Each has a copy of the source."""

    def __init__(self, source: Source, shape: Shape, processes: int | None = None) -> None:
        self._count = processes or os.cpu_count() or 1
        self._most = max(1, min(_CHUNK, _CHUNK_BYTES // shape.bytes))
        prepare()
        context = multiprocessing.get_context("forkserver")
        self._pool = ProcessPool(self._count, initializer=_begin, initargs=(source, shape), context=context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()

    def read(self, images: Iterable[Listed]) -> Iterator[Decoded]:
        """Each image, in order. Some are read ahead.

        Raises:
            StorageError: the source does not answer.
        """
        waiting: deque[tuple[Sequence[Listed], ProcessFuture[list[Decoded]]]] = deque()
        for chunk in _chunks(images, self._most):
            waiting.append((chunk, self._pool.schedule(_decode, (chunk,), timeout=_CHUNK_SECONDS)))
            if len(waiting) > _AHEAD * self._count:
                yield from self._result(*waiting.popleft())
        while waiting:
            yield from self._result(*waiting.popleft())

    def _result(self, chunk: Sequence[Listed], future: "ProcessFuture[list[Decoded]]") -> list[Decoded]:
        try:
            return future.result()
        except (ProcessExpired, TimeoutError):
            return [self._alone(listed) for listed in chunk]

    def _alone(self, listed: Listed) -> Decoded:
        try:
            return self._pool.schedule(_decode, ([listed],), timeout=_IMAGE_SECONDS).result()[0]
        except TimeoutError:
            return Decoded(refused=f"it could not be decoded in {_IMAGE_SECONDS} s: save it anew")
        except ProcessExpired as error:
            return Decoded(refused=f"the decoder crashed on it (exit {error.exitcode}): save it anew")


def _chunks(images: Iterable[Listed], most: int) -> Iterator[list[Listed]]:
    chunk, size = list[Listed](), 0
    for listed in images:
        chunk.append(listed)
        size += listed.size
        if len(chunk) == most or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_source: Source
_shape: Shape


def _begin(source: Source, shape: Shape) -> None:
    global _source, _shape
    _source, _shape = source, shape
    processes.end_with_parent()


def _decode(images: list[Listed]) -> list[Decoded]:
    with ThreadPoolExecutor(_source.readers) as pool:
        return list(pool.map(_decoded, images)) if _source.readers > 1 else [_decoded(listed) for listed in images]


def _decoded(listed: Listed) -> Decoded:
    try:
        body = _source.read(listed)
        image = open_image(body)
    except UnreadableImageError as error:
        return Decoded(refused=str(error))
    square = fit(image, _shape.size, _shape.resize)
    stored = square.tobytes() if _shape.storage == "pixels" else as_stored(np.asarray(square), body)
    return Decoded(stored, hashlib.sha256(body).digest(), hashlib.sha256(stored).digest(), *image.size)
