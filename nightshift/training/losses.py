"""The losses that training minimizes, each a mean over images, so that the ranks' shares of a batch can be added up."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nightshift import plugins
from nightshift.config.sections import LOSSES, LossConfig
from nightshift.errors import ConfigError
from nightshift.networks import kind_of

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits, float32 or bfloat16 (batch, classes), and targets → the mean loss, a scalar.

Targets are labels, int64 (batch,), or the share of each class, float32 (batch, classes), if images are mixed."""
LossFactory = Callable[[int, Tensor], Loss]
"""The number of classes, and the labels of all training images, int64 (N,) → a loss."""
_PAGE = "docs/training.md says what a loss has to be"


def build_loss(config: LossConfig, labels: Tensor, classes: int, device: torch.device) -> Loss:
    """The loss that a config names, ours with label smoothing (Szegedy et al., arXiv 1512.00567, section 7).

    Args:
        labels: of all training images, (N,). Class weights rest on them.

    Raises:
        ConfigError: it is a team's own, and cannot be made. It raises it too where it fails.
    """
    if config.name not in LOSSES:
        return own_loss(config.name, plugins.load(config.name, plugins.LOSS), labels, classes, device)
    smoothing = config.label_smoothing
    weights = balanced_weights(labels, classes).to(device) if config.class_weights == "balanced" else None
    if config.name == "binary":
        return partial(binary, weights=weights, smoothing=smoothing)
    if config.name == "focal" and config.gamma:
        return partial(focal, gamma=config.gamma, weights=weights, smoothing=smoothing)
    if weights is None:
        return partial(F.cross_entropy, label_smoothing=smoothing)
    return partial(weighted_cross_entropy, weights=weights, smoothing=smoothing)


def own_loss(name: str, make: LossFactory, labels: Tensor, classes: int, device: torch.device) -> Loss:
    """A loss of a team's own, whose mistakes become sentences.

    Args:
        make: what `name` names. A module that it makes is moved to the device.

    Raises:
        ConfigError: it cannot be made. What is returned raises it too, for logits that it fails with.
    """
    what, package = f"loss {name!r}", make.__module__.partition(".")[0]
    with plugins.told(f"{what} cannot be made for {classes} classes", package):
        loss: Any = make(classes, labels.cpu().long())
    if not callable(loss):
        raise ConfigError(f"{what} is made as {kind_of(loss)}, which cannot be called. {_PAGE}")
    if isinstance(loss, nn.Module):
        if any(parameter.requires_grad for parameter in loss.parameters()):
            raise ConfigError(
                f"{what} has parameters to train, which no checkpoint would hold: only a network may. {_PAGE}"
            )
        loss = loss.to(device)

    def mean(logits: Tensor, targets: Tensor) -> Tensor:
        with plugins.told(f"{what} fails", package):
            found = loss(logits, targets)
        if not isinstance(found, Tensor) or found.ndim or not found.is_floating_point():
            raise ConfigError(
                f"{what} returns {kind_of(found)}, not one number, a tensor of floats with the shape (). {_PAGE}"
            )
        return found

    return mean


def check_own_loss(name: str, labels: Tensor, classes: int, mixed: bool, make: LossFactory | None = None) -> None:
    """Find out, on made-up logits, whether a loss of a team's own can be trained with and resumed exactly.

    Args:
        labels: of all training images, (N,).
        mixed: whether targets are the shares of classes too.
        make: what `name` names, if that is not to be looked up.

    Raises:
        ConfigError: it cannot. The message names the first thing that is wrong.
    """
    make = make or plugins.load(name, plugins.LOSS)
    chance = torch.Generator().manual_seed(0)
    logits = torch.randn(6, classes, generator=chance, requires_grad=True)
    plain = torch.randint(classes, (6,), generator=chance)
    with torch.random.fork_rng(devices=[]):
        used = own_loss(name, make, labels, classes, torch.device("cpu"))
        for targets in (plain, torch.rand(6, classes, generator=chance).softmax(1))[: 1 + mixed]:
            whole = used(logits, targets)
            if not whole.requires_grad:
                raise ConfigError(f"loss {name!r} does not depend on the logits: nothing would be learned. {_PAGE}")
            with plugins.told(f"loss {name!r} has no gradient", make.__module__.partition(".")[0]):
                whole.backward()  # type: ignore[no-untyped-call]
            fresh = own_loss(name, make, labels, classes, torch.device("cpu"))(logits, targets)
            if not torch.equal(fresh, used(logits, targets)):
                raise ConfigError(
                    f"loss {name!r} gives another value for the same logits: it must remember nothing, and draw "
                    f"nothing. {_PAGE}"
                )
            each = torch.stack([used(logits[at : at + 1], targets[at : at + 1]) for at in range(6)])
            if not torch.allclose(each.mean(), whole, rtol=1e-3, atol=1e-4):
                raise ConfigError(
                    f"loss {name!r} is no mean over images: of six it is {whole.item():.4g}, and of each alone "
                    f"{each.mean().item():.4g} on average. So several processes would train otherwise. {_PAGE}"
                )


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """For each class a weight, float32 (classes,), such that all classes weigh the same and an image 1 on average.

    A class without images has the weight 0.
    """
    counts = labels.cpu().long().bincount(minlength=classes).double()
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0).float()


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """The sum divided by the number of images. torch's own mean divides by their weights, which ranks do not share."""
    total = F.cross_entropy(logits.float(), targets, weights, reduction="sum", label_smoothing=smoothing)
    return total / len(logits)


def focal(logits: Tensor, targets: Tensor, gamma: float, weights: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy in which each class' part is multiplied by (1 - p)^gamma, p its probability.

    Lin et al., arXiv 1708.02002, with softmax in place of their sigmoid: as the mean of -(1 - p)^gamma log p of the
    label, if there is neither smoothing nor mixing.
    """
    shares = _shares(targets, logits.shape[1], smoothing)
    log_p = F.log_softmax(logits.float(), 1)
    # Of 0 itself, a power less than 1 has an infinite slope.
    missed = (-log_p.expm1()).clamp(min=torch.finfo(torch.float32).tiny)
    parts = shares * missed**gamma * log_p
    return -(parts if weights is None else parts * weights).sum(1).mean()


def binary(logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Binary cross-entropy of the difference of the two logits (batch, 2).

    It is the cross-entropy of two classes by another way of computing it, so softmax gives the probabilities here too.

    Args:
        weights: of the two classes; only with labels, for a mixed image is of both.
    """
    shares = _shares(targets, 2, smoothing)[:, 1]
    each = None if weights is None else weights[targets]
    return F.binary_cross_entropy_with_logits((logits[:, 1] - logits[:, 0]).float(), shares, each)


def _shares(targets: Tensor, classes: int, smoothing: float) -> Tensor:
    """The share of each class, float32 (batch, classes), after smoothing."""
    shares = targets if targets.ndim == 2 else F.one_hot(targets, classes).float()
    return shares * (1 - smoothing) + smoothing / classes
