"""Near duplicates: an image to judge by that is in the training split in another form."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from nightshift.data.datasets import open_dataset
from nightshift.data.near import near_pairs
from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import make_snapshot
from nightshift.errors import DatasetRejectedError
from nightshift.workspace import Workspace
from tests.data.conftest import Told
from tests.data.pictures import album, config, write

SIZE = 32


def scene(number: int) -> Image.Image:
    """A picture with something in it, of few colours: noise is like no other noise."""
    coarse = np.random.default_rng(number).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def stacked(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_a_brighter_a_smaller_and_a_compressed_copy_are_found_and_no_other_image_is() -> None:
    train = [scene(number) for number in range(300)]
    copies = [
        ImageEnhance.Brightness(train[3]).enhance(1.2),
        train[5].resize((20, 20)).resize((SIZE, SIZE)),
        train[9],
    ]
    pairs = near_pairs("test", stacked([*copies, *map(scene, range(1000, 1050))]), stacked(train))
    assert {(pair.image, pair.train) for pair in pairs} == {(0, 3), (1, 5), (2, 9)}
    assert (pairs[0].image, round(pairs[0].alike, 6)) == (2, 1)


def test_near_duplicates_are_told_stop_the_night_or_neither_as_the_rule_says(
    workspace: Workspace, tmp_path: Path, told: Told
) -> None:
    root = tmp_path / "photos"
    write(root, {f"{split}/{name}": body for split in ("train", "test") for name, body in album(range(20)).items()})
    snapshot = make_snapshot(workspace.store, "near", config(root))
    ref = pack_snapshot(workspace, snapshot, "off")
    assert not any("nearly" in warning for warning in told.warnings)
    assert {(pair.split, pair.image) for pair in open_dataset(workspace, ref).near} == {("test", n) for n in range(20)}
    pack_snapshot(workspace, snapshot, "warn")
    assert told.warnings[-1] == "near: 20 images to validate or test on are nearly the same as ones to train on"
    with pytest.raises(DatasetRejectedError, match=r'set near_duplicates = "warn" in \[datasets.near.rules\]'):
        pack_snapshot(workspace, snapshot, "stop")
