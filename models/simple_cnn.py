"""The tutorial's SimpleCNN, as a subclass and as an nn.Sequential of the same layers."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SimpleCNN(nn.Module):
    """Two convolutions and two fully connected layers, for images of 32 by 32 pixels and no others."""

    def __init__(self, num_classes: int = 10, image_size: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.fc1 = nn.Linear(6 * 6 * 64, 128)
        self.fc2 = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, 32, 32) → logits (batch, num_classes)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.fc2(x)  # type: ignore[no-any-return]


def simple_cnn_sequential(num_classes: int = 10, image_size: int = 32) -> nn.Sequential:
    """SimpleCNN as a Sequential: the same layers in the same order, so the same seed gives the same weights."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(6 * 6 * 64, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )
