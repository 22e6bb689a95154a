"""Optimizers, and the learning rate as a pure function of the step.

The schedule keeps no state, so there is none to save and none that could disagree with the step.
"""

import math

from torch import nn, optim

from nightshift.config.train import OptimizerConfig, TrainConfig
from nightshift.training.muon import Muon

# Share of all steps in which the learning rate rises.
_TRIANGULAR_RISE = 0.2
_ONE_CYCLE_RISE = 0.3
# one_cycle begins at 1/25 of the highest rate, as torch's OneCycleLR does.
_ONE_CYCLE_START = 1 / 25


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> optim.Optimizer:
    """The optimizer a config names, over all parameters of `model`."""
    if config.name == "muon":
        return Muon(model, config.lr, config.momentum, config.weight_decay)
    parameters = list(model.parameters())
    fused = parameters[0].is_cuda  # one kernel per step; on a CPU it is no faster
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


def state_names(optimizer: optim.Optimizer) -> set[str]:
    """What an optimizer keeps of each parameter that it has updated."""
    return {"momentum_buffer"} if isinstance(optimizer, optim.SGD | Muon) else {"step", "exp_avg", "exp_avg_sq"}


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of step `step`, which counts from 0.

    constant: always `lr`. cosine: half a cosine from `lr` to 0 (Loshchilov and Hutter, arXiv 1608.03983,
    without restarts). triangular: straight up to `lr` over the first fifth, straight down to 0 (Smith,
    arXiv 1506.01186, one cycle of it). one_cycle: cosine up over the first 30 %, cosine down to 0 (Smith
    and Topin, arXiv 1708.07120, with torch's annealing). linear: straight down from `lr` to 0.
    """
    # The middle of the step, so that neither the first nor the last step has a rate of zero.
    done = (step + 0.5) / total_steps
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
    schedule has ended. Its parameters are fixed from then on, and need no gradients.
    """
    for group in optimizer.param_groups:
        steps = round(group.get("share", 1) * total_steps)
        group["lr"] = group.get("scale", 1) * learning_rate(config, step, steps) if step < steps else 0.0
        if step >= steps:
            for parameter in group["params"]:
                parameter.requires_grad_(False)
