"""Trainings in which the validation images choose an epoch: of noise, so that the best epoch is rarely the last."""

from pathlib import Path
from typing import Any

from nightshift.config.train import TrainConfig
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.judging import nights

SPLIT = {"test": 0.2, "validation": 0.3, "by": "image"}


def images(workspace: Workspace, root: Path, **changed: Any) -> DatasetRef:
    """Three classes of noise, of which nothing can be learned but by heart."""
    classes = {name: range(60 * place, 60 * place + 60) for place, name in enumerate(("bolt", "nut", "screw"))}
    return nights.images(workspace, root, classes, split={**SPLIT, **changed})


def config(**overrides: Any) -> TrainConfig:
    """Some epochs of a few steps, and no checkpoint but what an epoch is worth."""
    base = {"dataset": nights.NAME, "max_train_images": 64, "batch_size": 16, "epochs": 6, "lr": 0.003}
    choice = {"validate_every": 1, "keep": "best", "keep_last": 1, "keep_best": False}
    return small_config("tutorial", **{**base, **choice, **overrides})
