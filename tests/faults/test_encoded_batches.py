"""The first 200 batches of encoded images, augmented: the same in every process, whatever happens on the way."""

import hashlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from nightshift.data import parts
from nightshift.data.batches import Batches, make_plan
from nightshift.data.datasets import open_dataset
from nightshift.data.packed import pack_snapshot
from nightshift.local.s3 import embedded_s3
from nightshift.refs import DatasetRef
from nightshift.training.ranks import Ranks
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.data.made import made
from tests.data.pictures import album, write
from tests.forked import forked

CONFIG = small_config(
    "quick",
    **{"max_train_images": None, "batch_size": 16, "epochs": 30},
    **{"crop": 0.6, "flip": "random", "translate": 2, "randaugment": 9, "erasing": 0.5, "mixup": 0.4},
)
BATCHES, HALF = 200, 100
FEW = 1e-5
"""Gigabytes in which only the newest shard has room: the others are fetched again in each epoch."""


def images_of(
    served: Path, home: Path, dataset: DatasetRef, rank: int, ranks: int, threads: int, steps: range, half_way: str
) -> list[list[str]]:
    """The sha256 of each image of a rank's part, and its label, batch by batch.

    Args:
        served: whose S3 server is used.
        home: where the shards are cached.
        half_way: what happens there.
    """
    with embedded_s3(served, "images") as store:
        opened = open_dataset(Workspace(store, home, 60, 60, cache_gigabytes=FEW), dataset, threads)
        reader = Batches(opened, CONFIG, make_plan(CONFIG, opened), Ranks(rank, ranks).share_of)
        found = []
        for step in steps:
            if step == HALF and half_way:
                strike(half_way, served)
            images, labels, *_ = reader.batch(step)
            found.append(
                [
                    f"{hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()} {label}"
                    for image, label in zip(images, labels.tolist(), strict=True)
                ]
            )
        return found


def strike(what: str, served: Path) -> None:
    server = int((served / "s3" / "server.pid").read_text().split()[2])
    if what == "the process dies":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "the store dies":  # its supervisor starts it again
        os.kill(server, signal.SIGKILL)
    else:
        os.kill(server, signal.SIGSTOP)
        threading.Timer(60, os.kill, (server, signal.SIGCONT)).start()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of a server that only this file uses."""
    home = tmp_path_factory.mktemp("served")
    with embedded_s3(home):
        yield home


@pytest.fixture(scope="module")
def dataset(served: Path, tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    folder = tmp_path_factory.mktemp("album")
    write(folder, album(range(200), ("ant", "bee", "cow")))
    with pytest.MonkeyPatch.context() as patched, embedded_s3(served, "images") as store:
        patched.setattr(parts, "_IMAGES", 25)
        return pack_snapshot(Workspace(store, served, 60, 60), made(store, folder, storage="encoded"))


Read = Callable[..., list[list[str]]]


@pytest.fixture
def read(served: Path, dataset: DatasetRef, tmp_path: Path) -> Read:
    """The batches as processes of their own have them, one a rank, put together."""

    def all_ranks(
        steps: range, ranks: int = 1, threads: int = 1, cache: str = "warm", half_way: str = ""
    ) -> list[list[str]]:
        home = served if cache == "warm" else tmp_path / cache
        with ProcessPoolExecutor(ranks, mp_context=forked()) as pool:
            jobs: list[Any] = [
                pool.submit(images_of, served, home, dataset, rank, ranks, threads, steps, half_way)
                for rank in range(ranks)
            ]
            shares = [job.result() for job in jobs]
        return [list(chain.from_iterable(share)) for share in zip(*shares, strict=True)]

    return all_ranks


@pytest.fixture(scope="module")
def expected(served: Path, dataset: DatasetRef) -> list[list[str]]:
    """In one process without any cache but that of the first epoch."""
    with ProcessPoolExecutor(1, mp_context=forked()) as pool:
        return pool.submit(images_of, served, served, dataset, 0, 1, 1, range(BATCHES), "").result()


@pytest.mark.parametrize(
    ("ranks", "threads"),
    [(2, 3), *(pytest.param(*both, marks=pytest.mark.soak) for both in ((1, 0), (1, 8), (2, 0), (4, 1), (4, 8)))],
)
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_every_process_of_any_number_of_ranks_has_the_same_batches(
    read: Read, expected: list[list[str]], ranks: int, threads: int, cache: str
) -> None:
    assert sum(map(len, expected)) == BATCHES * 16
    assert read(range(BATCHES), ranks, threads, cache) == expected


def test_a_process_that_goes_on_for_a_killed_one_has_the_same_batches(read: Read, expected: list[list[str]]) -> None:
    with pytest.raises(BrokenProcessPool):
        read(range(BATCHES), ranks=2, cache="killed", half_way="the process dies")
    assert read(range(HALF, BATCHES), ranks=2, cache="killed") == expected[HALF:]


@pytest.mark.parametrize(
    "what", ["the store dies", pytest.param("the store is silent for a minute", marks=pytest.mark.soak)]
)
def test_a_store_that_is_away_in_mid_epoch_is_waited_for(read: Read, expected: list[list[str]], what: str) -> None:
    assert read(range(BATCHES), cache="cold", half_way=what) == expected
