"""The names of the networks, known without torch, which takes seconds to import: a mistyped name is refused at once."""

MODELS = {
    "quick_cnn": "models.quick_cnn:QuickCNN",
    "resnet18": "models.resnet:resnet18",
    "simple_cnn": "models.simple_cnn:SimpleCNN",
    "simple_cnn_sequential": "models.simple_cnn:simple_cnn_sequential",
    "speednet": "models.speednet:SpeedNet",
}
"""For each name, a module and the callable in it that takes the number of classes."""


def known_models() -> list[str]:
    """The names `models.build_model` knows, sorted."""
    return sorted(MODELS)


def check_model_name(name: str) -> None:
    """Raise ValueError, which lists the known models, if this one does not exist."""
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}. The models are: {', '.join(known_models())}")
