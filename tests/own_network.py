"""A network of a team's own, as one file beside its project file, or as an installed package."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path

import pytest

from nightshift.data import transforms

NETWORK = '''
from pathlib import Path

import torch
from torch import Tensor, nn

Path(__file__).with_name("it-was-run").touch()


class PartsNet(nn.Module):
    """Looks at training images first, drops features at random, and trains its head at a rate of its own."""

    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.register_buffer("brightness", torch.zeros(()))
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, num_classes)

    def initialize_from(self, images: Tensor) -> None:
        self.brightness.copy_(images.mean())

    def parameter_groups(self):
        return [{"params": self.features.parameters(), "scale": 0.5}, {"params": self.head.parameters()}]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images - self.brightness).mean((2, 3)))
'''


OTHERS = '''
import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dust:
    """Draws from every generator that there is."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    def __call__(self, image: Tensor) -> Tensor:
        row, column = random.randrange(self.image_size), np.random.randint(self.image_size)
        image = image.roll((row, column), (1, 2))
        return torch.where(torch.rand(image.shape) < 0.1, 0, image).to(torch.uint8)


class Poly(nn.Module):
    """PolyLoss (Leng et al., arXiv 2204.12511), with classes weighed by how rare they are."""

    def __init__(self, num_classes: int, labels: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", len(labels) / (1 + labels.bincount(minlength=num_classes)))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        shares = targets if targets.ndim == 2 else F.one_hot(targets, logits.shape[1]).float()
        log_p = logits.float().log_softmax(1)
        return ((1 - log_p.exp() - log_p) * shares * self.weights).sum(1).mean()
'''
"""A transform and a loss."""


@contextmanager
def forgotten(*packages: str) -> Iterator[None]:
    """Afterwards, this process has neither imported these packages nor knows where they are."""
    path = list(sys.path)
    invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
            del sys.modules[name]
        transforms._transform.cache_clear()


def write_project(
    monkeypatch: pytest.MonkeyPatch, folder: Path, plugins: tuple[str, ...] = ("ournets",), text: str = ""
) -> None:
    """A project file that admits these packages, and this process in its folder."""
    admitted = ", ".join(f'"{package}"' for package in plugins)
    (folder / "nightshift.toml").write_text(f"plugins = [{admitted}]\n{text}")
    monkeypatch.chdir(folder)


def install(folder: Path, package: str, source: str, version: str, entry_points: str = "") -> None:
    """Put a package of one module, `nets`, where `folder` on sys.path makes it an installed one."""
    (folder / package).mkdir(parents=True, exist_ok=True)
    (folder / package / "__init__.py").touch()
    (folder / package / "nets.py").write_text(source)
    about = folder / f"{package}-{version}.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (about / "RECORD").write_text(f"{package}/__init__.py,,\n{package}/nets.py,,\n")
    (about / "entry_points.txt").write_text(entry_points)
    invalidate_caches()
