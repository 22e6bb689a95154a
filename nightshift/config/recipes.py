"""Recipes: named training configs, and what each is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nightshift.config.train import TrainConfig
from nightshift.errors import ConfigError


@dataclass(frozen=True)
class Recipe:
    """A named config and one line that says what it is for."""

    config: TrainConfig
    detail: str


_RECIPES = {
    "quick": Recipe(
        TrainConfig(
            recipe="quick",
            model="quick_cnn",
            epochs=6,
            batch_size=256,
            optimizer="muon",
            lr=0.05,
            momentum=0.6,
            weight_decay=5e-4,
            schedule="linear",
            ema_decay=0.9,
            label_smoothing=0.1,
            flip="alternating",
            translate=2,
            drop_last=True,
            precision="auto",
        ),
        "A small network for two CPU cores: over 80 % in a minute or two.",
    ),
    "tutorial": Recipe(
        TrainConfig(
            recipe="tutorial",
            model="simple_cnn",
            epochs=10,
            batch_size=32,
            optimizer="adam",
            lr=1e-3,
            normalization="half",
        ),
        "The PyTorch tutorial's network and loop, unchanged: about 71 %.",
    ),
    "resnet18": Recipe(
        TrainConfig(
            recipe="resnet18",
            model="resnet18",
            epochs=30,
            batch_size=128,
            optimizer="sgd",
            lr=0.1,
            weight_decay=5e-4,
            schedule="one_cycle",
            label_smoothing=0.1,
            flip="random",
            translate=4,
            drop_last=True,
            precision="auto",
        ),
        "torchvision's ResNet-18 with a stem for 32x32 images. For a GPU.",
    ),
    "speedrun": Recipe(
        TrainConfig(
            recipe="speedrun",
            model="speednet",
            epochs=8,
            batch_size=2000,
            optimizer="muon",
            lr=0.24,
            momentum=0.6,
            weight_decay=0.004,
            schedule="linear",
            label_smoothing=0.2,
            flip="alternating",
            translate=2,
            tta="crops",
            drop_last=True,
            precision="auto",
        ),
        "The published ideas for training fast: 94 % in 8 epochs. For a GPU.",
    ),
}


def recipe_names() -> list[str]:
    return sorted(_RECIPES)


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in _RECIPES:
        raise ConfigError(f"there is no recipe {name!r}. The recipes are: {', '.join(recipe_names())}")
    return _RECIPES[name]


def overrides_of(config: TrainConfig) -> dict[str, Any]:
    """The fields in which a config differs from its recipe's: what `make_config` makes it of again."""
    base = get_recipe(config.recipe).config.model_dump()
    return {name: value for name, value in config.model_dump().items() if base[name] != value}


def make_config(recipe: str, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """A recipe's config with some fields replaced.

    Raises:
        ConfigError: the recipe or a field does not exist, or a value is out of range.
    """
    overrides = dict(overrides or {})
    if "recipe" in overrides:
        raise ConfigError("recipe cannot be overridden: name the recipe itself (--recipe)")
    return get_recipe(recipe).config.override(overrides)
