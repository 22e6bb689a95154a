"""The networks by name, and the images they take, known without torch, which takes seconds to import.

So a mistyped name, or a network that does not take images of some size, is refused at once.
"""

from typing import NamedTuple

SMALLEST, LARGEST = 16, 512
"""The sides of images, in pixels, between which a network may be asked for. All images are square."""


class Network(NamedTuple):
    """Where a network is made, and the sides of images it takes, in pixels."""

    place: str
    """MODULE:ATTRIBUTE of a callable that takes the number of classes and the side, and returns an `nn.Module`."""
    sizes: range = range(SMALLEST, LARGEST + 1)


MODELS = {
    "quick_cnn": Network("models.quick_cnn:QuickCNN"),
    "resnet18": Network("models.resnet:resnet18"),
    "simple_cnn": Network("models.simple_cnn:SimpleCNN", range(32, 33)),
    "simple_cnn_sequential": Network("models.simple_cnn:simple_cnn_sequential", range(32, 33)),
    "speednet": Network("models.speednet:SpeedNet", range(17, LARGEST + 1)),
}


def known_models() -> list[str]:
    """The names `models.build_model` knows, sorted."""
    return sorted(MODELS)


def check_model_name(name: str) -> None:
    """Raise ValueError, which lists the known models, if this one does not exist."""
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}. The models are: {', '.join(known_models())}")


def check_image_size(name: str, image_size: int) -> None:
    """Raise ValueError, which says which sizes fit and which models take this one, if this model does not.

    Also if there is no such model.
    """
    check_model_name(name)
    sizes = MODELS[name].sizes
    if image_size in sizes:
        return
    fitting = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    others = [other for other in known_models() if image_size in MODELS[other].sizes]
    advice = f"Models that take these: {', '.join(others)}" if others else "No model takes these"
    raise ValueError(
        f"model {name!r} takes images with a side of {fitting} pixels, and these have {image_size}. {advice}"
    )
