"""torchvision's ResNet-18 with the stem for small images of He et al. (arXiv 1512.03385, section 4.2)."""

from torch import nn


def resnet18(num_classes: int, image_size: int = 32) -> nn.Module:
    """ResNet-18 whose first convolution is 3x3 with stride 1 and which does not pool before the first stage.

    The ImageNet stem would leave 8 by 8 pixels of a 32 by 32 image before the first residual block. This one is the
    same for images of any size: it works hard on large ones.
    """
    from torchvision.models import resnet  # here, because it takes a second to import

    network: nn.Module = resnet.resnet18(num_classes=num_classes)
    network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
