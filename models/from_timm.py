"""timm's networks, for any number of classes. They need the extra `nightshift[timm]`."""

from typing import Any

from torch import nn


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


def names() -> list[str]:
    """All that timm calls its networks."""
    import timm

    found: list[str] = timm.list_models()
    return found
