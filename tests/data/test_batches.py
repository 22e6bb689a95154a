"""Order and augmentation: step k is the same batch, whatever was asked before it."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data.batches import Plan, batch_indices, make_plan, normalizer, to_input, training_batch
from nightshift.data.datasets import Dataset
from nightshift.errors import ConfigError
from nightshift.training.ranks import Ranks


def dataset_of(images: Tensor, labels: Tensor | None = None) -> Dataset:
    labels = torch.zeros(len(images), dtype=torch.uint8) if labels is None else labels
    return Dataset(
        name="synthetic",
        digest="0" * 64,
        classes=tuple("abcdefghij"),
        train_images=images,
        train_labels=labels,
        test_images=images[:1],
        test_labels=labels[:1],
        mean=(125.3, 123.0, 113.9),
        std=(63.0, 62.1, 66.7),
    )


def noise(count: int) -> Tensor:
    return torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def config_of(**overrides: Any) -> TrainConfig:
    plain = {"batch_size": 16, "epochs": 3, "flip": "off", "translate": 0, "drop_last": False}
    return make_config("quick", {**plain, **overrides})


def batch(dataset: Dataset, config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
    return training_batch(dataset, config, make_plan(config, dataset), step)


def first_epoch(dataset: Dataset, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """The images of the first epoch as the network gets them, and as they are in the data set."""
    plan = make_plan(config, dataset)
    steps = range(plan.steps_per_epoch)
    originals = torch.cat([dataset.train_images[batch_indices(plan, config.seed, step)] for step in steps])
    return torch.cat([training_batch(dataset, config, plan, step)[0] for step in steps]), originals


def shifts(images: Tensor, originals: Tensor, reach: int) -> list[set[tuple[int, int]]]:
    """For each image, by how much its original could have been shifted to give it."""
    padded = F.pad(originals.permute(0, 3, 1, 2).float(), [reach] * 4, mode="reflect").permute(0, 2, 3, 1).byte()
    found: list[set[tuple[int, int]]] = [set() for _ in images]
    for down in range(2 * reach + 1):
        for right in range(2 * reach + 1):
            crop = padded[:, down : down + images.shape[1], right : right + images.shape[2]]
            for number in (crop == images).flatten(1).all(1).nonzero().flatten().tolist():
                found[number].add((down - reach, right - reach))
    return found


PLANS = st.builds(
    lambda images, share, epochs, drop_last: Plan(images, max(1, images * share // 10), epochs, drop_last),
    st.integers(1, 120),
    st.integers(1, 10),
    st.integers(1, 3),
    st.booleans(),
)
SEEDS = st.integers(0, 2**31 - 1)


@given(PLANS, SEEDS)
def test_every_epoch_sees_each_image_once(plan: Plan, seed: int) -> None:
    for epoch in range(plan.epochs):
        first = epoch * plan.steps_per_epoch
        batches = [batch_indices(plan, seed, step) for step in range(first, first + plan.steps_per_epoch)]
        seen = torch.cat(batches).tolist()
        assert len(set(seen)) == len(seen)
        assert set(seen) <= set(range(plan.images))
        assert len(seen) == (plan.images - plan.images % plan.batch_size if plan.drop_last else plan.images)
        assert {len(indices) for indices in batches[:-1]} <= {plan.batch_size}


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_the_shares_of_any_number_of_ranks_are_the_batch_of_one(world_size: int) -> None:
    config = config_of(flip="alternating", translate=4, batch_size=17)
    dataset = dataset_of(noise(60), torch.arange(60, dtype=torch.uint8))
    plan = make_plan(config, dataset)
    for step in range(plan.total_steps):
        parts = [Ranks(rank, world_size).share_of(plan.batch_of(step)) for rank in range(world_size)]
        shares = [training_batch(dataset, config, plan, step, part) for part in parts]
        images, labels = training_batch(dataset, config, plan, step)
        assert torch.equal(torch.cat([share for share, _ in shares]), images)
        assert torch.equal(torch.cat([share for _, share in shares]), labels)
        assert len(images) == plan.batch_of(step)
        assert max(len(share) for share, _ in shares) - min(len(share) for share, _ in shares) <= 1


def balanced(labels: list[int], epochs: int = 3, **overrides: Any) -> tuple[list[Tensor], Tensor]:
    """The order of each epoch, in numbers of images, and the images' labels."""
    data = dataset_of(noise(len(labels)), torch.tensor(labels, dtype=torch.uint8))
    config = config_of(sampling="balanced", epochs=epochs, **overrides)
    plan = make_plan(config, data)
    steps = [batch_indices(plan, config.seed, step) for step in range(plan.total_steps)]
    each = plan.steps_per_epoch
    return [torch.cat(steps[each * epoch : each * (epoch + 1)]) for epoch in range(epochs)], data.train_labels


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([0] * 70 + [3] * 20 + [9] * 9, [33] * 3), ([1] * 95 + [2] * 5, [50] * 2), ([0] * 5 + [1, 2, 3], [2] * 4)],
)
def test_balanced_sampling_shows_as_many_images_an_epoch_and_each_class_equally_often(
    labels: list[int], classes: list[int]
) -> None:
    orders, labels_of = balanced(labels)
    for order in orders:
        assert len(order) == len(labels)
        assert [count for count in torch.bincount(labels_of[order]).tolist() if count] == classes
        for label in set(labels):  # and within a class each image as often as any other, or once more
            shown = torch.bincount(order, minlength=len(labels))[labels_of == label]
            assert shown.max() - shown.min() <= 1
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert [order.tolist() for order in balanced(labels)[0]] == [order.tolist() for order in orders]


