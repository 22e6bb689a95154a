"""A data set on this machine: what training and judging see of the images."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from nightshift.data.encoded import EncodedImages, Pending
from nightshift.records.snapshots import Split
from nightshift.refs import DatasetRef
from nightshift.values import Resize
from nightshift.workspace import Workspace

RGB = tuple[float, float, float]
Judged = Literal["validation", "test"]
"""The splits that are not trained on."""
Images = Tensor | EncodedImages
"""uint8 (N, side, side, 3): mapped into memory, or decoded when they are asked for."""


@dataclass(frozen=True)
class Pair:
    """An image to judge by and one to train on, by their numbers in their splits, and how alike their pixels are."""

    split: Judged
    """That of the first."""
    image: int
    train: int
    alike: float
    """Their correlation: 1 where they are the same."""


@dataclass(frozen=True)
class Dataset:
    """A data set's images, and labels (N,), uint8 or, for more than 256 classes, int32."""

    name: str
    digest: str
    classes: tuple[str, ...]
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    mean: RGB
    """Per channel, over the training images, on the scale 0 to 255; so is `std`."""
    std: RGB
    resize: Resize = "stretch"
    """How images of other shapes were made squares, and so how those to predict are."""
    validation_images: Images | None = None
    """What chooses an epoch; none where the data set has no such split."""
    validation_labels: Tensor | None = None
    test_content: Tensor | None = None
    """The sha256 of each test image's file, uint8 (N, 32), by which an image is known on other nights; none where an
    older nightshift has packed them."""
    near: tuple[Pair, ...] = ()
    """Images to train on that may be nearly the same as ones to judge by, most alike first."""

    @property
    def image_size(self) -> int:
        """The side of the images, in pixels."""
        return self.train_images.shape[1]

    def images_of(self, split: Split) -> Images:
        """The images of a split; none of one that there is not."""
        splits = {"train": self.train_images, "validation": self.validation_images, "test": self.test_images}
        images = splits[split]
        return self.train_images[:0] if images is None else images

    def resident_on(self, device: torch.device) -> Self:
        """The same data set with its training part in a device's memory, so that no step has to copy images there.

        Encoded images stay where they are. Each batch of them goes where the labels are.
        """
        images = self.train_images.to(device) if isinstance(self.train_images, Tensor) else self.train_images
        return replace(self, train_images=images, train_labels=self.train_labels.to(device))


def in_parts(images: Images, size: int, first: int = 0, every: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """All images once, `size` at a time, each part with their numbers, int64; encoded ones as they lie in the shards.

    A part of those is decoded while another is made use of.

    Args:
        first: the number of the first part that is wanted.
        every: how far it is to the next one.
    """
    order = torch.arange(len(images)) if isinstance(images, Tensor) else images.order
    wanted = torch.split(order, size)[first::every]
    if isinstance(images, Tensor):
        yield from ((some, images[int(some[0]) : int(some[-1]) + 1]) for some in wanted if len(some))
        return
    ahead = deque[tuple[Tensor, Pending]]()
    for some in wanted:
        ahead.append((some, images.begin(some)))
        if len(ahead) > 1:
            numbers, part = ahead.popleft()
            yield numbers, part.wait()
    for numbers, part in ahead:
        yield numbers, part.wait()


def few(images: Images, count: int) -> Tensor:
    """Some images, uint8 (count, side, side, 3), always the same ones: the first, of encoded ones in the shards."""
    return images[:count] if isinstance(images, Tensor) else images[images.order[:count]]


def open_dataset(workspace: Workspace, ref: DatasetRef, threads: int | None = None) -> Dataset:
    """Map a packed data set into memory, from the cache on this machine or else from the store.

    Args:
        threads: how many decode, where images are encoded; none: as many as there are cores.

    Raises:
        DataCorruptError, DataUnavailableError, StorageError: it is not here, and cannot be had.
    """
    from nightshift.data.known import is_of_before, open_of_before  # they are made of what stands here
    from nightshift.data.packed import open_packed

    return open_of_before(workspace, ref) if is_of_before(ref) else open_packed(workspace, ref, threads)


def channel_statistics(parts: Iterable[np.ndarray]) -> tuple[RGB, RGB]:
    """Mean and standard deviation of each channel, from exact sums, of uint8 images (N, H, W, 3) in several parts."""
    counts, values = np.zeros((3, 256), object), np.arange(256).astype(object)
    for part in parts:
        counts += np.stack([np.bincount(part[..., channel].ravel(), minlength=256) for channel in range(3)])
    total = int(counts[0].sum())
    mean = [int(value) / total for value in counts @ values]
    variance = [int(value) / total - m * m for value, m in zip(counts @ (values * values), mean, strict=True)]
    std = [max(value, 0.0) ** 0.5 for value in variance]  # rounding may leave less than nothing
    return (mean[0], mean[1], mean[2]), (std[0], std[1], std[2])
