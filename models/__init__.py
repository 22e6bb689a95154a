"""Network architectures: torch only, one per file, built by name."""

from importlib import import_module
from typing import TYPE_CHECKING

from models.names import MODELS, check_model_name

if TYPE_CHECKING:  # torch takes seconds to import, and whoever needs only the names does not wait for it
    from torch import nn


def build_model(name: str, num_classes: int) -> "nn.Module":
    """A freshly initialized network for float32 images of shape (batch, 3, 32, 32).

    It returns logits of shape (batch, num_classes). The initial weights come from torch's global
    generator, so that a seed decides them.

    Raises:
        ValueError: there is no such model; the message lists the known ones.
    """
    check_model_name(name)
    module, _, attribute = MODELS[name].partition(":")
    network: nn.Module = getattr(import_module(module), attribute)(num_classes)
    return network
