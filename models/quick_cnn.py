"""A small network made for two CPU cores: 225,000 parameters, 9 million multiplications an image."""

from itertools import pairwise

from torch import Tensor, nn


class QuickCNN(nn.Module):
    """A 4x4 stem with stride 2, three blocks of convolution, pooling, batch norm and GELU, global maximum, linear.

    Chosen by measurement: a stem that leaves 16 by 16 pixels is what makes it fast, for three quarters of a
    step go into convolutions (docs/decisions/0005-quick.md).
    """

    def __init__(self, num_classes: int = 10, widths: tuple[int, ...] = (32, 48, 96, 192)) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 4, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.GELU()
        )
        self.blocks = nn.Sequential(*(_block(before, after) for before, after in pairwise(widths)))
        self.head = nn.Linear(widths[-1], num_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) → logits (batch, num_classes)."""
        features: Tensor = self.blocks(self.stem(x))
        return self.head(features.amax((2, 3)))  # type: ignore[no-any-return]


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(after), nn.GELU()
    )
