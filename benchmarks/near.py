"""Near duplicates across CIFAR-10's training and test images: how many there are, and a picture of the first twenty.

.venv/bin/python -m benchmarks.near near.png
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from nightshift.data.datasets import open_dataset
from nightshift.data.known import fetch, pack
from nightshift.data.near import LEAST_ALIKE, near_pairs
from nightshift.storage.memory import MemoryStore
from nightshift.workspace import Workspace

_SHOWN, _COLUMNS, _SCALE = 20, 5, 3


def main(picture: str) -> None:
    with tempfile.TemporaryDirectory() as home:
        workspace = Workspace(MemoryStore(), Path(home), lease_seconds=60, save_retry_seconds=5)
        dataset = open_dataset(workspace, pack(workspace, fetch(workspace, "cifar10")))
        test, train = dataset.test_images[:].numpy(), dataset.train_images[:].numpy()
        candidates = near_pairs("test", test, train)
    near = [pair for pair in candidates if pair.alike >= LEAST_ALIKE]
    print(f"{len(candidates):,} candidates, {len(near):,} pairs of {len({pair.image for pair in near}):,} test images")
    tiles = [np.concatenate([test[pair.image], train[pair.train]], axis=1) for pair in near[:_SHOWN]]
    rows = [np.concatenate(tiles[at : at + _COLUMNS], axis=1) for at in range(0, len(tiles), _COLUMNS)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((_SCALE * sheet.width, _SCALE * sheet.height), Image.Resampling.NEAREST).save(picture)


if __name__ == "__main__":
    main(sys.argv[1])
