"""Network architectures: torch only, one a file, built by name."""

from collections.abc import Callable

from torch import nn

from models.quick_cnn import QuickCNN
from models.resnet import resnet18
from models.simple_cnn import SimpleCNN, simple_cnn_sequential
from models.speednet import SpeedNet

_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "quick_cnn": QuickCNN,
    "resnet18": resnet18,
    "simple_cnn": SimpleCNN,
    "simple_cnn_sequential": simple_cnn_sequential,
    "speednet": SpeedNet,
}


def known_models() -> list[str]:
    """The names `build_model` knows, sorted."""
    return sorted(_MODELS)


def build_model(name: str, num_classes: int) -> nn.Module:
    """A freshly initialized network for float32 images of shape (batch, 3, 32, 32).

    It returns logits of shape (batch, num_classes). The initial weights come from torch's global
    generator, so that a seed decides them.

    Raises:
        ValueError: there is no such model; the message lists those there are.
    """
    if name not in _MODELS:
        raise ValueError(f"there is no model {name!r}. The models are: {', '.join(known_models())}")
    return _MODELS[name](num_classes)