def test_where_classes_cannot_come_equally_often_they_differ_by_one_and_not_always_the_same_ones_gain() -> None:
    orders, labels = balanced([0] * 15 + [1] * 3 + [2] * 2, epochs=9)
    counts = [tuple(torch.bincount(labels[order]).tolist()) for order in orders]
    assert {tuple(sorted(count)) for count in counts} == {(6, 7, 7)}
    assert len(set(counts)) > 1


def test_balanced_sampling_of_the_first_images_shows_no_others() -> None:
    (order, *_), labels = balanced([0, 0, 0, 1, 1, 2, 2, 2], max_train_images=5)
    assert set(order.tolist()) <= set(range(5))
    assert sorted(torch.bincount(labels[order]).tolist()) == [2, 3]


def test_an_image_that_balanced_sampling_shows_again_looks_different_each_time() -> None:
    data = dataset_of(noise(20), torch.tensor([0] * 19 + [1], dtype=torch.uint8))
    config = config_of(sampling="balanced", batch_size=20, crop=0.3)
    images, labels = batch(data, config, 0)
    assert len({image.numpy().tobytes() for image in images[labels == 1]}) == 10


def test_drop_last_leaves_out_only_the_smaller_batch() -> None:
    whole, dropped = Plan(100, 32, 1, drop_last=False), Plan(100, 32, 1, drop_last=True)
    assert [len(batch_indices(whole, 0, step)) for step in range(whole.total_steps)] == [32, 32, 32, 4]
    assert [len(batch_indices(dropped, 0, step)) for step in range(dropped.total_steps)] == [32, 32, 32]
    for step in range(3):
        assert torch.equal(batch_indices(whole, 0, step), batch_indices(dropped, 0, step))


def test_the_order_differs_from_epoch_to_epoch_from_seed_to_seed_and_from_the_stored_one() -> None:
    plan = Plan(100, 100, 5, drop_last=False)
    orders = [batch_indices(plan, seed, step) for seed in range(5) for step in range(5)]
    assert len({tuple(order.tolist()) for order in [*orders, torch.arange(100)]}) == 26


@given(PLANS, SEEDS, st.randoms(use_true_random=False))
def test_a_steps_images_are_the_same_whatever_was_asked_before(plan: Plan, seed: int, chance: random.Random) -> None:
    steps = list(range(plan.total_steps))
    expected = [batch_indices(plan, seed, step).clone() for step in steps]
    for step in chance.sample(steps, len(steps)):
        batch_indices(plan, chance.randrange(2**31), step)
        assert torch.equal(batch_indices(plan, seed, step), expected[step])


@given(st.permutations(range(12)), SEEDS)
@settings(max_examples=10)
def test_a_steps_augmentation_is_the_same_whatever_was_asked_before(order: list[int], seed: int) -> None:
    dataset, config = dataset_of(noise(60)), config_of(flip="random", translate=3, seed=seed)
    expected = [batch(dataset, config, step) for step in range(12)]
    for step in order:
        torch.manual_seed(step)
        images, labels = batch(dataset, config, step)
        assert torch.equal(images, expected[step][0])
        assert torch.equal(labels, expected[step][1])


