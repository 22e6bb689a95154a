"""timm's networks, for any number of classes. They need the extra `nightshift[timm]`."""

from typing import Any

from torch import Tensor, nn


def build(name: str, num_classes: int, image_size: int) -> nn.Module:
    """The network that timm calls `name`, with its own initial weights.

    Raises:
        ValueError: timm has no such network.
    """
    import timm  # here, because it takes seconds to import, and need not be installed

    # Only its own networks: timm also takes addresses of hubs and of folders, which say what is to be built.
    if name not in names():
        raise ValueError(f"timm {timm.__version__} has no network {name!r}: `nightshift models` lists those it has")
    known = timm.get_pretrained_cfg(name)
    more: dict[str, Any] = {"img_size": image_size} if known and known.fixed_input_size else {}
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, **more)
    return network


def pretrained(name: str) -> dict[str, Tensor]:
    """The weights that timm publishes for a network, by tensor; downloaded, unless its cache has them."""
    import timm

    weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    return weights


def statistics(name: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel, on the scale 0 to 1, that normalized the images for these weights."""
    import timm

    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    return list(config.mean), list(config.std)


def names() -> list[str]:
    """All that timm calls its networks."""
    import timm

    found: list[str] = timm.list_models()
    return found
