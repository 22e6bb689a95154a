"""The loss that training minimizes."""

from collections.abc import Callable
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from nightshift.config.train import LossConfig

Loss = Callable[[Tensor, Tensor], Tensor]
"""Logits, float32 or bfloat16 (batch, classes), and targets → the mean loss, a scalar.

Targets are labels, int64 (batch,), or the share of each class, float32 (batch, classes), if images are mixed."""


def build_loss(config: LossConfig) -> Loss:
    """Cross-entropy, with label smoothing (Szegedy et al., arXiv 1512.00567, section 7) if the config asks for it."""
    return partial(F.cross_entropy, label_smoothing=config.label_smoothing)
