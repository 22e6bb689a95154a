"""Optimizers, and learning rates that are functions of the step and nothing else."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim

from models.speednet import SpeedNet
from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.training.muon import orthogonalized
from nightshift.training.optimizers import apply_schedule, build_optimizer, learning_rate

SCHEDULES = ["constant", "triangular", "one_cycle", "cosine", "linear"]


def scheduled(schedule: str, lr: float = 0.15) -> TrainConfig:
    return make_config("quick", {"schedule": schedule, "lr": lr})


def rates(schedule: str, total: int) -> list[float]:
    config = scheduled(schedule)
    return [learning_rate(config, step, total) for step in range(total)]


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
@settings(max_examples=20)
def test_a_rate_depends_on_nothing_but_config_step_and_total(schedule: str, order: list[int], seed: int) -> None:
    expected, config, other = rates(schedule, 50), scheduled(schedule), scheduled("cosine", 1)
    for step in order:
        random.seed(seed + step)
        torch.manual_seed(seed + step)
        learning_rate(other, step, 60)
        assert learning_rate(config, step, 50) == expected[step]


def test_sgd_is_nesterovs_with_the_configured_momentum_and_decay() -> None:
    config = make_config("quick", {"optimizer": "sgd", "momentum": 0.85, "weight_decay": 0.01, "lr": 0.3})
    optimizer = build_optimizer(nn.Linear(2, 2), config.optimizer)
    assert type(optimizer) is optim.SGD
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.3, 0.85, 0.01, True)


def test_sgd_works_without_momentum() -> None:
    (group,) = build_optimizer(
        nn.Linear(2, 2), make_config("quick", {"optimizer": "sgd", "momentum": 0}).optimizer
    ).param_groups
    assert (group["momentum"], group["nesterov"]) == (0, False)


@pytest.mark.parametrize(("name", "kind"), [("adam", optim.Adam), ("adamw", optim.AdamW)])
def test_adam_takes_momentum_as_its_first_beta_and_the_decay(name: str, kind: type[optim.Optimizer]) -> None:
    config = make_config("quick", {"optimizer": name, "momentum": 0.85, "weight_decay": 0.01, "lr": 0.3})
    optimizer = build_optimizer(nn.Linear(2, 2), config.optimizer)
    assert type(optimizer) is kind
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"][0], group["weight_decay"]) == (0.3, 0.85, 0.01)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_the_optimizer_has_every_parameter_once(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    optimizer = build_optimizer(model, make_config("quick", {"optimizer": name}).optimizer)
    held = [id(weight) for group in optimizer.param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in model.parameters())


def test_the_rate_reaches_every_group() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = optim.SGD([{"params": first.parameters(), "lr": 1.0}, {"params": second.parameters(), "lr": 2.0}])
    apply_schedule(optimizer, scheduled("linear"), 5, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [learning_rate(scheduled("linear"), 5, 10)] * 2


def muon(model: nn.Module) -> tuple[TrainConfig, optim.Optimizer]:
    config = make_config("speedrun")
    return config, build_optimizer(model, config.optimizer)


def trained_step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randn(4, 3, 32, 32)).logsumexp(1).sum().backward()
    optimizer.step()


def test_muon_has_every_parameter_that_is_trained_once() -> None:
    model = SpeedNet()
    held = [id(weight) for group in muon(model)[1].param_groups for weight in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (64, 64)])
def test_an_orthogonalized_matrix_has_its_directions_and_singular_values_near_one(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    found = orthogonalized((left @ torch.diag(values.clamp(min=values.max() / 4)) @ right).to(dtype))
    assert found.dtype == dtype
    spectrum = left.T @ found.float() @ right.T
    assert ((spectrum.diag() > 0.5) & (spectrum.diag() < 1.5)).all()
    assert (spectrum - spectrum.diag().diag()).abs().max() < 0.1


def test_muon_keeps_the_norm_of_filters_and_moves_them_by_about_the_rate() -> None:
    model = SpeedNet()
    config, optimizer = muon(model)
    apply_schedule(optimizer, config, 0, 200)
    filters = optimizer.param_groups[0]["params"]
    before = [weight.detach() * len(weight) ** 0.5 / weight.norm() for weight in filters]
    for weight in filters:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for weight, normalized in zip(filters, before, strict=True):
        moved = (weight - normalized).norm() / min(weight.flatten(1).shape) ** 0.5
        assert 0.5 < moved / config.optimizer.lr < 1.5


def test_the_bias_of_the_whitening_layer_is_trained_in_the_first_three_eighths_only() -> None:
    model = SpeedNet(widths=(8, 8, 8))
    assert model.whiten.bias is not None
    config, optimizer = muon(model)
    moved = []
    for step in range(16):
        before = [weight.detach().clone() for weight in (model.whiten.bias, model.head.weight)]
        apply_schedule(optimizer, config, step, 16)
        trained_step(model, optimizer)
        after = (model.whiten.bias, model.head.weight)
        moved.append([not torch.equal(old, new) for old, new in zip(before, after, strict=True)])
    assert moved == [[True, True]] * 6 + [[False, True]] * 10


def test_the_weight_decay_of_muon_is_what_a_step_takes_off_at_the_highest_rate() -> None:
    model = nn.Linear(2, 2, bias=False)
    config, optimizer = muon(model)
    before = model.weight.detach().clone()
    model.weight.grad = torch.zeros(2, 2)
    for group in optimizer.param_groups:
        group["lr"], group["momentum"] = group["scale"] * config.optimizer.lr, 0
    optimizer.step()
    assert torch.allclose(model.weight, before * (1 - config.optimizer.weight_decay))
