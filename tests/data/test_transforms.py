"""Augmentation by torchvision: the same images for any number of ranks, threads and resumes, and labels that fit."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nightshift.config.train import TrainConfig
from nightshift.data import transforms
from nightshift.data.batches import make_plan, resident, training_batch
from nightshift.data.datasets import Dataset
from nightshift.training.ranks import Ranks
from tests.made_up import config_of, made_up

PER_IMAGE: dict[str, dict[str, Any]] = {
    "crop": {"crop": 0.3},
    "randaugment": {"randaugment": 9},
    "trivialaugment": {"trivialaugment": True},
    "jitter": {"jitter": 0.4},
    "hue": {"hue": 0.2},
    "erasing": {"erasing": 1.0},
}
MIXING: dict[str, dict[str, Any]] = {"mixup": {"mixup": 0.4}, "cutmix": {"cutmix": 1.0}}
ALL = {
    "everything": {"flip": "random", "translate": 2, "crop": 0.5, "randaugment": 9, "jitter": 0.2, "erasing": 0.5}
    | {"mixup": 0.4, "cutmix": 1.0},
    **PER_IMAGE,
    **MIXING,
}
DATA = made_up(16, 4, train=39)
PLAIN: dict[str, Any] = {"flip": "off", "translate": 0, "batch_size": 17, "drop_last": False}


def config_with(augmentation: dict[str, Any], **overrides: Any) -> TrainConfig:
    return config_of(**{**PLAIN, **augmentation, **overrides})


def batch(config: TrainConfig, step: int, share: slice = slice(None), data: Dataset = DATA) -> tuple[Tensor, Tensor]:
    return training_batch(data, config, make_plan(config, data), step, share)


def epoch(config: TrainConfig, number: int = 0, data: Dataset = DATA) -> tuple[Tensor, Tensor]:
    """The images and targets of a whole epoch."""
    steps = make_plan(config, data).steps_per_epoch
    images, targets = zip(*(batch(config, number * steps + step, data=data) for step in range(steps)), strict=True)
    return torch.cat(images), torch.cat(targets)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("name", ALL)
def test_the_shares_of_any_number_of_ranks_are_the_images_and_targets_of_one(name: str, world_size: int) -> None:
    config = config_with(ALL[name])
    plan = make_plan(config, DATA)
    for step in (0, 2, 4):  # the third of each epoch has 5 images
        parts = [Ranks(rank, world_size).share_of(plan.batch_of(step)) for rank in range(world_size)]
        images, targets = zip(*(batch(config, step, part) for part in parts), strict=True)
        whole = batch(config, step)
        assert torch.equal(torch.cat(images), whole[0])
        assert torch.equal(torch.cat(targets), whole[1])
        assert whole[0].dtype == torch.uint8
        assert whole[0].shape == (plan.batch_of(step), 16, 16, 3)
        assert whole[0].is_contiguous()


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_the_same_whatever_was_asked_and_drawn_before_and_disturbs_no_generator(name: str) -> None:
    config = config_with(ALL[name])
    expected = [batch(config, step) for step in range(6)]
    for step in (4, 0, 5, 2, 1, 3):
        torch.manual_seed(step)
        random.seed(step)
        np.random.seed(step)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
        images, targets = batch(config, step)
        assert torch.equal(images, expected[step][0])
        assert torch.equal(targets, expected[step][1])
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]


@pytest.mark.parametrize("name", PER_IMAGE)
def test_images_are_changed_and_their_labels_are_not(name: str) -> None:
    (images, labels), (plain, labels_before) = epoch(config_with(PER_IMAGE[name])), epoch(config_with({}))
    assert torch.equal(labels, labels_before)
    assert labels.dtype == torch.int64
    changed = (images != plain).flatten(1).any(1)
    assert changed.float().mean() > 0.7  # RandAugment and TrivialAugment leave some as they are


@pytest.mark.parametrize("name", PER_IMAGE)
def test_what_is_drawn_for_an_image_depends_on_seed_and_epoch_and_not_on_the_batch_it_is_in(name: str) -> None:
    first = epoch(config_with(PER_IMAGE[name]))[0]
    assert torch.equal(epoch(config_with(PER_IMAGE[name], batch_size=39))[0], first)
    assert torch.equal(epoch(config_with(PER_IMAGE[name], batch_size=4, epochs=9))[0], first)
    # All images are one, so that epochs and seeds differ only in what is drawn.
    one = replace(DATA, train_images=DATA.train_images[:1].expand(39, -1, -1, -1).contiguous())
    drawn = [epoch(config_with(PER_IMAGE[name], seed=seed), number, one)[0] for seed in (0, 1) for number in (0, 1)]
    assert len({images.numpy().tobytes() for images in drawn}) == 4


def test_one_thread_changes_an_image_because_more_add_up_its_mean_in_another_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()

    def watching(image: Tensor) -> Tensor:
        seen.add(torch.get_num_threads())
        return image

    monkeypatch.setattr(transforms, "_transform", lambda *arguments: watching)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        batch(config_with({"jitter": 0.5}), 0)
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(threads)


def test_erasing_covers_a_rectangle_with_the_mean_colour() -> None:
    images, plain = epoch(config_with({"erasing": 1.0}))[0], epoch(config_with({}))[0]
    mean = torch.tensor(DATA.mean).byte()
    for image, before in zip(images, plain, strict=True):
        changed = (image != before).any(2)
        covered = (image == mean).all(2)
        assert changed.any()
        assert (covered | ~changed).all()


def neighbours(config: TrainConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The images of a batch before they are mixed and the one before each, float; and their labels."""
    images, labels = batch(config.override({"mixup": 0, "cutmix": 0}), step)
    return images.float(), images.roll(1, 0).float(), labels, labels.roll(1)


