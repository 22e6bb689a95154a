"""Network architectures: torch only, one per file, built by name. Those of torchvision and timm are built here too."""

from importlib import import_module
from typing import TYPE_CHECKING

from models.names import MODELS, check_image_size

if TYPE_CHECKING:  # torch takes seconds to import, and whoever needs only the names does not wait for it
    from torch import nn


def build_model(name: str, num_classes: int, image_size: int = 32) -> "nn.Module":
    """A freshly initialized network for float32 images of shape (batch, 3, image_size, image_size).

    It returns logits of shape (batch, num_classes). The initial weights come from torch's global
    generator, so that a seed decides them.

    Args:
        name: one of nightshift's own, `torchvision:NAME` or `timm:NAME`.

    Raises:
        ValueError: there is no such model, and the message lists the known ones; or it takes no images of this size.
    """
    check_image_size(name, image_size)
    library, _, of_library = name.partition(":")
    if of_library:
        return import_module(f"models.from_{library}").build(of_library, num_classes, image_size)  # type: ignore[no-any-return]
    module, _, attribute = MODELS[name].place.partition(":")
    network: nn.Module = getattr(import_module(module), attribute)(num_classes, image_size)
    return network
