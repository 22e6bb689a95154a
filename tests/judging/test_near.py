"""Near duplicates in the eyes of a network, and on the page."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from models import build_model
from nightshift.data import batches
from nightshift.data.datasets import Dataset, Pair
from nightshift.data.near import LEAST_ALIKE, near_pairs
from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import make_snapshot
from nightshift.judging import evaluation
from nightshift.judging.near import embedding_of, near_images
from nightshift.judging.report import build_report
from nightshift.records.run import read_record
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.data.pictures import album, config, write
from tests.data.test_near import SIZE, scene, stacked

SCALE, SHIFT = batches.scale_and_shift((128, 128, 128), (64, 64, 64))


def eye(name: str = "quick_cnn", classes: int = 2) -> Callable[[torch.Tensor], torch.Tensor]:
    torch.manual_seed(0)
    embed = embedding_of(build_model(name, classes, SIZE), name, classes, SIZE)
    return lambda images: embed(batches.to_input(images, SCALE, SHIFT))


def blurred(images: torch.Tensor) -> torch.Tensor:
    """An eye that sees little but shapes, as that of a trained network."""
    small = functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float(), 4).flatten(1)
    return functional.normalize(small - small.mean(1, keepdim=True), dim=1)


def photos(test: np.ndarray, train: np.ndarray, near: list[Pair]) -> Dataset:
    return Dataset(
        "photos",
        "0" * 64,
        ("a", "b"),
        train_images=torch.from_numpy(train),
        train_labels=torch.arange(len(train)) % 2,
        test_images=torch.from_numpy(test),
        test_labels=torch.arange(len(test)) % 2,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        near=tuple(near),
    )


def cropped(image: Image.Image) -> Image.Image:
    return image.crop((3, 3, SIZE - 3, SIZE - 3)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


def test_a_crop_that_pixels_leave_open_is_found_by_the_eye_of_a_network_and_another_image_is_not() -> None:
    train = [scene(number) for number in range(300)]
    test = stacked([cropped(train[0]), *map(scene, range(1000, 1100))])
    candidates = [*near_pairs("test", test, stacked(train)), Pair("test", 7, 8, 0.6)]
    assert all(pair.alike < LEAST_ALIKE for pair in candidates)
    (found,) = near_images(photos(test, stacked(train), candidates), blurred)
    assert (found.image, found.train) == (0, 0)
    assert found.pixels < LEAST_ALIKE


def test_what_the_pixels_settle_counts_whatever_the_network_sees() -> None:
    train = stacked([scene(number) for number in range(20)])
    grey = np.repeat(train[3].mean(2, keepdims=True), 3, 2).astype(np.uint8)
    dataset = photos(grey[None], train, [Pair("test", 0, 3, 0.95), Pair("test", 0, 4, 0.5)])
    assert [(pair.train, pair.pixels) for pair in near_images(dataset, eye())] == [(3, 0.95)]


def test_of_a_network_that_has_diverged_the_pixels_are_left() -> None:
    train = stacked([scene(number) for number in range(20)])
    dataset = photos(train[:1], train, [Pair("test", 0, 0, 1.0), Pair("test", 0, 4, 0.5)])
    found = near_images(dataset, lambda images: torch.full((len(images), 3), torch.nan))
    assert [(pair.train, pair.network) for pair in found] == [(0, 0)]


def test_without_candidates_no_network_is_asked() -> None:
    train = stacked([scene(number) for number in range(3)])

    def never(images: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    assert near_images(photos(train, train, []), never) == []


@pytest.mark.parametrize(("name", "features"), [("quick_cnn", 192), ("simple_cnn", 128), ("resnet18", 512)])
def test_an_embedding_is_what_the_last_layer_sees(name: str, features: int) -> None:
    vectors = eye(name)(torch.from_numpy(stacked([scene(number) for number in range(5)])))
    assert vectors.shape == (5, features)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(5))


def test_the_page_shows_the_pairs_side_by_side(workspace: Workspace, tmp_path: Path) -> None:
    root = tmp_path / "photos"
    write(root, {f"{split}/{name}": body for split in ("train", "test") for name, body in album(range(20)).items()})
    ref = pack_snapshot(workspace, make_snapshot(workspace.store, "photos", config(root)))
    run = small_config("quick", dataset="photos", max_train_images=None, batch_size=10, epochs=1)
    checkpoint = train_alone(workspace, "run", run, ref)
    evaluation.evaluate(workspace, checkpoint, ref)
    found = evaluation.read_metrics(workspace.store, "run")
    assert found
    assert {(pair.image, pair.train) for pair in found.near} >= {(number, number) for number in range(20)}
    page = build_report(workspace, read_record(workspace.store, "run")[0], None, None)
    assert all(len(pair.sources) == 2 for pair in page.pictures["near"])
    assert page.pictures["near"][0].lines[1:] == ("pixels 1.00", "network 1.00")
    assert "network 1.00" in page.html
    assert "Nearly the same image in training" in page.html
    assert "| test 0 | 0 | 1.00 | 1.00 |" in page.markdown
