"""Augmentation by torchvision: transforms of single images, and what mixes two into one.

torchvision draws from torch's global generator. Here it is given a seed of its own for each image and each batch, and
put back afterwards, so the model's dropout draws what it would have drawn anyway. torchvision is imported only where a
config asks for it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Generator, Tensor

from nightshift.config.sections import AugmentConfig
from nightshift.data.chance import key_of


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
    with _one_thread(), _global_generator() as generator:
        for number, place in enumerate(places):
            generator.manual_seed(key_of(seed, "image", epoch, place))
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
def _transform(augment: AugmentConfig, side: int, mean: tuple[float, ...]) -> Callable[[Tensor], Tensor]:
    """One image, uint8 (3, side, side) → the same, changed."""
    from torchvision.transforms import v2

    steps: list[Callable[[Tensor], Tensor]] = []
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
    return v2.Compose(steps)  # type: ignore[no-any-return]


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
def _one_thread() -> Iterator[None]:
    """Compute in one thread. The mean of a large image depends on how many share it; a small one is ready sooner."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
