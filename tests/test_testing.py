"""What the author of a network can check in a test of their own."""

import pytest
import torch
from torch import Tensor, nn

from nightshift.errors import ConfigError, ExportError
from nightshift.testing import check_model


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
