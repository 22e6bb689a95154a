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

_SIZES = {
    "alexnet": range(63, LARGEST + 1),
    "convnext": range(32, LARGEST + 1),
    "densenet": range(29, LARGEST + 1),
    "inception": range(75, LARGEST + 1),
    # Squares of 7 by 7 windows are left after each of five halvings.
    "maxvit": range(224, LARGEST + 1, 224),
    "squeezenet1_0": range(21, LARGEST + 1),
    "squeezenet1_1": range(17, LARGEST + 1),
    "vgg": range(32, LARGEST + 1),
    # Whole patches.
    "vit_b_16": range(16, LARGEST + 1, 16),
    "vit_b_32": range(32, LARGEST + 1, 32),
    "vit_h_14": range(28, LARGEST + 1, 14),
    "vit_l_16": range(16, LARGEST + 1, 16),
    "vit_l_32": range(32, LARGEST + 1, 32),
}
"""The sizes of those of torchvision's families that do not take all."""

TORCHVISION = {
    name: next((sizes for family, sizes in _SIZES.items() if name.startswith(family)), range(SMALLEST, LARGEST + 1))
    for name in (
        *("alexnet", "convnext_base", "convnext_large", "convnext_small", "convnext_tiny"),
        *("densenet121", "densenet161", "densenet169", "densenet201"),
        *("efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_b3", "efficientnet_b4"),
        *("efficientnet_b5", "efficientnet_b6", "efficientnet_b7"),
        *("efficientnet_v2_l", "efficientnet_v2_m", "efficientnet_v2_s"),
        *("googlenet", "inception_v3", "maxvit_t", "mnasnet0_5", "mnasnet0_75", "mnasnet1_0", "mnasnet1_3"),
        *("mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"),
        *("regnet_x_16gf", "regnet_x_1_6gf", "regnet_x_32gf", "regnet_x_3_2gf", "regnet_x_400mf", "regnet_x_800mf"),
        *("regnet_x_8gf", "regnet_y_128gf", "regnet_y_16gf", "regnet_y_1_6gf", "regnet_y_32gf", "regnet_y_3_2gf"),
        *("regnet_y_400mf", "regnet_y_800mf", "regnet_y_8gf"),
        *("resnet101", "resnet152", "resnet18", "resnet34", "resnet50"),
        *("resnext101_32x8d", "resnext101_64x4d", "resnext50_32x4d"),
        *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5", "shufflenet_v2_x2_0"),
        *("squeezenet1_0", "squeezenet1_1", "swin_b", "swin_s", "swin_t", "swin_v2_b", "swin_v2_s", "swin_v2_t"),
        *("vgg11", "vgg11_bn", "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"),
        *("vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32", "wide_resnet101_2", "wide_resnet50_2"),
    )
}
"""torchvision's networks for classification by the name that torchvision gives them, and the sizes they take."""


def known_models() -> list[str]:
    """The names of nightshift's own networks, sorted."""
    return sorted(MODELS)


def sizes_of(name: str) -> range | None:
    """The sides of images, in pixels, that a network takes; None where only building it shows them, as for timm's.

    Raises:
        ValueError: there is no such network of nightshift or of torchvision; the message lists those there are.
    """
    library, _, of_library = name.partition(":")
    if library == "timm":
        return None
    if library == "torchvision":
        if of_library not in TORCHVISION:
            raise ValueError(f"torchvision has no network {of_library!r} for classification")
        return TORCHVISION[of_library]
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}. The models are: {', '.join(known_models())}")
    return MODELS[name].sizes


def check_image_size(name: str, image_size: int) -> None:
    """Raise ValueError if a model does not take this size; the message lists the sizes and models that fit.

    Also raised, as by `sizes_of`, if there is no such model.
    """
    sizes = sizes_of(name)
    if sizes is None or image_size in sizes:
        return
    others = [other for other in known_models() if image_size in MODELS[other].sizes]
    advice = f"Models that take these: {', '.join(others)}" if others else "No model takes these"
    raise ValueError(
        f"model {name!r} takes images with a side of {shown_sizes(sizes)} pixels, and these have {image_size}. {advice}"
    )


def shown_sizes(sizes: range) -> str:
    """Sides of images, for people."""
    if len(sizes) <= 2:
        return " or ".join(map(str, sizes))
    return f"{sizes[0]} to {sizes[-1]}" if sizes.step == 1 else f"{sizes[0]}, {sizes[1]} … {sizes[-1]}"
