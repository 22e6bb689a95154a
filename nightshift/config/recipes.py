"""Recipes: named training configs, and what each is for."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from nightshift.config.train import (
    AugmentConfig,
    DataConfig,
    EvaluationConfig,
    HardwareConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
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
            model=ModelConfig(name="quick_cnn"),
            data=DataConfig(batch_size=256, drop_last=True),
            optimizer=OptimizerConfig(name="muon", lr=0.05, momentum=0.6, weight_decay=5e-4, ema_decay=0.9),
            schedule=ScheduleConfig(name="linear", epochs=6),
            augment=AugmentConfig(flip="alternating", translate=2),
            loss=LossConfig(label_smoothing=0.1),
            hardware=HardwareConfig(precision="auto"),
        ),
        "A small network for two CPU cores: over 80 % in a minute or two.",
    ),
    "tutorial": Recipe(
        TrainConfig(
            recipe="tutorial",
            model=ModelConfig(name="simple_cnn"),
            data=DataConfig(batch_size=32, normalization="half"),
            optimizer=OptimizerConfig(name="adam", lr=1e-3),
            schedule=ScheduleConfig(epochs=10),
        ),
        "The PyTorch tutorial's network and loop, unchanged: about 71 %.",
    ),
    "resnet18": Recipe(
        TrainConfig(
            recipe="resnet18",
            model=ModelConfig(name="resnet18"),
            data=DataConfig(batch_size=128, drop_last=True),
            optimizer=OptimizerConfig(name="sgd", lr=0.1, weight_decay=5e-4),
            schedule=ScheduleConfig(name="one_cycle", epochs=30),
            augment=AugmentConfig(flip="random", translate=4),
            loss=LossConfig(label_smoothing=0.1),
            hardware=HardwareConfig(precision="auto"),
        ),
        "torchvision's ResNet-18 with a stem for 32x32 images. For a GPU.",
    ),
    "speedrun": Recipe(
        TrainConfig(
            recipe="speedrun",
            model=ModelConfig(name="speednet"),
            data=DataConfig(batch_size=2000, drop_last=True),
            optimizer=OptimizerConfig(name="muon", lr=0.24, momentum=0.6, weight_decay=0.004),
            schedule=ScheduleConfig(name="linear", epochs=8),
            augment=AugmentConfig(flip="alternating", translate=2),
            loss=LossConfig(label_smoothing=0.2),
            evaluation=EvaluationConfig(tta="crops"),
            hardware=HardwareConfig(precision="auto"),
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
    """The fields in which a config differs from its recipe's, by dotted name: `make_config` makes it of them again."""
    base = get_recipe(config.recipe).config.flat()
    return {name: value for name, value in config.flat().items() if base[name] != value}


def make_config(recipe: str, overrides: Mapping[str, Any] | None = None, night: datetime | None = None) -> TrainConfig:
    """A recipe's config with some fields replaced.

    Args:
        overrides: as for `TrainConfig.override`; besides, the seed `date` stands for a number that is another each
            night, such as 20261125. The config has the number.
        night: whose date that is; now, in UTC, by default.

    Raises:
        ConfigError: the recipe or a field does not exist, or a value is out of range.
    """
    overrides = dict(overrides or {})
    if "recipe" in overrides:
        raise ConfigError("recipe cannot be overridden: name the recipe itself (--recipe)")
    if overrides.get("seed") == "date":
        overrides["seed"] = int(f"{night or datetime.now(UTC):%Y%m%d}")
    return get_recipe(recipe).config.override(overrides)
