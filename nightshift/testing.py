"""For the tests of a team: whether a network, a loss or a transform of its own is what nightshift needs."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import nn
from torch.nn import functional as F

from models.protocols import NetworkFactory
from nightshift.data import transforms
from nightshift.data.transforms import Transform
from nightshift.errors import ConfigError
from nightshift.networks import Attempt
from nightshift.publishing.export import FORMATS, export
from nightshift.training.losses import LossFactory, check_own_loss


def check_model(make: NetworkFactory, classes: int = 10, image_size: int = 32) -> None:
    """Check that a network can be trained, resumed to the same bits, published, and exported to all formats.

    `onnx` is left out where `nightshift[onnx]` is not installed.

    Args:
        make: what a config would name; called with the number of classes and the side of the images in pixels.

    Raises:
        ConfigError, ExportError: it cannot. The message names the first promise that it breaks.
    """
    name = getattr(make, "__qualname__", type(make).__name__)
    with torch.random.fork_rng(devices=[]):
        attempt = Attempt(name, make.__module__.partition(".")[0], classes, image_size)
        first, second, third = (_seeded(attempt, make) for _ in range(3))
        attempt.check(third, smallest_batch=2, averaged=True, exported=True)
        weights, others = first.state_dict(), second.state_dict()
        if weights.keys() != others.keys() or not all(torch.equal(weights[key], others[key]) for key in weights):
            raise ConfigError(
                f"model {name!r}: the same seed gives other weights. Draw them from torch's generator only"
            )
        images = torch.randn(4, 3, image_size, image_size).to(memory_format=torch.channels_last)
        # Train a step, so that the export shows if the network keeps anything it learns outside its state_dict.
        loss = F.cross_entropy(first.train()(images), torch.arange(4) % classes)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.optim.SGD(first.parameters(), lr=0.01).step()
        for kind in FORMATS:
            if kind != "onnx" or all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
                export(first.eval(), second, images, kind)


def check_loss(make: LossFactory, classes: int = 10, mixed: bool = True) -> None:
    """Check that a loss can be trained with, by any number of processes, and resumed to the same bits.

    Args:
        make: what a config would name; called with the number of classes and the labels of all training images.
        mixed: whether it is to take the targets of mixup and cutmix as well.

    Raises:
        ConfigError: it cannot. The message names the first promise that it breaks.
    """
    name = getattr(make, "__qualname__", type(make).__name__)
    check_own_loss(name, torch.arange(20 * classes) % classes, classes, mixed, make)


def check_transform(make: Callable[[int], Transform], image_size: int = 32) -> None:
    """Check that a transform makes images of images, and the same of the same, as a function of the seed.

    Args:
        make: what a config would name; called with the side of the images in pixels.

    Raises:
        ConfigError: it does not. The message names the first promise that it breaks.
    """
    transforms.check_transform(getattr(make, "__qualname__", type(make).__name__), image_size, make)


def _seeded(attempt: Attempt, make: NetworkFactory) -> nn.Module:
    torch.manual_seed(0)
    return attempt.make(make).to(memory_format=torch.channels_last)
