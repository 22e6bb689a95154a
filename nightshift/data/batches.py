"""The training batches: order and augmentation as pure functions of (seed, epoch, step).

A resumed run asks for step k and gets what an uninterrupted run got at step k. It re-reads nothing before
that step, and no generator has to be saved.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Generator, Tensor

from nightshift.config.train import TrainConfig
from nightshift.data import transforms
from nightshift.data.chance import generator_of
from nightshift.data.datasets import Dataset
from nightshift.data.encoded import EncodedImages, Pending
from nightshift.data.names import check_classes, check_fits, check_loss, check_validation
from nightshift.hardware import sent
from nightshift.networks import statistics_of

_BATCH, _BATCH_ON_A_GPU = 250, 1000
"""How many images of 32 by 32 pixels are predicted at a time. On a CPU, what a layer makes of more of them is in fresh
memory each time, and takes half as long again."""
_WINDOW = 8192
"""How many images the shards of a window have at least, or all that there are."""
_AHEAD_BYTES, _AHEAD = 128 * 1024**2, 8
"""The most memory for images decoded ahead, and the most steps they may be ahead."""
_LOOK = 16
"""Every so many steps the shards of the next window are asked for."""
_LOGITS = 2**25
"""How many logits there may be at a time: those of all test images, of 100,000 classes, would fill any machine."""


@dataclass(frozen=True, eq=False)
class Members:
    """Which training images each class has, for an order in which all classes come equally often."""

    of_class: tuple[Tensor, ...]
    """int64 numbers of the images of each class that has any."""

    @classmethod
    def by(cls, labels: Tensor) -> Self:
        """Those with these labels (N,)."""
        counts = labels.long().bincount().tolist()
        return cls(tuple(part for part in torch.split(labels.argsort(stable=True), counts) if len(part)))


@dataclass(frozen=True, eq=False)
class Windows:
    """In which shard each training image lies, for an order in which a few shards are read at a time.

    As a shard holds images of all classes, and the shards of a window are chosen by chance, this mixes as well as if
    all were shuffled: benchmarks/mixing.py.
    """

    shards: Tensor
    """int64 (N,)."""

    def shuffled(self, numbers: Tensor, generator: Generator) -> Tensor:
        """Images, int64 (M,), in the order of an epoch: all those of one window by chance, then those of the next."""
        images = self.shards.bincount()
        turn = torch.randperm(len(images), generator=generator)
        before = images[turn].cumsum(0) - images[turn]
        window = torch.empty_like(before)
        window[turn] = before * max(1, len(self.shards) // _WINDOW) // len(self.shards)
        place = torch.rand(len(numbers), generator=generator, dtype=torch.float64)
        return numbers[(window[self.shards[numbers]] + place).argsort(stable=True)]


@dataclass(frozen=True)
class Plan:
    """How the steps of a run divide into epochs. Steps count from 0."""

    images: int
    batch_size: int
    epochs: int
    drop_last: bool
    members: Members | None = None
    """Of balanced sampling; without it an epoch sees each image once."""
    windows: Windows | None = None
    """Of encoded images; without it all are shuffled together."""

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.images, self.batch_size)
        return whole if self.drop_last or not rest else whole + 1

    @property
    def total_steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def smallest_batch(self) -> int:
        return self.batch_of(self.steps_per_epoch - 1)

    def batch_of(self, step: int) -> int:
        """How many images a step sees."""
        _, within = self.position(step)
        return min(self.batch_size, self.images - within * self.batch_size)

    def position(self, step: int) -> tuple[int, int]:
        """The epoch a step belongs to and its number within that epoch, both from 0."""
        return divmod(step, self.steps_per_epoch)


def make_plan(config: TrainConfig, dataset: Dataset) -> Plan:
    """How the steps of a run divide into epochs.

    Raises:
        ConfigError: as `check_fits`, `check_loss`, `check_validation` and `check_classes`.
    """
    check_fits(config, dataset.image_size)
    check_classes(dataset.classes)
    check_loss(config, len(dataset.classes))
    check_validation(config, 0 if dataset.validation_images is None else len(dataset.validation_images))
    images = min(len(dataset.train_images), config.data.max_train_images or len(dataset.train_images))
    members = Members.by(dataset.train_labels[:images].cpu()) if config.data.sampling == "balanced" else None
    pixels, windows = dataset.train_images, None
    if not isinstance(pixels, Tensor) and not members:  # balanced sampling repeats some images all over an epoch
        windows = Windows(pixels.shards[:images])
    return Plan(
        images, min(config.data.batch_size, images), config.schedule.epochs, config.data.drop_last, members, windows
    )


def batch_indices(plan: Plan, seed: int, step: int) -> Tensor:
    """Which training images step `step` sees: int64, shape (batch,)."""
    epoch, within = plan.position(step)
    return epoch_order(plan, seed, epoch)[within * plan.batch_size : (within + 1) * plan.batch_size]


def training_batch(
    dataset: Dataset,
    config: TrainConfig,
    plan: Plan,
    step: int,
    share: slice = slice(None),
    decoded: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The images and targets of one step, augmented but not yet normalized.

    Args:
        share: which images of the batch to return, where several ranks share it; by default all.
        decoded: the share's images, if they are decoded already.

    Returns:
        uint8 images (share, side, side, 3) and int64 labels (share,), on the device of the data set. If the config
        mixes images, float32 targets (share, classes) in place of the labels.
    """
    indices = batch_indices(plan, config.seed, step)
    wanted, images = _wanted(len(indices), config, share), dataset.train_images
    if isinstance(images, Tensor):
        images = _gather(images, indices[wanted], indices, config, plan, step, wanted)
    else:
        decoded = images[indices[wanted]] if decoded is None else decoded
        images = _gather(sent(decoded, dataset.train_labels.device), None, indices, config, plan, step, wanted)
    labels = dataset.train_labels[sent(indices[wanted], dataset.train_labels.device)].long()
    if config.augment.per_image:
        epoch, within = plan.position(step)
        places = (within * plan.batch_size + torch.arange(len(indices))[wanted]).tolist()
        images = transforms.transformed(images, config.augment, config.seed, epoch, places, dataset.mean)
    if config.augment.mixes:
        return transforms.mixed(images, labels, config.augment, len(dataset.classes), config.seed, step)
    return images, labels


