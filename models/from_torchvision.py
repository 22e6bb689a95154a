"""torchvision's classification networks, for any number of classes and as many sizes as they take."""

from typing import Any

from torch import Tensor, nn


def build(name: str, num_classes: int, image_size: int) -> nn.Module:
    """The network that torchvision calls `name`, with its own initial weights."""
    from torchvision.models import get_model  # here, because it takes seconds to import

    network: nn.Module = get_model(name, weights=None, num_classes=num_classes, **_more(name, image_size))
    return network


def pretrained(name: str) -> dict[str, Tensor]:
    """The weights that torchvision publishes for a network, by tensor; downloaded, unless its cache has them."""
    from torchvision.models import get_model_weights

    weights: dict[str, Tensor] = get_model_weights(name).DEFAULT.get_state_dict(progress=False, check_hash=True)
    return weights


def statistics(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, on the scale 0 to 1, that normalized the images for these weights."""
    from torchvision.models import get_model_weights

    transforms = get_model_weights(name).DEFAULT.transforms()
    return list(transforms.mean), list(transforms.std)


def _more(name: str, image_size: int) -> dict[str, Any]:
    if name in ("googlenet", "inception_v3"):
        # In training they would return two more outputs, whose losses somebody has to weigh.
        return {"aux_logits": False, "init_weights": True}
    if name.startswith("vit_"):
        return {"image_size": image_size}
    if name == "maxvit_t":
        return {"input_size": (image_size, image_size)}
    return {}
