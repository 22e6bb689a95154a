"""What a network must be, and what it may be besides. `docs/networks.md` shows one that is all of it."""

from collections.abc import Iterable
from typing import NotRequired, Protocol, TypedDict, runtime_checkable

from torch import Tensor, nn


class NetworkFactory(Protocol):
    """A class or function that makes a freshly initialized network."""

    def __call__(self, num_classes: int, image_size: int, /) -> nn.Module:
        """A network for float32 images (batch, 3, image_size, image_size), whose logits are (batch, num_classes).

        Its first weights come from torch's global generator, so that a seed decides them. All that it learns stands
        in its `state_dict`, as tensors. It must be one that `torch.export` can write with a batch of any size.
        """
        ...


@runtime_checkable
class InitializedFromImages(Protocol):
    """A network that sets some of its first weights by looking at training images."""

    def initialize_from(self, images: Tensor) -> None:
        """Called once, before the first step of a run, on the CPU.

        Args:
            images: normalized training images, float32 (images, 3, side, side), as many as have 5 million pixels.
        """
        ...


class ParameterGroup(TypedDict):
    """Parameters that are trained alike."""

    params: Iterable[nn.Parameter]
    scale: NotRequired[float]
    """What the rate of the config is multiplied by, 1 by default."""
    weight_decay: NotRequired[float]
    """Instead of that of the config."""


@runtime_checkable
class Grouped(Protocol):
    """A network whose parts are trained at different rates."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Each parameter that is trained, in one of the groups. Their order must always be the same.

        The optimizer muon makes groups of its own, and does not ask.
        """
        ...
