"""Stored configs of older formats, which are read as ones of today."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from nightshift.errors import ConfigError

FORMAT = 2
"""Format 1 had all fields on one level, and no number."""

_SECTIONS_OF_FORMAT_1 = {
    "": ("recipe", "seed"),
    "data": ("dataset", "max_train_images", "batch_size", "drop_last", "normalization"),
    "optimizer": ("lr", "momentum", "weight_decay", "ema_decay"),
    "schedule": ("epochs",),
    "augment": ("flip", "translate"),
    "loss": ("label_smoothing",),
    "evaluation": ("tta",),
    "saving": ("checkpoint_every_steps", "checkpoint_every_seconds", "keep_last", "keep_best", "keep_every_epochs"),
    "hardware": ("device", "nproc_per_node", "precision", "compile", "deterministic"),
    "tracking": ("tensorboard",),
}
_NAMES_OF_FORMAT_1 = ("model", "optimizer", "schedule")


def of_newest_format(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config as today's format has it, whatever format it was written in.

    Raises:
        ConfigError: a newer nightshift has written it.
    """
    number = values.get("format", FORMAT if isinstance(values.get("model"), Mapping | BaseModel) else 1)
    if isinstance(number, int) and number > FORMAT:
        raise ConfigError(
            f"the config was written by a newer nightshift (format {number}; this one reads up to {FORMAT}): "
            "update nightshift"
        )
    if number != 1:
        return values
    nested: dict[str, Any] = {}
    flat = dict(values)
    flat.pop("format", None)
    for section, names in _SECTIONS_OF_FORMAT_1.items():
        place = nested.setdefault(section, {}) if section else nested
        place.update({name: flat.pop(name) for name in names if name in flat})
    for name in _NAMES_OF_FORMAT_1:
        if name in flat:
            nested.setdefault(name, {})["name"] = flat.pop(name)
    return nested | flat  # what is left is no field, and is named in the error
