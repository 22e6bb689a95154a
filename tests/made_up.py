"""Made-up data sets of any size of images and any number of classes, which a small network learns in a few steps."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nightshift.config.train import TrainConfig
from nightshift.data.datasets import Dataset, channel_statistics
from nightshift.data.packed import write_packed
from nightshift.data.specs import Arrays
from nightshift.disk import complete_file
from nightshift.errors import TrainingInterrupted
from nightshift.records.snapshots import rows_key
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.stores import memory_store

NAME = "made-up"
STRANGE = ("a\nb", "=1+1", "<b>bold</b>", "ok | not", "Ägypten", "名前", "")
"""What classes may be called."""


def classes_of(count: int) -> tuple[str, ...]:
    return (*STRANGE[:count], *(f"class {number}" for number in range(len(STRANGE), count)))


def arrays_of(size: int, classes: int, train: int = 96, test: int = 40, seed: int = 0) -> Arrays:
    """Images of a class have a colour of their own, under noise. Some classes may have no image."""
    chance = np.random.default_rng((seed, size, classes))
    colours = chance.integers(40, 216, (classes, 3))
    arrays: Arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = chance.integers(0, classes, count)
        noise = chance.integers(-40, 40, (count, size, size, 3))
        arrays[f"{split}_images"] = (colours[labels][:, None, None] + noise).astype(np.uint8)
        arrays[f"{split}_labels"] = labels.astype(np.uint8 if classes <= 256 else np.int32)
    return arrays


def made_up(size: int, classes: int, **counts: int) -> Dataset:
    """Such a data set in memory."""
    arrays = arrays_of(size, classes, **counts)
    mean, std = channel_statistics([arrays["train_images"]])
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Dataset(
        NAME,
        "0" * 64,
        classes_of(classes),
        **tensors,
        mean=mean,
        std=std,
    )


def known(workspace: Workspace, size: int, classes: int, **counts: int) -> DatasetRef:
    """Such a data set, packed on this machine."""
    arrays, names = arrays_of(size, classes, **counts), classes_of(classes)
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in arrays.items()}
    digest = hashlib.sha256(json.dumps([sums, names]).encode()).hexdigest()
    contents = b"".join(hashlib.sha256(image.tobytes()).digest() for image in arrays["test_images"])
    arrays["test_content"] = np.frombuffer(contents, np.uint8).reshape(-1, 32)
    with complete_file(workspace.home / "datasets" / f"{digest}.safetensors") as file:
        write_packed(file.name, NAME, names, arrays, "stretch")
    key = rows_key(NAME, digest)
    return DatasetRef(name=NAME, digest=digest, key=key, source="nowhere", classes=classes, image_size=size)


def in_memory(home: Path) -> Workspace:
    """A workspace of its own, whose store is gone with it."""
    return Workspace(memory_store(), home, lease_seconds=60, save_retry_seconds=5)


def config_of(**overrides: Any) -> TrainConfig:
    """Some steps of the quick network on a made-up data set."""
    base = {"dataset": NAME, "max_train_images": None, "batch_size": 16, "epochs": 3, "lr": 0.05}
    return small_config("quick", **{**base, **overrides})


def whole_and_in_parts(
    workspace: Workspace, config: TrainConfig, dataset: DatasetRef, stops: Iterable[int]
) -> tuple[CheckpointRef, CheckpointRef]:
    """The ends of two runs: `whole`, and `parts`, which is stopped after these steps and gone on with each time."""
    whole = train_alone(workspace, "whole", config, dataset)
    for stop in stops:
        with pytest.raises(TrainingInterrupted):
            train_alone(workspace, "parts", config, dataset, should_stop=lambda step, stop=stop: step == stop)  # type: ignore[misc]
    return whole, train_alone(workspace, "parts", config, dataset)
