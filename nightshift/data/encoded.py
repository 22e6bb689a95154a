"""Images that are decoded when they are asked for: a data set of them may be larger than memory."""

import hashlib
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nightshift.data import jpeg
from nightshift.data.shards import Shard, Shards
from nightshift.errors import DataCorruptError

_AT_ONCE = 32
"""Images that a thread decodes in one go: each go costs, and all threads of a batch shall end together."""


@dataclass(frozen=True)
class Pending:
    """Images that are being decoded."""

    images: Tensor
    parts: Sequence[Future[None]]
    decoding: "Decoding"

    def wait(self) -> Tensor:
        """Them, uint8 (N, side, side, 3); raises as `EncodedImages`."""
        try:
            for part in self.parts:
                part.result()
        except BaseException as error:
            if not isinstance(error, Exception):  # the process is to end, and would wait for its threads
                self.decoding.stop()
            raise
        return self.images


class Decoding:
    """What the splits of a data set share: its shards, and the threads that decode.

    Args:
        shards: by whose place in `digests` an image names its shard.
        threads: none: as many as there are cores.
    """

    def __init__(self, shards: Shards, digests: Sequence[str], size: int, threads: int | None = None) -> None:
        self.shards, self.digests, self.size = shards, digests, size
        self.threads = threads or os.cpu_count() or 1
        self.pool = ThreadPoolExecutor(self.threads, "decode")
        self._free: list[np.ndarray] = []

    def memory(self, images: int) -> Tensor:
        """Memory for so many images: that of former ones which nobody has any more, if they were as many.

        Threads that touch fresh memory wait for each other in the kernel.
        """
        size = images * 3 * self.size**2
        while self._free:
            memory = self._free.pop()
            if len(memory) == size:
                break
        else:
            memory = np.empty(size, np.uint8)
        lent = memory.view()
        weakref.finalize(lent, self._free.append, memory).atexit = False
        return torch.from_numpy(lent).view(images, self.size, self.size, 3)

    def stop(self) -> None:
        """Wait for nothing any more, because this process is to end."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.shards.stop()


class EncodedImages:
    """The images of a split, as a tensor that is in memory nowhere: uint8 (N, side, side, 3), on the CPU.

    Args:
        shard: the number of each image's shard, int32 (N,).
        offset: where it begins in its shard, in bytes, int64 (N,).
        sha256: of what is stored there, uint8 (N, 32).

    Raises:
        DataCorruptError: whoever asks for images: a shard is gone or damaged, or is not what the snapshot names.
        DiskError, StorageError: a shard cannot be fetched.
    """

    def __init__(self, decoding: Decoding, shard: np.ndarray, offset: np.ndarray, sha256: np.ndarray) -> None:
        self._decoding, self._shard, self._offset, self._sha256 = decoding, shard, offset, sha256

    def __len__(self) -> int:
        return len(self._shard)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self._decoding.size, self._decoding.size, 3))

    def __getitem__(self, which: int | slice | Sequence[int] | Tensor) -> Tensor:
        if isinstance(which, int):
            return self[[range(len(self))[which]]][0]
        return self.begin(torch.arange(len(self))[which]).wait()

    @cached_property
    def shards(self) -> Tensor:
        """The number of each image's shard, int64 (N,)."""
        return torch.from_numpy(self._shard).long()

    @cached_property
    def order(self) -> Tensor:
        """The numbers of all images as they lie in the shards, one after the other: int64 (N,)."""
        return torch.from_numpy(np.lexsort((self._offset, self._shard)))

    def expect(self, numbers: Tensor) -> None:
        """Fetch the shards of images that will soon be asked for."""
        digests = self._decoding.digests
        self._decoding.shards.expect(digests[shard] for shard in dict.fromkeys(self._shard[numbers.numpy()].tolist()))

    def begin(self, numbers: Tensor) -> Pending:
        """Begin to decode images."""
        images = self._decoding.memory(len(numbers))
        which, into, parts = numbers.numpy(), images.numpy(), []
        some = max(1, min(_AT_ONCE, len(which) // self._decoding.threads))
        for start in range(0, len(which), some):
            part = slice(start, start + some)
            parts.append(self._decoding.pool.submit(self._decode, which[part], into[part]))
        return Pending(images, parts, self._decoding)

    def _decode(self, numbers: np.ndarray, into: np.ndarray) -> None:
        digests = [self._decoding.digests[shard] for shard in self._shard[numbers].tolist()]
        where = zip(numbers, digests, self._offset[numbers].tolist(), self._sha256[numbers], into, strict=True)
        # Each is asked for once: threads that ask for the shard of each image wait for each other.
        opened: dict[str, Shard] = {}
        for number, digest, offset, sha256, image in where:
            try:
                jpeg.decode(self._stored(opened, digest, offset, sha256.tobytes()), image)
            except DataCorruptError as error:
                raise DataCorruptError(f"image {number} of shard {digest}: {error}") from error

    def _stored(self, opened: dict[str, Shard], digest: str, offset: int, sha256: bytes) -> bytes:
        """An image's bytes. A shard that has been damaged here is fetched again."""
        shards = self._decoding.shards
        for _ in range(2):
            if digest not in opened:
                opened[digest] = shards.open(digest)
            stored = jpeg.stored_at(opened[digest].read, offset)
            if hashlib.sha256(stored).digest() == sha256:
                return stored
            del opened[digest]
            shards.forget(digest)
        raise DataCorruptError("it is not what the snapshot names: make a new snapshot")