@pytest.mark.parametrize("name", ["everything", *MIXING])
def test_the_targets_of_mixed_images_are_shares_of_two_classes_that_sum_to_1(name: str) -> None:
    config = config_with(ALL[name])
    for step in range(9):
        _, _, own, other = neighbours(config, step)
        targets = batch(config, step)[1]
        assert targets.dtype == torch.float32
        assert targets.shape == (len(own), 4)
        torch.testing.assert_close(targets.sum(1), torch.ones(len(own)), rtol=0, atol=1e-6)
        of_both = torch.zeros_like(targets, dtype=torch.bool)
        of_both[torch.arange(len(own)), own] = of_both[torch.arange(len(own)), other] = True
        assert (targets[~of_both] == 0).all()


def test_mixup_blends_two_images_as_their_labels() -> None:
    config = config_with({"mixup": 1.0, "crop": 0.5})
    for step in range(6):
        images, before, own, other = neighbours(config, step)
        mixed, targets = batch(config, step)
        share = targets[torch.arange(len(own)), own]
        weight = share[own != other][0]
        blended = weight * images + (1 - weight) * before
        assert ((mixed.float() - blended).abs() <= 0.51).all()


def test_cutmix_puts_a_rectangle_of_one_image_into_another_as_large_as_its_share_of_the_target() -> None:
    config = config_with({"cutmix": 1.0})
    for step in range(6):
        images, before, own, other = neighbours(config, step)
        mixed, targets = batch(config, step)
        kept, pasted = (mixed == images).all(3), (mixed == before).all(3)
        assert (kept | pasted).all()
        number = int((own != other).nonzero()[0])
        share = float(targets[number, own[number]])
        assert float(kept[number].float().mean()) == pytest.approx(share, abs=0.02)  # noise may be alike by chance


def test_with_mixup_and_cutmix_chance_decides_for_each_batch() -> None:
    config = config_with({"mixup": 1.0, "cutmix": 1.0}, epochs=9)
    pasted = []
    for step in range(27):
        images, before, _, _ = neighbours(config, step)
        mixed = batch(config, step)[0]
        pasted.append(bool(((mixed == images) | (mixed == before)).all(3).float().mean() > 0.99))
    assert 5 < sum(pasted) < 22


def test_images_that_torchvision_changes_stay_on_the_cpu_whatever_the_device() -> None:
    meta = torch.device("meta")
    assert resident(DATA, config_with({"mixup": 0.4}), meta).train_images[:].device == meta
    assert resident(DATA, config_with({"crop": 0.5}), meta).train_images[:].device.type == "cpu"
