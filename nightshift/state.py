"""TrainState: all that makes the next step what it is."""

import hashlib
import random
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Payload = dict[str, Any]
Path = tuple[str | int, ...]
"""Keys and positions that lead to a tensor of a payload."""


@dataclass
class TrainState:
    """Owned by the training loop of one process; it never crosses a task boundary.

    The learning-rate schedule, the order of an epoch and the augmentation are functions of the step and
    need no state (`optim`, `batches`).
    """

    model: nn.Module
    optimizer: optim.Optimizer
    device: torch.device
    ema_decay: float = 0.0
    """Share of itself that the moving average of the weights keeps at a step; 0: there is none."""
    average: AveragedModel | None = field(init=False, default=None)
    """That average, of buffers too; after the first step it is the model itself."""
    step: int = 0
    """Steps done; the next one has this number."""
    epoch_images: int = 0
    """Images seen since the epoch began, by all ranks together."""
    epoch_loss: Tensor = field(init=False)
    """Sum of the losses of this rank's share of them, float64 scalar."""
    epoch_correct: Tensor = field(init=False)
    """How many of its share were classified correctly, int64 scalar."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """For each finished epoch: `epoch`, `step`, `loss`, `accuracy`."""

    def __post_init__(self) -> None:
        if self.ema_decay:
            average = get_ema_multi_avg_fn(self.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.epoch_images = 0
        self.epoch_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.epoch_correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def advance(self) -> None:
        """Take the step whose gradients are there: the weights, and then their moving average."""
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.step += 1

    def part(self) -> Payload:
        """What is this rank's own: its share of the epoch's sums, and its generators."""
        return {
            "epoch_loss": self.epoch_loss,
            "epoch_correct": self.epoch_correct,
            "rng": _capture_rng(self.device),
        }

    def capture(self, parts: list[Payload] | None = None) -> Payload:
        """Everything, as tensors and plain values that `torch.load(weights_only=True)` accepts.

        Tensors are the live ones, not copies: they change with the next step.

        Args:
            parts: every rank's, in order; by default this rank is the only one.
        """
        return {
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch_images": self.epoch_images,
            "curve": self.curve,
            "ranks": [self.part()] if parts is None else parts,
        }

    def restore(self, payload: Payload, rank: int = 0, world_size: int = 1) -> None:
        """Take over what `capture` returned. The generators come last: nothing may draw from them after.

        With as many ranks as before each takes its own part, and all goes on with the same bits. With another number,
        rank 0 takes the sums of all, and a rank that was not there before keeps the generators it has.
        """
        self.model.load_state_dict(payload["model"])
        self.optimizer.load_state_dict(payload["optimizer"])
        self.step = payload["step"]
        if self.average:
            self.average.module.load_state_dict(payload["average"])
            self.average.n_averaged.fill_(self.step)
        self.begin_epoch()
        self.epoch_images = payload["epoch_images"]
        self.curve = payload["curve"]
        parts = payload["ranks"]
        for part in [parts[rank]] if len(parts) == world_size else parts if rank == 0 else []:
            self.epoch_loss += part["epoch_loss"].to(self.device)
            self.epoch_correct += part["epoch_correct"].to(self.device)
        if rank < len(parts):
            _restore_rng(parts[rank]["rng"], self.device)


class Snapshot:
    """A copy of a payload in host memory, which is used again for the next one.

    On the CPU it is made by `take`. On a GPU `take` only copies within the device, and the slow way to
    pinned host memory goes on beside the next steps, on a stream of its own, until `payload` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: dict[Path, Tensor] = {}
        self._payload: Payload = {}
        self._preparation: threading.Thread | None = None

    def prepare(self, payload: Payload) -> None:
        """Make room for such a payload, in the background: the first touch of memory costs many times a copy."""

        def touch(path: Path, tensor: Tensor) -> Tensor:
            return self._buffers.setdefault(path, self._buffer_like(tensor).zero_())

        self._preparation = threading.Thread(target=mapped, args=(payload, touch), name="snapshot", daemon=True)
        self._preparation.start()

    def take(self, payload: Payload) -> None:
        """Copy it; returns when the originals may change. Until then `payload` must not be in use."""
        if self._preparation:
            self._preparation.join()
        if self._stream:
            payload = mapped(payload, lambda _, tensor: tensor.clone() if tensor.is_cuda else tensor)
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):  # of None: no stream of its own
            self._payload = mapped(payload, self._copy)

    def payload(self) -> Payload:
        """The copy, complete. It stands until the next `take`."""
        if self._stream:
            self._stream.synchronize()
        return self._payload

    def _copy(self, path: Path, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._buffers[path] = self._buffer_like(tensor)
        if self._stream and tensor.is_cuda:
            tensor.record_stream(self._stream)  # else its memory could be given to the next step while it is read
        return buffer.copy_(tensor, non_blocking=True)

    def _buffer_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)


def mapped(value: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """Nested dicts and lists with every tensor replaced, and everything that can change copied."""
    if isinstance(value, Tensor):
        return change(path, value.detach())
    if isinstance(value, dict):
        return {key: mapped(part, change, (*path, key)) for key, part in value.items()}
    if isinstance(value, list):
        return [mapped(part, change, (*path, number)) for number, part in enumerate(value)]
    return value


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed numpy's and torch's global generators, those of all CUDA devices included, otherwise for each rank."""
    numbers = np.random.SeedSequence((seed, rank)).generate_state(1) if rank else [seed]
    np.random.seed(numbers[0])
    torch.manual_seed(int(numbers[0]))


def seed_step(seed: int, step: int) -> None:
    """Seed python's global generator for one step.

    Unlike the others it cannot be carried from step to step: whatever retries a request in the background
    draws its pauses from it.
    """
    random.seed(f"{seed}/{step}")


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """sha256, hexadecimal, over each key's UTF-8 bytes and its tensor's contiguous bytes, keys sorted."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        digest.update(key.encode())
        digest.update(state_dict[key].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _capture_rng(device: torch.device) -> Payload:
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def _restore_rng(rng: Payload, device: torch.device) -> None:
    name, keys, position, has_gauss, cached = rng["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"][0], device)
