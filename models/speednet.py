"""The network of the speedrun: 94 % on CIFAR-10 in 8 epochs.

After Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498): the first layer whitens patches, the
convolutions begin as partial identities, batch norm has no scale and forgets fast.
"""

from torch import Tensor, nn

from models.layers import DiracConv, FastNorm, SmallHead, Whitening


class SpeedNet(nn.Module):
    """A fixed 2x2 whitening layer, three groups of two convolutions, a global maximum, linear: 1,973,000 parameters."""

    def __init__(self, num_classes: int = 10, widths: tuple[int, int, int] = (64, 256, 256)) -> None:
        super().__init__()
        self.whiten = Whitening(24, patch=2)
        before = (self.whiten.out_channels, *widths)
        self.groups = nn.Sequential(nn.GELU(), *map(_group, before, widths), nn.MaxPool2d(3))
        self.head = SmallHead(widths[-1], num_classes)

    def initialize_from(self, images: Tensor) -> None:
        """Fit the first layer to normalized training images, float32 (images, 3, 32, 32)."""
        self.whiten.fit(images)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) → logits (batch, num_classes)."""
        return self.head(self.groups(self.whiten(x)).flatten(1))  # type: ignore[no-any-return]


def _group(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        *(DiracConv(before, after), nn.MaxPool2d(2), FastNorm(after), nn.GELU()),
        *(DiracConv(after, after), FastNorm(after), nn.GELU()),
    )
