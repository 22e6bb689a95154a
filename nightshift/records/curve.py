"""The course of a run, a point for each epoch, and what follows from it: which epoch is the best, and when to stop.

Both are functions of the points alone, and the points are part of every checkpoint. So a run that was killed chooses
the same epoch, and stops after the same one, as if nothing had happened.
"""

from collections.abc import Sequence
from typing import Self

from pydantic import model_validator

from nightshift.config.sections import EvaluationConfig
from nightshift.storage.documents import Part
from nightshift.values import Count, Number, Share


class CurvePoint(Part):
    """A finished epoch: its number from 1, the step after it, mean training loss, and accuracy from 0 to 1."""

    epoch: Count
    step: Count
    loss: Number
    accuracy: Share
    validation_loss: Number | None = None
    """Mean cross-entropy of the validation images; None if they were not looked at after this epoch."""
    validation_accuracy: Share | None = None

    @model_validator(mode="after")
    def _was_looked_at_or_not(self) -> Self:
        if (self.validation_loss is None) != (self.validation_accuracy is None):
            raise ValueError("of the validation images, it has the loss or the accuracy, and not both")
        return self


def is_validated(epoch: int, epochs: int, config: EvaluationConfig) -> bool:
    """Whether the validation images are looked at after an epoch, which counts from 1; after the last one, always."""
    return config.validate_every is not None and (epoch % config.validate_every == 0 or epoch == epochs)


def best_of(curve: Sequence[CurvePoint], config: EvaluationConfig) -> CurvePoint | None:
    """The epoch that is best on the validation images, the first of equal ones; None if none was validated yet."""
    best = None
    for point in _validated(curve):
        if best is None or _goodness(point, config) > _goodness(best, config):
            best = point
    return best


def kept_of(curve: Sequence[CurvePoint], config: EvaluationConfig) -> CurvePoint | None:
    """The epoch whose weights would be published if training ended now; None: the current weights."""
    return best_of(curve, config) if config.keep == "best" else None


def is_enough(curve: Sequence[CurvePoint], config: EvaluationConfig) -> bool:
    """Whether a run stops early: the last `patience` times, no epoch was better than the best before."""
    best = best_of(curve, config)
    if not best or config.patience is None:
        return False
    return sum(point.epoch > best.epoch for point in _validated(curve)) >= config.patience


def _validated(curve: Sequence[CurvePoint]) -> list[CurvePoint]:
    return [point for point in curve if point.validation_accuracy is not None]


def _goodness(point: CurvePoint, config: EvaluationConfig) -> float:
    assert point.validation_accuracy is not None
    assert point.validation_loss is not None
    return point.validation_accuracy if config.metric == "accuracy" else -point.validation_loss
