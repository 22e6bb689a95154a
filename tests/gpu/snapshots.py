"""A snapshot is the state of one moment, whatever the GPU does meanwhile, and costs little more than one copy."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nightshift.training.snapshot import Snapshot
from tests.gpu.stage import Figure, Stage

_TENSORS = 64
_GPU_BYTES, _SAVES = 2_000_000_000, 200
_BUSY_SIDE = 4096


def under_fire(stage: Stage) -> Iterator[Figure]:
    """Snapshots while parameters change and other streams are busy: each is equal to a synchronous copy."""
    device = stage.gpu()
    on_gpu = device.type == "cuda"
    size, saves = (_GPU_BYTES, _SAVES) if on_gpu else (_GPU_BYTES // 100, 10)
    state: dict[str, Any] = {
        f"tensor {number}": torch.rand(size // _TENSORS // 4, device=device) for number in range(_TENSORS)
    }
    snapshot, busy = Snapshot(device), _Busy(device)
    snapshot.prepare(state)
    _change(state)
    snapshot.take(state)
    snapshot.payload()
    equal, stalls, copies = 0, [], []
    for _ in range(saves):
        busy.begin()
        _change(state)
        before = {name: tensor.clone() for name, tensor in state.items()}
        copies.append(_seconds(device, lambda: [tensor.clone() for tensor in state.values()]))
        stalls.append(_seconds(device, lambda: snapshot.take(state)))
        _change(state)
        taken = snapshot.payload()
        equal += all(torch.equal(taken[name].to(device), tensor) for name, tensor in before.items())
    yield Figure(f"of {saves} snapshots of {size / 1e9:.2f} GB equal", equal, equal == saves)
    yield Figure("copy on the device, ms, p50 and p99", _spread(copies))
    yield Figure("stall of a snapshot, ms, p50 and p99", _spread(stalls))
    yield Figure("stall / copy, p50", float(np.median(stalls) / np.median(copies)))
    yield Figure("stall / copy, p99", float(np.percentile(stalls, 99) / np.median(copies)))


def _change(state: dict[str, Tensor]) -> None:
    for _ in range(3):
        for tensor in state.values():
            tensor.mul_(0.999).add_(0.001)


def _spread(seconds: list[float]) -> str:
    return f"{1000 * np.median(seconds):.2f}, {1000 * np.percentile(seconds, 99):.2f} (n = {len(seconds)})"


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long a training stands still for it: its part of the GPU's time or of the CPU's, whichever is longer."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    torch.cuda.current_stream().synchronize()  # the other streams stay busy
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    started = time.perf_counter()
    work()
    on_cpu = time.perf_counter() - started
    end.record()
    end.synchronize()
    return max(float(begin.elapsed_time(end)) / 1000, on_cpu)


class _Busy:
    """A stream that computes beside the training, and one that copies."""

    def __init__(self, device: torch.device) -> None:
        self._streams = []
        if device.type == "cuda":
            self._streams = [torch.cuda.Stream(device), torch.cuda.Stream(device)]  # type: ignore[no-untyped-call]
            self._matrix = torch.rand(_BUSY_SIDE, _BUSY_SIDE, device=device)
            self._pinned = torch.rand(_BUSY_SIDE, _BUSY_SIDE).pin_memory()

    def begin(self) -> None:
        """Some milliseconds of it."""
        if self._streams:
            with torch.cuda.stream(self._streams[0]):
                for _ in range(5):
                    self._matrix @ self._matrix
            with torch.cuda.stream(self._streams[1]):
                for _ in range(5):
                    self._matrix.new_empty(self._matrix.shape).copy_(self._pinned, non_blocking=True)