def test_augmentation_is_decided_by_seed_and_step_alone() -> None:
    # All images are the same one, so that batches differ only in how it was augmented.
    few, many = (dataset_of(noise(1).expand(count, -1, -1, -1).contiguous()) for count in (64, 320))
    config = config_of(flip="random", translate=2)
    augmented = [batch(few, config, step)[0] for step in range(4)]
    for step in range(4):
        assert torch.equal(batch(many, config_of(flip="random", translate=2, epochs=9), step)[0], augmented[step])
        assert not torch.equal(batch(few, config_of(flip="random", translate=2, seed=1), step)[0], augmented[step])
        assert not torch.equal(augmented[step - 1], augmented[step])


def test_a_batch_draws_nothing_from_torchs_global_generator() -> None:
    before = torch.get_rng_state()
    batch(dataset_of(noise(40)), config_of(flip="random", translate=2), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_without_augmentation_images_are_untouched() -> None:
    images, originals = first_epoch(dataset_of(noise(50)), config_of())
    assert torch.equal(images, originals)


def test_augmentation_leaves_the_data_set_as_it_is() -> None:
    dataset = dataset_of(noise(50))
    first_epoch(dataset, config_of(flip="random", translate=4))
    assert torch.equal(dataset.train_images[:], noise(50))


def test_flip_mirrors_some_images_and_leaves_the_others() -> None:
    images, originals = first_epoch(dataset_of(noise(400)), config_of(flip="random"))
    mirrored = (images == originals.flip(2)).flatten(1).all(1)
    untouched = (images == originals).flatten(1).all(1)
    assert (mirrored ^ untouched).all()
    # Four standard deviations around one half of 400.
    assert 160 < int(mirrored.sum()) < 240


def test_alternating_flip_shows_each_image_both_ways_in_two_successive_epochs() -> None:
    dataset, config = dataset_of(noise(400)), config_of(flip="alternating", epochs=5, batch_size=40)
    plan = make_plan(config, dataset)
    mirrored = torch.zeros(5, 400, dtype=torch.bool)
    for step in range(plan.total_steps):
        indices = batch_indices(plan, config.seed, step)
        same = (batch(dataset, config, step)[0] == dataset.train_images[indices]).flatten(1).all(1)
        mirrored[plan.position(step)[0], indices] = ~same
    assert 160 < int(mirrored[0].sum()) < 240
    assert (mirrored[1:] ^ mirrored[:-1]).all()


@pytest.mark.parametrize(("reach", "count"), [(1, 300), (3, 500)])
def test_translate_shifts_each_image_with_reflected_edges_and_reaches_every_shift(reach: int, count: int) -> None:
    images, originals = first_epoch(dataset_of(noise(count)), config_of(translate=reach))
    found = shifts(images, originals, reach)
    assert all(len(candidates) == 1 for candidates in found)
    span = range(-reach, reach + 1)
    assert set().union(*found) == {(down, right) for down in span for right in span}


def test_the_greatest_translation_still_reflects() -> None:
    images, originals = first_epoch(dataset_of(noise(4)), config_of(translate=16))
    found = shifts(images, originals, 16)
    assert all(len(candidates) == 1 for candidates in found)
    assert any(max(map(abs, shift)) > 8 for candidates in found for shift in candidates)


def test_flip_and_translate_together_give_a_shift_of_the_image_or_of_its_mirror() -> None:
    images, originals = first_epoch(dataset_of(noise(200)), config_of(flip="random", translate=2))
    straight, mirrored = shifts(images, originals, 2), shifts(images, originals.flip(2), 2)
    assert all(len(one) + len(other) == 1 for one, other in zip(straight, mirrored, strict=True))
    assert any(straight)
    assert any(mirrored)


@pytest.mark.parametrize(
    "augmentation", [{}, {"flip": "random"}, {"translate": 4}, {"flip": "alternating", "translate": 4}]
)
def test_each_label_belongs_to_its_image(augmentation: dict[str, Any]) -> None:
    # Each image is of one colour that tells its number, however it is flipped and shifted.
    numbers = torch.arange(250, dtype=torch.uint8)
    dataset = dataset_of(numbers[:, None, None, None].expand(-1, 32, 32, 3).contiguous(), numbers % 10)
    for step in range(32):
        images, labels = batch(dataset, config_of(**augmentation), step)
        assert labels.dtype == torch.int64
        assert torch.equal(images.flatten(1).long() % 10, labels[:, None].expand(-1, 32 * 32 * 3))


@pytest.mark.parametrize("normalization", ["dataset", "half"])
def test_the_network_gets_pixels_minus_mean_over_deviation(normalization: str) -> None:
    dataset = dataset_of(noise(8))
    half = torch.full((3, 1, 1), 127.5, dtype=torch.float64)
    own = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (dataset.mean, dataset.std))
    mean, std = own if normalization == "dataset" else (half, half)
    pixels = dataset.train_images[:].permute(0, 3, 1, 2).double()

    seen = to_input(dataset.train_images[:], *normalizer(dataset, config_of(normalization=normalization)))

    assert seen.dtype == torch.float32
    # Eight roundings to float32, each of a value no greater than these two summands.
    allowed = 2 * torch.finfo(torch.float32).eps * (pixels / std + mean / std)
    assert ((seen.double() - (pixels - mean) / std).abs() <= allowed).all()


