"""The losses that training minimizes, each a mean over images, so that the ranks' shares of a batch can be added up."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from nightshift.config.sections import LossConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits, float32 or bfloat16 (batch, classes), and targets → the mean loss, a scalar.

Targets are labels, int64 (batch,), or the share of each class, float32 (batch, classes), if images are mixed."""


def build_loss(config: LossConfig, labels: Tensor, classes: int, device: torch.device) -> Loss:
    """The loss that a config names, all of them with label smoothing (Szegedy et al., arXiv 1512.00567, section 7).

    Args:
        labels: of all training images, (N,). Class weights rest on them.
    """
    smoothing = config.label_smoothing
    weights = balanced_weights(labels, classes).to(device) if config.class_weights == "balanced" else None
    if config.name == "binary":
        return partial(binary, weights=weights, smoothing=smoothing)
    if config.name == "focal" and config.gamma:
        return partial(focal, gamma=config.gamma, weights=weights, smoothing=smoothing)
    if weights is None:
        return partial(F.cross_entropy, label_smoothing=smoothing)
    return partial(weighted_cross_entropy, weights=weights, smoothing=smoothing)


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
