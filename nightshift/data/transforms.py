"""Augmentation: transforms of single images, by torchvision and by a team's own code, and what mixes two into one.

torchvision draws from torch's global generator. Here it is given a seed of its own for each image and each batch, and
put back afterwards, so the model's dropout draws what it would have drawn anyway. For a team's own code the same holds
of Python's and numpy's global generators. torchvision is imported only where a config asks for it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache

import numpy as np
import torch
from torch import Generator, Tensor

from nightshift import plugins
from nightshift.config.sections import AugmentConfig
from nightshift.data.chance import key_of
from nightshift.errors import ConfigError
from nightshift.networks import kind_of

Transform = Callable[[Tensor], Tensor]
"""An image, uint8 (3, side, side), → another, of the same shape and dtype."""
_PAGE = "docs/training.md says what a transform has to be"


def transformed(
    images: Tensor, augment: AugmentConfig, seed: int, epoch: int, places: Sequence[int], mean: tuple[float, ...]
) -> Tensor:
    """Each image changed by itself: cropped, by RandAugment or TrivialAugment, in its colours, then partly covered.

    What is drawn is a function of the seed, the epoch and the image's place in the epoch's order. Without balanced
    sampling that is a function of (seed, epoch, image); with it, an image that is shown twice looks different.

    Args:
        images: uint8 (batch, side, side, 3), on the CPU, where they give the same bits for every device.
        places: of each image in the order of its epoch.
        mean: the colour to cover with, on the scale 0 to 255.
    """
    transform = _transform(augment, images.shape[1], mean)
    changed = torch.empty_like(images)
    with _one_thread(), _global_generator() as generator, _other_generators() if augment.transform else nullcontext():
        for number, place in enumerate(places):
            key = key_of(seed, "image", epoch, place)
            generator.manual_seed(key)
            if augment.transform:
                _seed_others(key)
            changed[number] = transform(images[number].permute(2, 0, 1)).permute(1, 2, 0)
    return changed


def mixed(
    images: Tensor, labels: Tensor, augment: AugmentConfig, classes: int, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Each image but the first mixed with the one before it: by mixup, by cutmix, or by one of them chosen by chance.

    Zhang et al., arXiv 1710.09412, and Yun et al., arXiv 1905.04899. One weight or rectangle is drawn a batch, as a
    function of seed and step.

    Args:
        images: uint8 (1 + batch, side, side, 3).
        labels: int64 (1 + batch,).

    Returns:
        uint8 images (batch, side, side, 3), and float32 targets (batch, classes), each of which sums to 1.
    """
    with _global_generator() as generator:
        generator.manual_seed(key_of(seed, "mix", step))
        pixels, targets = _mixer(augment, classes)(images.permute(0, 3, 1, 2).float(), labels)
    return pixels[1:].permute(0, 2, 3, 1).round().to(torch.uint8, memory_format=torch.contiguous_format), targets[1:]


@lru_cache(maxsize=2)
def _transform(augment: AugmentConfig, side: int, mean: tuple[float, ...]) -> Transform:
    from torchvision.transforms import v2

    steps: list[Transform] = []
    if augment.crop < 1:
        steps.append(v2.RandomResizedCrop(side, scale=(augment.crop, 1.0)))  # Szegedy et al., arXiv 1409.4842
    if augment.randaugment:
        steps.append(v2.RandAugment(magnitude=augment.randaugment))  # Cubuk et al., arXiv 1909.13719
    if augment.trivialaugment:
        steps.append(v2.TrivialAugmentWide())  # Müller and Hutter, arXiv 2103.10158
    if augment.jitter or augment.hue:
        steps.append(v2.ColorJitter(augment.jitter, augment.jitter, augment.jitter, augment.hue))
    if augment.erasing:
        steps.append(v2.RandomErasing(augment.erasing, value=list(mean)))  # Zhong et al., arXiv 1708.04896
    if augment.transform:
        steps.append(own_transform(augment.transform, plugins.load(augment.transform, plugins.TRANSFORM), side))
    return v2.Compose(steps)  # type: ignore[no-any-return]


def own_transform(name: str, make: Callable[[int], Transform], side: int) -> Transform:
    """A transform of a team's own, whose mistakes become sentences.

    Args:
        make: what `name` names; called with the side of the images.

    Raises:
        ConfigError: it cannot be made. What is returned raises it too, for an image that it cannot change.
    """
    what, package = f"transform {name!r}", make.__module__.partition(".")[0]
    with plugins.told(f"{what} cannot be made for images of {side} pixels", package):
        transform = make(side)
    if not callable(transform):
        raise ConfigError(f"{what} is made as {kind_of(transform)}, which cannot be called. {_PAGE}")

    def changed(image: Tensor) -> Tensor:
        shape = image.shape
        with plugins.told(f"{what} fails", package):
            found = transform(image)
        if not isinstance(found, Tensor) or (found.dtype, found.shape) != (torch.uint8, shape):
            raise ConfigError(f"{what} returns {kind_of(found)}, not an image, torch.uint8 {tuple(shape)}. {_PAGE}")
        return found

    return changed


def check_transform(name: str, side: int, make: Callable[[int], Transform] | None = None) -> None:
    """Find out, on made-up images, whether a transform of a team's own can be trained with and resumed exactly.

    Args:
        make: what `name` names, if that is not to be looked up.

    Raises:
        ConfigError: it cannot. The message names the first thing that is wrong.
    """
    make = make or plugins.load(name, plugins.TRANSFORM)
    images = torch.randint(256, (4, 3, side, side), dtype=torch.uint8, generator=Generator().manual_seed(0))

    def seen(transform: Transform, number: int) -> Tensor:
        generator.manual_seed(number)
        _seed_others(number)
        return transform(images[number].clone())

    with _one_thread(), _global_generator() as generator, _other_generators():
        used = own_transform(name, make, side)
        for number in range(len(images)):
            first = seen(used, number)
            if not torch.equal(first, seen(own_transform(name, make, side), number)):
                raise ConfigError(
                    f"transform {name!r} makes another image of the same one, from the same seed: it must remember "
                    f"nothing, and draw from the global generators of torch, numpy and random only. {_PAGE}"
                )


@lru_cache(maxsize=2)
def _mixer(augment: AugmentConfig, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from torchvision.transforms import v2

    ways = []
    if augment.mixup:
        ways.append(v2.MixUp(alpha=augment.mixup, num_classes=classes))
    if augment.cutmix:
        ways.append(v2.CutMix(alpha=augment.cutmix, num_classes=classes))
    return v2.RandomChoice(ways)  # type: ignore[no-any-return]


@contextmanager
def _global_generator() -> Iterator[Generator]:
    """torch's global generator on the CPU, to be seeded at will; afterwards it is as it was."""
    with torch.random.fork_rng(devices=[]):
        yield torch.default_generator


@contextmanager
def _other_generators() -> Iterator[None]:
    """Python's and numpy's global generators, to be seeded at will; afterwards they are as they were."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _seed_others(key: int) -> None:
    random.seed(key)
    np.random.seed(key % 2**32)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute in one thread. The mean of a large image depends on how many share it; a small one is ready sooner."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
