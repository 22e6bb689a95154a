"""What the parts share: where they compute, what they train on, and a store that outlives a process."""

import pickle
import sqlite3
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

from nightshift.checkpoints.payload import Payload, read_payload
from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data.datasets import Dataset, channel_statistics
from nightshift.errors import TrainingInterrupted
from nightshift.hardware import find_device
from nightshift.records.run import RunRecord, read_record
from nightshift.refs import DatasetRef
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from nightshift.training.loop import RankOrders
from nightshift.training.ranks import ALONE, Ranks
from nightshift.training.run import Job, train_on
from nightshift.workspace import Workspace

CLASSES, SIDE = 10, 32
REF = DatasetRef(name="cifar10", digest="0" * 64, key="datasets/made-up", source="made up", classes=CLASSES)


class NoGpuError(Exception):
    """A part needs a GPU, and torch finds none."""


class Figure(NamedTuple):
    """Something that a part has found, and whether what is promised of it holds."""

    name: str
    value: str | float
    holds: bool = True


@dataclass(frozen=True)
class Stage:
    """Where the parts take place."""

    home: Path
    """A folder of their own."""
    data: Path | None = None
    """CIFAR-10 as nightshift packs it (NIGHTSHIFT_HOME/datasets/*.safetensors); none: images are made up."""
    seconds: float = 60
    """How long a part may go on that can go on for ever."""

    @property
    def device(self) -> torch.device:
        return find_device()

    @property
    def is_small(self) -> bool:
        """Whether a part is to do little, because it only shows that it works."""
        return self.device.type == "cpu"

    def gpu(self) -> torch.device:
        """Raises NoGpuError if there is none."""
        if self.device.type != "cuda":
            raise NoGpuError("no GPU here")
        return self.device


def made_up(train: int, test: int = 200) -> Dataset:
    """Images of 32 by 32 pixels, a class of which has a colour of its own under noise."""
    chance = np.random.default_rng(0)
    colours = chance.integers(64, 192, (CLASSES, 3))
    parts: dict[str, Any] = {}
    for split, count in (("train", train), ("test", test)):
        labels = chance.integers(0, CLASSES, count, dtype=np.uint8)
        noise = chance.integers(-60, 60, (count, SIDE, SIDE, 3))
        parts[f"{split}_images"] = (colours[labels][:, None, None] + noise).astype(np.uint8)
        parts[f"{split}_labels"] = labels
    return _dataset(parts)


def images_of(stage: Stage) -> Dataset:
    """CIFAR-10, or as many images that are made up; few where the parts are small."""
    if stage.data:
        return _dataset({name: array.numpy() for name, array in load_file(stage.data).items() if "content" not in name})
    return made_up(400, 100) if stage.is_small else made_up(50_000, 10_000)


def _dataset(parts: dict[str, Any]) -> Dataset:
    mean, std = channel_statistics([parts["train_images"]])
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in parts.items()}
    names = tuple(f"class {number}" for number in range(CLASSES))
    return Dataset(REF.name, REF.digest, names, **tensors, mean=mean, std=std)


def config_of(recipe: str = "quick", **overrides: Any) -> TrainConfig:
    """A recipe that saves at its end only, unless told otherwise."""
    return make_config(recipe, {"checkpoint_every_seconds": None, **overrides})


def at(stop: int | None) -> Callable[[int], bool]:
    """Whether this step is done; None: never."""
    return lambda step: step == stop


def train(
    home: Path,
    store: Store,
    run_id: str,
    config: TrainConfig,
    dataset: Dataset,
    should_stop: Callable[[int], bool] = lambda step: False,
    ranks: Ranks = ALONE,
) -> RunRecord:
    """Train a run as far as it goes, from where it stands."""
    job = Job(run_id=run_id, config=config, dataset=REF)
    with suppress(TrainingInterrupted):
        train_on(dataset, ranks, workspace_of(store, home), job, RankOrders(should_stop))
    return read_record(store, run_id)[0]


def workspace_of(store: Store, home: Path) -> Workspace:
    return Workspace(store, home, lease_seconds=600, save_retry_seconds=5)


def last_payload(store: Store, run_id: str) -> Payload:
    return read_payload(store, read_record(store, run_id)[0].checkpoints[-1])


class KeptStore(MemoryStore):
    """A store whose objects lie in a file, so that the next process finds them, whatever this one dies of."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._objects = _Rows(path)  # type: ignore[assignment]


class _Rows(MutableMapping[str, Any]):
    def __init__(self, path: Path) -> None:
        # The store asks from several threads, one at a time.
        self._file = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        self._file.execute("PRAGMA synchronous = OFF")  # a process may die here, the machine does not
        self._file.execute("CREATE TABLE IF NOT EXISTS objects (key TEXT PRIMARY KEY, value BLOB)")

    def __getitem__(self, key: str) -> Any:
        for (value,) in self._file.execute("SELECT value FROM objects WHERE key = ?", (key,)):
            return pickle.loads(value)
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        self._file.execute("REPLACE INTO objects VALUES (?, ?)", (key, pickle.dumps(value)))

    def __delitem__(self, key: str) -> None:
        if not self._file.execute("DELETE FROM objects WHERE key = ?", (key,)).rowcount:
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter([key for (key,) in self._file.execute("SELECT key FROM objects")])

    def __len__(self) -> int:
        return len(list(iter(self)))
