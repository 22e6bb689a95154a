"""The network of the speedrun: 94 % on CIFAR-10 in 8 epochs.

After Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498): the first layer whitens patches, the
convolutions begin as partial identities, batch norm has no scale and forgets fast.
"""

from torch import Tensor, nn

from models.layers import DiracConv, FastNorm, SmallHead, Whitening


class SpeedNet(nn.Module):
    """A fixed 2x2 whitening layer, three groups of two convolutions, a global maximum, linear: 1,973,000 parameters.

    It takes images from 17 by 17 pixels up: of 16 by 16 a single pixel would be left, of which batch norm can learn
    nothing in a batch of one image.
    """

    def __init__(
        self, num_classes: int = 10, image_size: int = 32, widths: tuple[int, int, int] = (64, 256, 256)
    ) -> None:
        super().__init__()
        self.whiten = Whitening(24, patch=2)
        before = (self.whiten.out_channels, *widths)
        side_left = (image_size - 1) // 8
        self.groups = nn.Sequential(nn.GELU(), *map(_group, before, widths), nn.MaxPool2d(side_left))
        self.head = SmallHead(widths[-1], num_classes)

    def initialize_from(self, images: Tensor) -> None:
        """Fit the first layer to normalized training images, float32 (images, 3, side, side)."""
        self.whiten.fit(images)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, side, side) → logits (batch, num_classes)."""
        return self.head(self.groups(self.whiten(x)).flatten(1))  # type: ignore[no-any-return]


def _group(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        *(DiracConv(before, after), nn.MaxPool2d(2), FastNorm(after), nn.GELU()),
        *(DiracConv(after, after), FastNorm(after), nn.GELU()),
    )