def test_half_maps_pixels_to_the_range_from_minus_one_to_one() -> None:
    dataset = dataset_of(torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3))
    black, white = to_input(dataset.train_images[:], *normalizer(dataset, config_of(normalization="half")))
    torch.testing.assert_close(black, torch.full((3, 32, 32), -1.0))
    torch.testing.assert_close(white, torch.full((3, 32, 32), 1.0))


def test_the_network_gets_its_input_in_channels_last_format() -> None:
    dataset = dataset_of(noise(8))
    seen = to_input(dataset.train_images[:], *normalizer(dataset, config_of(normalization="dataset")))
    assert seen.shape == (8, 3, 32, 32)
    assert seen.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("images", "batch_size", "drop_last", "per_epoch"),
    [(96, 32, False, 3), (96, 32, True, 3), (100, 32, False, 4), (100, 32, True, 3), (5, 5, True, 1), (5, 1, False, 5)],
)
def test_steps_fall_into_epochs(images: int, batch_size: int, drop_last: bool, per_epoch: int) -> None:
    plan = Plan(images, batch_size, 3, drop_last)
    assert plan.total_steps == 3 * per_epoch
    places = [(epoch, within) for epoch in range(3) for within in range(per_epoch)]
    assert [plan.position(step) for step in range(plan.total_steps)] == places


@pytest.mark.parametrize(("limit", "images"), [(None, 50), (20, 20), (80, 50)])
def test_a_plan_is_limited_to_the_images_there_are_and_those_wanted(limit: int | None, images: int) -> None:
    assert make_plan(config_of(max_train_images=limit), dataset_of(noise(50))).images == images


def test_more_images_a_batch_than_there_are_make_one_whole_batch() -> None:
    plan = make_plan(config_of(batch_size=64, drop_last=True), dataset_of(noise(50)))
    assert (plan.batch_size, plan.steps_per_epoch) == (50, 1)


@pytest.mark.parametrize(("size", "translate"), [(16, 15), (17, 16), (24, 16), (48, 3), (33, 0)])
def test_images_of_any_size_are_flipped_and_shifted_by_no_more_than_there_is(size: int, translate: int) -> None:
    chance = torch.Generator().manual_seed(size)
    images = torch.randint(256, (40, size, size, 3), dtype=torch.uint8, generator=chance)
    found, originals = first_epoch(dataset_of(images), config_of(flip="random", translate=translate))
    assert found.shape == images.shape
    for image, original in zip(found, originals, strict=True):
        values = set(original.flatten(0, 1)[:, 0].tolist())
        assert set(image.flatten(0, 1)[:, 0].tolist()) <= values
        mirrored = [shifts(image[None], turned[None], translate)[0] for turned in (original, original.flip(1))]
        assert any(mirrored)


def test_a_shift_that_is_no_smaller_than_the_images_is_refused_with_both() -> None:
    with pytest.raises(ConfigError, match=r"augment\.translate=16 shifts images of 16 by 16 pixels out of sight: 15"):
        make_plan(config_of(translate=16), dataset_of(torch.zeros(8, 16, 16, 3, dtype=torch.uint8)))


def test_labels_may_be_wider_than_a_byte() -> None:
    labels = torch.tensor([0, 255, 256, 70_000] * 10, dtype=torch.int32)
    dataset, config = dataset_of(noise(40), labels), config_of(batch_size=40)
    found = batch(dataset, config, 0)[1]
    assert found.dtype == torch.int64
    assert found.sort().values.tolist() == labels.sort().values.tolist()


def test_a_channel_in_which_all_pixels_are_the_same_can_be_normalized() -> None:
    black = replace(dataset_of(torch.zeros(2, 32, 32, 3, dtype=torch.uint8)), mean=(0, 0, 0), std=(0, 0, 0))
    assert to_input(black.train_images[:], *normalizer(black, config_of(normalization="dataset"))).eq(0).all()
