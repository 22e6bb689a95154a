"""Images that are decoded when they are asked for: a data set of them may be larger than memory."""

import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from nightshift.data import jpeg
from nightshift.data.shards import Shards
from nightshift.errors import DataCorruptError

_AT_ONCE = 8
"""Images that a thread decodes before another may have its turn: few, so that all threads end together."""


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
        self.pool = ThreadPoolExecutor(threads or os.cpu_count(), "decode")

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
        images = torch.empty((len(numbers), *self.shape[1:]), dtype=torch.uint8)
        into, parts = images.numpy(), []
        for start in range(0, len(numbers), _AT_ONCE):
            some = numbers[start : start + _AT_ONCE].tolist()
            parts.append(self._decoding.pool.submit(self._decode, some, into[start : start + _AT_ONCE]))
        return Pending(images, parts, self._decoding)

    def _decode(self, numbers: Iterable[int], into: np.ndarray) -> None:
        for number, image in zip(numbers, into, strict=True):
            try:
                jpeg.decode(self._stored(number), image)
            except DataCorruptError as error:
                raise DataCorruptError(f"image {number} of shard {self._digest(number)}: {error}") from error

    def _digest(self, number: int) -> str:
        return self._decoding.digests[int(self._shard[number])]

    def _stored(self, number: int) -> bytes:
        """An image's bytes. A shard that has been damaged here is fetched again."""
        shards, digest, wanted = self._decoding.shards, self._digest(number), self._sha256[number].tobytes()
        for _ in range(2):
            stored = jpeg.stored_at(shards.open(digest).read, int(self._offset[number]))
            if hashlib.sha256(stored).digest() == wanted:
                return stored
            shards.forget(digest)
        raise DataCorruptError("it is not what the snapshot names: make a new snapshot")
