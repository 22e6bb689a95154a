"""TrainState: all that makes the next step what it is."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

Payload = dict[str, Any]


@dataclass
class TrainState:
    """Owned by the training loop of one process; it never crosses a task boundary.

    The learning-rate schedule, the order of an epoch and the augmentation are functions of the step and
    need no state (`optim`, `batches`).
    """

    model: nn.Module
    optimizer: optim.Optimizer
    device: torch.device
    step: int = 0
    """Steps done; the next one has this number."""
    epoch_images: int = 0
    """Images seen since the epoch began."""
    epoch_loss: Tensor = field(init=False)
    """Sum of the losses of these images, float64 scalar."""
    epoch_correct: Tensor = field(init=False)
    """How many of them were classified correctly, int64 scalar."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """For each finished epoch: `epoch`, `step`, `loss`, `accuracy`."""

    def __post_init__(self) -> None:
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.epoch_images = 0
        self.epoch_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.epoch_correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def capture(self) -> Payload:
        """Everything, as tensors and plain values that `torch.load(weights_only=True)` accepts.

        Tensors are the live ones, not copies: they change with the next step.
        """
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch_images": self.epoch_images,
            "epoch_loss": self.epoch_loss,
            "epoch_correct": self.epoch_correct,
            "curve": self.curve,
            "rng": _capture_rng(self.device),
        }

    def restore(self, payload: Payload) -> None:
        """Take over what `capture` returned. The generators come last: nothing may draw from them after."""
        self.model.load_state_dict(payload["model"])
        self.optimizer.load_state_dict(payload["optimizer"])
        self.step = payload["step"]
        self.epoch_images = payload["epoch_images"]
        self.epoch_loss = payload["epoch_loss"].to(self.device)
        self.epoch_correct = payload["epoch_correct"].to(self.device)
        self.curve = payload["curve"]
        _restore_rng(payload["rng"])


def seed_everything(seed: int) -> None:
    """Seed python's, numpy's and torch's global generators, those of all CUDA devices included."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """sha256, hexadecimal, over each key's UTF-8 bytes and its tensor's contiguous bytes, keys sorted."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        digest.update(key.encode())
        digest.update(state_dict[key].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _capture_rng(device: torch.device) -> Payload:
    version, internal, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if device.type == "cuda" else [],
    }


def _restore_rng(rng: Payload) -> None:
    version, internal, gauss_next = rng["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, cached = rng["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(rng["cuda"])
