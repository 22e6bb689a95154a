"""A small network made for two CPU cores: 225,000 parameters, 9 million multiplications per image of 32 by 32."""

from itertools import pairwise

from torch import Tensor, nn

from models.layers import DiracConv, FastNorm, SmallHead, Whitening


class QuickCNN(nn.Module):
    """A fixed 4x4 whitening layer with stride 2, three blocks of convolution, pooling, batch norm and GELU, linear.

    Chosen by measurement: a stem that leaves 16 by 16 pixels makes it fast, because three quarters of a step
    go into convolutions (docs/decisions/0005-quick.md). It is initialized as SpeedNet is.

    The layers are the same for images of any size. Only below 32 by 32 the last block does not pool, because a single
    pixel would be left, of which batch norm can learn nothing in a batch of one image.
    """

    def __init__(
        self, num_classes: int = 10, image_size: int = 32, widths: tuple[int, ...] = (32, 48, 96, 192)
    ) -> None:
        super().__init__()
        self.whiten = Whitening(widths[0], patch=4, stride=2, padding=1)
        blocks = [_block(before, after) for before, after in pairwise(widths)]
        if image_size >> len(widths) < 2:
            blocks[-1][1] = nn.Identity()
        self.blocks = nn.Sequential(nn.GELU(), *blocks)
        self.head = SmallHead(widths[-1], num_classes)

    def initialize_from(self, images: Tensor) -> None:
        """Fit the first layer to normalized training images, float32 (images, 3, side, side)."""
        self.whiten.fit(images)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, side, side) → logits (batch, num_classes)."""
        features: Tensor = self.blocks(self.whiten(x))
        return self.head(features.amax((2, 3)))  # type: ignore[no-any-return]


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(DiracConv(before, after), nn.MaxPool2d(2), FastNorm(after), nn.GELU())
