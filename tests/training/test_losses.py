"""The losses are what their papers say, and means over images: the ranks' shares of a batch add up."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nightshift.config.sections import LossConfig
from nightshift.training.losses import Loss, balanced_weights, build_loss

CPU = torch.device("cpu")
LABELS = torch.tensor([0] * 50 + [1] * 30 + [2] * 20, dtype=torch.uint8)
"""Of the training images of three classes."""
LOSSES: dict[str, dict[str, Any]] = {
    "smoothed": {"label_smoothing": 0.1},
    "balanced": {"class_weights": "balanced"},
    "balanced and smoothed": {"class_weights": "balanced", "label_smoothing": 0.1},
    "focal": {"name": "focal"},
    "focal, balanced and smoothed": {"name": "focal", "class_weights": "balanced", "label_smoothing": 0.1},
}


def loss_of(classes: int = 3, **fields: Any) -> Loss:
    return build_loss(LossConfig(**fields), LABELS[LABELS.lt(classes)], classes, CPU)


def answers(count: int = 40, classes: int = 3) -> tuple[Tensor, Tensor]:
    """Logits and labels."""
    chance = torch.Generator().manual_seed(count)
    return 3 * torch.randn(count, classes, generator=chance), torch.randint(classes, (count,), generator=chance)


def with_gradient(loss: Loss, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits, targets)
    value.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    return value.detach(), logits.grad


@pytest.mark.parametrize("fields", [{}, {"name": "focal", "gamma": 0.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_more_and_focal_with_gamma_0_are_torchs_cross_entropy_bit_for_bit(
    fields: dict[str, Any], smoothing: float
) -> None:
    logits, labels = answers()
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    assert torch.equal(loss_of(label_smoothing=smoothing, **fields)(logits, labels), expected)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_is_the_cross_entropy_times_a_power_of_what_is_missed(gamma: float) -> None:
    logits, labels = answers()
    p = logits.softmax(1)[torch.arange(40), labels]
    expected = (-((1 - p) ** gamma) * p.log()).mean()
    torch.testing.assert_close(loss_of(name="focal", gamma=gamma)(logits, labels), expected)


@pytest.mark.parametrize("fields", [{}, {"label_smoothing": 0.1}, {"class_weights": "balanced"}])
def test_focal_comes_close_to_cross_entropy_as_gamma_comes_close_to_0(fields: dict[str, Any]) -> None:
    focal, plain = loss_of(name="focal", gamma=1e-6, **fields), loss_of(**fields)
    for found, expected in zip(with_gradient(focal, *answers()), with_gradient(plain, *answers()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 2.0])
def test_an_image_that_is_classified_perfectly_has_no_focal_loss_and_a_finite_gradient(gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0, 0.0], [0.0, 1.0, 2.0]])
    loss, gradient = with_gradient(loss_of(name="focal", gamma=gamma), logits, torch.tensor([0, 1]))
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[0].eq(0).all()


def test_balanced_weights_let_all_classes_weigh_the_same_and_an_image_1_on_average() -> None:
    weights = balanced_weights(LABELS, 5)  # two classes have no image
    shares = weights * torch.bincount(LABELS.long(), minlength=5) / len(LABELS)
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, 0]))


def test_a_balanced_loss_weighs_each_image_by_its_class() -> None:
    logits, labels = answers()
    each = F.cross_entropy(logits, labels, reduction="none")
    expected = (balanced_weights(LABELS, 3)[labels] * each).mean()
    torch.testing.assert_close(loss_of(class_weights="balanced")(logits, labels), expected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_losses_of_two_shares_add_up_to_that_of_the_batch(name: str) -> None:
    loss, (logits, labels) = loss_of(**LOSSES[name]), answers()
    parts = [loss(logits[part], labels[part]) * len(labels[part]) for part in (slice(15), slice(15, None))]
    torch.testing.assert_close(sum(parts) / 40, loss(logits, labels))


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_a_mixed_target_is_the_mixture_of_its_labels_losses(name: str) -> None:
    loss, (logits, labels) = loss_of(**LOSSES[name]), answers()
    own, other = F.one_hot(labels, 3).float(), F.one_hot(labels.roll(1), 3).float()
    torch.testing.assert_close(loss(logits, own), loss(logits, labels))
    expected = 0.3 * loss(logits, own) + 0.7 * loss(logits, other)
    torch.testing.assert_close(loss(logits, 0.3 * own + 0.7 * other), expected)


@pytest.mark.parametrize("fields", [{}, {"label_smoothing": 0.2}, {"class_weights": "balanced"}])
def test_binary_is_the_cross_entropy_of_two_classes(fields: dict[str, Any]) -> None:
    logits, labels = answers(classes=2)
    found, expected = (loss_of(2, name=name, **fields)(logits, labels) for name in ("binary", "cross_entropy"))
    torch.testing.assert_close(found, expected)


def test_binary_takes_mixed_targets() -> None:
    logits, labels = answers(classes=2)
    mixed = 0.3 * F.one_hot(labels, 2) + 0.7 * F.one_hot(labels.roll(1), 2)
    torch.testing.assert_close(loss_of(2, name="binary")(logits, mixed), loss_of(2)(logits, mixed))


@pytest.mark.parametrize("name", [*LOSSES, "binary"])
def test_a_loss_of_bfloat16_logits_is_a_float32_mean(name: str) -> None:
    classes = 2 if name == "binary" else 3
    loss, (logits, labels) = loss_of(classes, **LOSSES.get(name, {"name": name})), answers(classes=classes)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(logits.bfloat16(), labels)
    torch.testing.assert_close(found.float(), loss(logits, labels), rtol=0.02, atol=0.02)
