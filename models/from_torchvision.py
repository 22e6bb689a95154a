"""torchvision's classification networks, for any number of classes and as many sizes as they take."""

from typing import Any

from torch import nn


def build(name: str, num_classes: int, image_size: int) -> nn.Module:
    """The network that torchvision calls `name`, with its own initial weights."""
    from torchvision.models import get_model  # here, because it takes seconds to import

    network: nn.Module = get_model(name, weights=None, num_classes=num_classes, **_more(name, image_size))
    return network


def _more(name: str, image_size: int) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        # In training they would return two more outputs, whose losses somebody has to weigh.
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name == "maxvit_t":
        return {"input_size": (image_size, image_size)}
    return {}
