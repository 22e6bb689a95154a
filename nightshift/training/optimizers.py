"""Optimizers, and the learning rate as a pure function of the step.

The schedule keeps no state, so there is none to save and none that could disagree with the step.
"""

import math
from collections.abc import Collection
from typing import Any

from torch import nn, optim

from models.protocols import Grouped
from nightshift.config.sections import OptimizerConfig
from nightshift.config.train import TrainConfig
from nightshift.errors import ConfigError
from nightshift.hardware import device_of
from nightshift.training.layers import groups_by_depth, split_groups
from nightshift.training.muon import Muon

# Share of all steps in which the learning rate rises.
_TRIANGULAR_RISE = 0.2
_ONE_CYCLE_RISE = 0.3
# one_cycle begins at 1/25 of the highest rate, as torch's OneCycleLR does.
_ONE_CYCLE_START = 1 / 25


def build_optimizer(model: nn.Module, config: OptimizerConfig, head: Collection[str] | None = None) -> optim.Optimizer:
    """The optimizer that a config names, over all parameters of `model`, in the model's own groups if it makes any.

    Args:
        head: the names of the last layer's parameters, if they are trained differently from the rest. The rest is then
            grouped by depth, unless the model makes groups.

    Raises:
        ConfigError: the model's groups do not have each trained parameter exactly once, or the model has no head.
    """
    if config.name == "muon":
        return Muon(model, config.lr, config.momentum, config.weight_decay)
    parameters: list[Any] = _groups(model) if isinstance(model, Grouped) else list(model.parameters())
    if head is not None:
        groups = parameters if isinstance(model, Grouped) else groups_by_depth(model, head, config.layer_decay)
        parameters = split_groups(groups, model, head)
    fused = device_of(model).type == "cuda"  # one kernel per step; on a CPU it is no faster
    if config.name == "sgd":
        return optim.SGD(
            parameters,
            fused=fused,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
    kind = optim.Adam if config.name == "adam" else optim.AdamW
    return kind(parameters, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay, fused=fused)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    assert isinstance(model, Grouped)
    groups: list[dict[str, Any]] = [{**group, "params": [*group["params"]]} for group in model.parameter_groups()]
    known = {"params", "scale", "weight_decay"}
    if strange := sorted({key for group in groups for key in group} - known):
        raise ConfigError(
            f"parameter_groups of the model: a group has {', '.join(sorted(known))}, and no {strange[0]!r}"
        )
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trained = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for number in (*trained, *grouped):
        if grouped.count(number) != 1 or number not in names:
            raise ConfigError(
                f"parameter_groups of the model: {names.get(number, 'a tensor')} stands in {grouped.count(number)} "
                "groups, and each parameter that is trained has to stand in one"
            )
    return groups


def state_names(optimizer: optim.Optimizer) -> set[str]:
    """What an optimizer keeps of each parameter that it has updated."""
    return {"momentum_buffer"} if isinstance(optimizer, optim.SGD | Muon) else {"step", "exp_avg", "exp_avg_sq"}


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step `step`, which counts from 0.

    constant: always `lr`. cosine: half a cosine from `lr` to 0 (Loshchilov and Hutter, arXiv 1608.03983,
    without restarts). triangular: straight up to `lr` over the first fifth, straight down to 0 (Smith,
    arXiv 1506.01186, one cycle of it). one_cycle: cosine up over the first 30 %, cosine down to 0 (Smith
    and Topin, arXiv 1708.07120, with torch's annealing). linear: straight down from `lr` to 0. With a warm-up, the
    rate first rises straight from 0 to `lr`, and the rest of the steps has the schedule.
    """
    # The middle of the step, so that neither the first nor the last step has a rate of zero.
    done, warmup = (step + 0.5) / total_steps, config.schedule.warmup
    if done < warmup:
        return config.optimizer.lr * done / warmup
    if warmup:
        done = (done - warmup) / (1 - warmup)
    if config.schedule.name == "cosine":
        return config.optimizer.lr * _cosine(1, 0, done)
    if config.schedule.name == "triangular":
        return config.optimizer.lr * min(done / _TRIANGULAR_RISE, (1 - done) / (1 - _TRIANGULAR_RISE))
    if config.schedule.name == "one_cycle":
        if done < _ONE_CYCLE_RISE:
            return config.optimizer.lr * _cosine(_ONE_CYCLE_START, 1, done / _ONE_CYCLE_RISE)
        return config.optimizer.lr * _cosine(1, 0, (done - _ONE_CYCLE_RISE) / (1 - _ONE_CYCLE_RISE))
    if config.schedule.name == "linear":
        return config.optimizer.lr * (1 - done)
    return config.optimizer.lr


def _cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def apply_schedule(optimizer: optim.Optimizer, config: TrainConfig, step: int, total_steps: int) -> None:
    """Set the rate of each parameter group for step `step`.

    A group may have a `scale`, by which the config's rate is multiplied, and a `share` of the steps, after which its
    schedule has ended. From then on its parameters are fixed, and need no gradients. The backbone's schedule begins
    after its frozen epochs. Until then its parameters are fixed too.
    """
    frozen = frozen_steps(config, total_steps)
    for group in optimizer.param_groups:
        first = frozen if group.get("backbone") else 0
        steps = round(group.get("share", 1) * total_steps) - first
        is_trained = 0 <= step - first < steps
        group["lr"] = group.get("scale", 1) * learning_rate(config, step - first, steps) if is_trained else 0.0
        if first or not is_trained:
            for parameter in group["params"]:
                parameter.requires_grad_(is_trained)


def frozen_steps(config: TrainConfig, total_steps: int) -> int:
    """In how many steps, the first ones, only the head is trained."""
    return config.schedule.frozen_epochs * total_steps // config.schedule.epochs