class Batches:
    """The batches of one rank, step after step. Encoded images are decoded some steps ahead.

    Args:
        share_of: which images of a batch of so many are the rank's.
    """

    def __init__(self, dataset: Dataset, config: TrainConfig, plan: Plan, share_of: Callable[[int], slice]) -> None:
        self._dataset, self._config, self._plan, self._share_of = dataset, config, plan, share_of
        self._ahead = max(2, min(_AHEAD, _AHEAD_BYTES // (plan.batch_size * 3 * dataset.image_size**2)))
        self._pending: dict[int, Pending] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """As `training_batch`; raises as `EncodedImages`."""
        images, plan, decoded = self._dataset.train_images, self._plan, None
        if not isinstance(images, Tensor):
            for upcoming in range(step, min(step + self._ahead, plan.total_steps)):
                if upcoming not in self._pending:
                    self._pending[upcoming] = self._begin(images, upcoming)
            decoded = self._pending.pop(step).wait()
        share = self._share_of(plan.batch_of(step))
        return training_batch(self._dataset, self._config, plan, step, share, decoded)

    def _begin(self, images: EncodedImages, step: int) -> Pending:
        plan, seed = self._plan, self._config.seed
        epoch, within = plan.position(step)
        if not self._pending or within % _LOOK == 0:
            start = within * plan.batch_size
            images.expect(epoch_order(plan, seed, epoch)[start : start + 2 * _WINDOW])
        indices = batch_indices(plan, seed, step)
        return images.begin(indices[_wanted(len(indices), self._config, self._share_of(len(indices)))])


def resident(dataset: Dataset, config: TrainConfig, device: torch.device) -> Dataset:
    """The data set, with its training part where `training_batch` augments images: on the device, if that can be.

    torchvision's transforms change one image at a time, for which a GPU is too slow.
    """
    return dataset if config.augment.per_image else dataset.resident_on(device)


def pixel_statistics(dataset: Dataset, config: TrainConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel to normalize by, on the scale 0 to 255.

    The deviation of a channel in which all pixels are the same is taken for 1.
    """
    if config.data.normalization == "half":
        return (127.5,) * 3, (127.5,) * 3
    if config.data.normalization == "network":
        return statistics_of(config.model.name)
    return dataset.mean, tuple(deviation or 1.0 for deviation in dataset.std)


def normalizer(dataset: Dataset, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Scale and shift, float32 (3, 1, 1), such that pixels * scale + shift is what the network sees."""
    return scale_and_shift(*pixel_statistics(dataset, config))


def scale_and_shift(means: Sequence[float], deviations: Sequence[float]) -> tuple[Tensor, Tensor]:
    """`normalizer` for these statistics, one per channel, on the scale 0 to 255."""
    mean, std = torch.tensor(means), torch.tensor(deviations)
    return (1 / std)[:, None, None], (-mean / std)[:, None, None]


def to_input(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """uint8 (batch, side, side, 3) → normalized float32 (batch, 3, side, side) in channels_last memory format."""
    pixels = images.permute(0, 3, 1, 2).to(torch.float32, copy=True)
    return torch.addcmul(shift, pixels, scale, out=pixels)  # fresh memory would cost several times the arithmetic


def images_at_a_time(image_size: int, classes: int, device: torch.device) -> int:
    """How many images are predicted at a time, so that large images and many classes take no more memory than CIFAR-10.

    250 of CIFAR-10's, on a GPU 1000, and 1 at least.
    """
    most = _BATCH if device.type == "cpu" else _BATCH_ON_A_GPU
    return max(1, min(most, most * 32**2 // image_size**2, _LOGITS // classes))


def _wanted(batch: int, config: TrainConfig, share: slice) -> Tensor:
    """The places of a share's images in a batch. If images are mixed, the place before the first one comes first."""
    places = torch.arange(batch)
    return torch.cat([places.roll(1)[share][:1], places[share]]) if config.augment.mixes else places[share]


@lru_cache(maxsize=2)
def epoch_order(plan: Plan, seed: int, epoch: int) -> Tensor:
    """Which images an epoch shows, one after the other: int64, shape (images,)."""
    generator = generator_of(seed, "order", epoch)
    order = torch.arange(plan.images)
    if plan.members:
        order = _balanced(plan.images, plan.members, generator)
    if plan.windows:
        return plan.windows.shuffled(order, generator)
    return order[torch.randperm(plan.images, generator=generator)]


def _balanced(images: int, members: Members, generator: Generator) -> Tensor:
    """So many images, of each class equally many: all of its images as often as they fit in, and some once more.

    Where they cannot be equally many, chance decides which classes have one more.
    """
    each, rest = divmod(images, len(members.of_class))
    one_more = torch.randperm(len(members.of_class), generator=generator) < rest
    chosen = []
    for numbers, more in zip(members.of_class, one_more.tolist(), strict=True):
        whole, some = divmod(each + more, len(numbers))
        chosen += [numbers.repeat(whole), numbers[torch.randperm(len(numbers), generator=generator)[:some]]]
    return torch.cat(chosen)


@lru_cache(maxsize=2)
def _first_flips(images: int, seed: int) -> Tensor:
    """Which images are mirrored in the first epoch, and in every second one after it."""
    return torch.rand(images, generator=generator_of(seed, "flip", 0)) < 0.5


def _gather(
    images: Tensor, chosen: Tensor | None, indices: Tensor, config: TrainConfig, plan: Plan, step: int, share: Tensor
) -> Tensor:
    """Flip, shift and gather in one look-up: each output pixel names the pixel it comes from.

    Random numbers are drawn on the CPU and for the whole batch, so that they are the same on every device and for any
    number of ranks. They are few.

    Args:
        chosen: the rows of `images` in which the images of the share are; None: `images` are those.
        indices: the numbers of all images of the batch.
    """
    whole, batch, size, device = len(indices), len(indices[share]), images.shape[1], images.device
    generator = generator_of(config.seed, "augment", step)
    rows = cols = torch.arange(size, device=device).expand(batch, size)
    if config.augment.flip != "off":
        mirrored = sent(_mirrored(indices, config, plan, step, generator)[share], device)
        cols = torch.where(mirrored[:, None], size - 1 - cols, cols)
    if config.augment.translate:
        span = 2 * config.augment.translate + 1
        drawn = torch.randint(span, (2, whole, 1), generator=generator)[:, share]
        shifts = sent(drawn, device) - config.augment.translate
        rows, cols = _reflect(rows + shifts[0], size), _reflect(cols + shifts[1], size)
    if rows is cols:
        return images if chosen is None else images.index_select(0, sent(chosen, device))
    chosen = torch.arange(batch, device=device) if chosen is None else sent(chosen, device)
    pixels = (chosen[:, None, None] * size + rows[:, :, None]) * size + cols[:, None, :]
    return images.reshape(-1, 3).index_select(0, pixels.flatten()).view(batch, size, size, 3)


def _mirrored(indices: Tensor, config: TrainConfig, plan: Plan, step: int, generator: Generator) -> Tensor:
    """Which images of a batch are mirrored, bool (batch,).

    Alternating (Jordan, arXiv 2404.00498, section 3.6): chance decides in the first epoch, and from then on each image
    is mirrored in every second epoch, so that two successive epochs show all images both ways.
    """
    if config.augment.flip == "random":
        return torch.rand(len(indices), generator=generator) < 0.5
    epoch, _ = plan.position(step)
    return _first_flips(plan.images, config.seed)[indices] ^ (epoch % 2 == 1)


def _reflect(positions: Tensor, size: int) -> Tensor:
    """Mirror positions outside 0 … size - 1 back inside, without repeating the outermost pixel."""
    positions = positions.abs()
    return torch.where(positions >= size, 2 * (size - 1) - positions, positions)
