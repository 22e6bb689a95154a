"""Optimizers, and learning rates that are functions of the step and nothing else."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from nightshift.optim import build_optimizer, learning_rate, set_learning_rate
from nightshift.recipes import make_config
from nightshift.settings import TrainConfig

SCHEDULES = ["constant", "triangular", "one_cycle", "cosine"]


def scheduled(schedule: str, lr: float = 0.15) -> TrainConfig:
    return make_config("quick", {"schedule": schedule, "lr": lr})


def rates(schedule: str, total: int) -> list[float]:
    return [learning_rate(scheduled(schedule), step, total) for step in range(total)]


def rises(values: list[float]) -> bool:
    return all(before < after for before, after in itertools.pairwise(values))


@given(st.sampled_from(SCHEDULES), st.floats(1e-6, 100), st.integers(1, 1_000_000), st.data())
def test_every_rate_is_above_zero_and_at_most_the_configured_one(
    schedule: str, lr: float, total: int, data: st.DataObject
) -> None:
    step = data.draw(st.integers(0, total - 1))
    assert 0 < learning_rate(scheduled(schedule, lr), step, total) <= lr


@given(st.integers(1, 500))
def test_constant_is_constant(total: int) -> None:
    assert set(rates("constant", total)) == {0.15}


@pytest.mark.parametrize(("schedule", "share"), [("triangular", 0.2), ("one_cycle", 0.3)])
@given(total=st.integers(10, 500))
@settings(deadline=None)
def test_the_rate_rises_to_its_one_peak_and_falls_from_it(schedule: str, share: float, total: int) -> None:
    values = rates(schedule, total)
    peak = values.index(max(values))
    # The peak lies between two steps; which of them is the higher depends on the slopes.
    assert peak in range(round(share * total) - 2, round(share * total) + 2)
    assert rises(values[: peak + 1])
    assert rises(values[:peak:-1])


@pytest.mark.parametrize(("schedule", "share"), [("triangular", 0.2), ("one_cycle", 0.3)])
def test_the_peak_reaches_the_configured_rate_at_its_share_of_the_steps(schedule: str, share: float) -> None:
    values = rates(schedule, 10_000)
    assert abs(values.index(max(values)) / 10_000 - share) <= 1 / 10_000
    assert max(values) > 0.999 * 0.15
    assert values[-1] < 0.001 * 0.15


def test_triangular_is_straight_on_both_sides_of_its_peak() -> None:
    values = rates("triangular", 1000)
    assert np.ptp(np.diff(values[:200])) < 1e-12
    assert np.ptp(np.diff(values[200:])) < 1e-12


@given(st.integers(2, 500))
def test_cosine_falls_from_step_to_step(total: int) -> None:
    assert rises(rates("cosine", total)[::-1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(order=st.permutations(range(50)), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_a_rate_depends_on_nothing_but_config_step_and_total(schedule: str, order: list[int], seed: int) -> None:
    expected = rates(schedule, 50)
    for step in order:
        random.seed(seed + step)
        torch.manual_seed(seed + step)
        learning_rate(scheduled("cosine", 1), step, 60)
        assert learning_rate(scheduled(schedule), step, 50) == expected[step]


def test_sgd_is_nesterovs_with_the_configured_momentum_and_decay() -> None:
    config = make_config("quick", {"optimizer": "sgd", "momentum": 0.85, "weight_decay": 0.01, "lr": 0.3})
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert type(optimizer) is optim.SGD
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.3, 0.85, 0.01, True)


def test_sgd_works_without_momentum() -> None:
    (group,) = build_optimizer(nn.Linear(2, 2), make_config("quick", {"momentum": 0})).param_groups
    assert (group["momentum"], group["nesterov"]) == (0, False)


@pytest.mark.parametrize(("name", "kind"), [("adam", optim.Adam), ("adamw", optim.AdamW)])
def test_adam_takes_momentum_as_its_first_beta_and_the_decay(name: str, kind: type[optim.Optimizer]) -> None:
    config = make_config("quick", {"optimizer": name, "momentum": 0.85, "weight_decay": 0.01, "lr": 0.3})
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"][0], group["weight_decay"]) == (0.3, 0.85, 0.01)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_optimizer_has_every_parameter_once(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, make_config("quick", {"optimizer": name}))
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in model.parameters())


def test_the_set_rate_reaches_every_group() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = optim.SGD([{"params": first.parameters(), "lr": 1.0}, {"params": second.parameters(), "lr": 2.0}])
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
