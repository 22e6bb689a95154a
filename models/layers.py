"""The layers the fast networks share, after Jordan, "94% on CIFAR-10 in 3.29 Seconds" (arXiv 2404.00498)."""

import torch
from torch import Tensor, nn

_IMAGES_AT_A_TIME = 500
"""Patches are many times as large as their images: of so many they fit into the processor's cache, or nearly."""


class Whitening(nn.Conv2d):
    """A first layer whose filters are fixed before training, and whose bias is trained (section 3.2 of the paper)."""

    def __init__(self, channels: int, patch: int, stride: int = 1, padding: int = 0) -> None:
        super().__init__(3, channels, patch, stride, padding)
        self.weight.requires_grad_(False)

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Set the filters to the principal directions of the images' patches, each scaled to variance one.

        Half of the filters are the directions of the largest variances; the other half are their negatives.

        Args:
            images: normalized training images, float32 (images, 3, height, width); a few thousand are enough.
        """
        products, count = images.new_zeros(()), 0
        for part in torch.split(images, _IMAGES_AT_A_TIME):
            patches = nn.functional.unfold(part, self.kernel_size, stride=self.stride)
            products = products + (patches @ patches.mT).sum(0)
            count += len(patches) * patches.shape[2]
        variances, directions = torch.linalg.eigh(products / count)
        scaled = (directions / (variances + 5e-4).sqrt()).T[-(self.out_channels // 2) :]
        self.weight.copy_(torch.cat([scaled, -scaled]).view_as(self.weight))


class DiracConv(nn.Conv2d):
    """3x3 without bias. Initially its first channels pass the input on unchanged; the others begin as usual."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__(before, after, 3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:before])


class FastNorm(nn.BatchNorm2d):
    """Batch norm without scale, whose statistics are those of the last few batches."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=0.4)
        self.weight.requires_grad_(False)


class SmallHead(nn.Linear):
    """Linear, with small initial logits: the paper divides them by the width, here the weights are smaller."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__(width, num_classes, bias=False)
        with torch.no_grad():
            self.weight /= self.weight.std() * width
