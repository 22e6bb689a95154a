"""What the author of a network, a loss or a transform can check in a test of their own."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nightshift.errors import ConfigError, ExportError
from nightshift.testing import check_loss, check_model, check_transform


class Good(nn.Module):
    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.mean((2, 3)))  # type: ignore[no-any-return]


class Tied(Good):
    """Two names for one tensor."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes, image_size)
        self.same = self.head


class Unseeded(Good):
    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes, image_size)
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(torch.seed()))


class Forgetful(Good):
    """What it has seen in training is in no state_dict."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__(num_classes, image_size)
        self.seen = torch.zeros(())

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen = self.seen + images.detach().square().mean()
        return super().forward(images) * (1 + self.seen)


def wide(num_classes: int, image_size: int) -> nn.Module:
    return Good(num_classes + 1, image_size)


@pytest.mark.parametrize("make", [Good, Tied, lambda classes, size: Good(classes, size)])
def test_a_good_network_passes(make: type[Good]) -> None:
    check_model(make, classes=4, image_size=17)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (wide, r"model 'wide' returns torch.float32 \(2, 11\) for 2 images, not float logits \(2, 10\)"),
        (Unseeded, "the same seed gives other weights"),
        (lambda classes, size: None, "is made as a NoneType"),
    ],
)
def test_a_network_that_breaks_a_promise_is_told_which(make: type[Good], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_model(make)


def test_a_network_that_learns_what_is_not_stored_is_found_out() -> None:
    with pytest.raises(ExportError, match="the model read back from state_dict is another one"):
        check_model(Forgetful)


def poly(num_classes: int, labels: Tensor) -> Any:
    assert labels.dtype == torch.int64
    return lambda logits, targets: F.cross_entropy(logits, targets)


def made_of(loss: Any) -> Any:
    return lambda num_classes, labels: loss


COUNTED = itertools.count()
BAD_LOSSES: dict[str, Any] = {
    "is made as a NoneType, which cannot be called": made_of(None),
    "cannot be made for 4 classes: KeyError: 'no'": lambda classes, labels: {"some": labels}["no"],
    "fails: .*shape": made_of(lambda logits, targets: logits.view(7)),
    r"returns torch.float32 \(6,\), not one number": made_of(
        lambda logits, targets: F.cross_entropy(logits, targets, reduction="none")
    ),
    "returns a float, not one number": made_of(lambda logits, targets: 1.0),
    "does not depend on the logits": made_of(lambda logits, targets: torch.zeros(())),
    "gives another value for the same logits": made_of(lambda logits, targets: logits.mean() + next(COUNTED)),
    "is no mean over images": made_of(lambda logits, targets: F.cross_entropy(logits, targets, reduction="sum")),
    "has parameters to train": lambda classes, labels: nn.Linear(classes, 1),
}


def test_a_good_loss_passes() -> None:
    check_loss(poly, classes=4)


@pytest.mark.parametrize("told", BAD_LOSSES)
def test_a_loss_that_breaks_a_promise_is_told_which(told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        check_loss(BAD_LOSSES[told], classes=4)
    assert "\n" not in str(refused.value)


def test_a_loss_that_takes_labels_only_passes_where_no_images_are_mixed() -> None:
    def labelled(num_classes: int, labels: Tensor) -> Any:
        return lambda logits, targets: F.nll_loss(logits.log_softmax(1), targets)

    check_loss(labelled, mixed=False)
    with pytest.raises(ConfigError, match=r"labelled' fails: "):
        check_loss(labelled)


def turned(image_size: int) -> Any:
    """Draws from all three."""
    return lambda image: image.roll((random.randrange(9), np.random.randint(9), int(torch.randint(9, ()))), (0, 1, 2))


BAD_TRANSFORMS: dict[str, Any] = {
    "is made as a int, which cannot be called": lambda side: side,
    "cannot be made for images of 32 pixels: ZeroDivisionError": lambda side: side / 0,
    "fails: TypeError": lambda side: lambda: None,
    r"returns torch.float32 \(3, 32, 32\), not an image": lambda side: lambda image: image.float(),
    r"returns torch.uint8 \(1, 32, 32\), not an image": lambda side: lambda image: image[:1],
    "returns a ndarray, not an image": lambda side: lambda image: image.numpy(),
    "makes another image of the same one": lambda side: lambda image: image + next(COUNTED),
}


def test_a_good_transform_passes_and_draws_from_no_generator_of_the_run() -> None:
    before = torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()
    check_transform(turned)
    assert before == (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate())


@pytest.mark.parametrize("told", BAD_TRANSFORMS)
def test_a_transform_that_breaks_a_promise_is_told_which(told: str) -> None:
    with pytest.raises(ConfigError, match=told) as refused:
        check_transform(BAD_TRANSFORMS[told])
    assert "\n" not in str(refused.value)
