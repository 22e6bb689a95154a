"""Fast checks that what a config names exists: without torch, numpy, Prefect or a server."""

from collections.abc import Iterable, Mapping
from datetime import datetime
from importlib.util import find_spec
from typing import Any

from models.names import check_model_name
from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data.specs import get_spec
from nightshift.errors import ConfigError


def checked_config(
    recipe: str, overrides: Mapping[str, Any] | None = None, night: datetime | None = None
) -> TrainConfig:
    """A recipe's config with some fields replaced, after a check that everything it names exists.

    Raises:
        ConfigError: as `make_config` and `check_names`.
    """
    config = make_config(recipe, overrides, night)
    check_names(config)
    return config


def check_names(config: TrainConfig) -> None:
    """Raise ConfigError if the network or the data set does not exist; the message lists those that do."""
    get_spec(config.data.dataset)
    try:
        check_model_name(config.model.name)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def check_extras(config: TrainConfig) -> None:
    """Raise ConfigError if the config asks for an optional package that this machine does not have."""
    if config.tracking.tensorboard and not find_spec("tensorboard"):
        raise ConfigError("tracking.tensorboard=true needs a package that is not here: install nightshift[tensorboard]")


def check_places(places: Iterable[str]) -> None:
    """Raise ConfigError if a place of images has an empty name, which would be the folder this process runs in."""
    if "" in places:
        raise ConfigError("an empty name is no place of images: name a file, a folder or s3://BUCKET/PREFIX")
