"""A copy of the state in host memory, from which a checkpoint is made while training goes on."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nightshift.checkpoints.payload import Payload

Path = tuple[str | int, ...]
"""Keys and positions that lead to a tensor in a payload."""


class Snapshot:
    """A copy of a payload in host memory. Its buffers are used again for the next copy.

    On the CPU, `take` makes the copy. On a GPU, `take` only copies within the device. The slow copy to pinned host
    memory runs during the next steps, on a stream of its own, and `payload` waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._buffers: dict[Path, Tensor] = {}
        self._payload: Payload = {}
        self._preparation: threading.Thread | None = None

    def prepare(self, payload: Payload) -> None:
        """Allocate memory for such a payload, in the background: the first touch of memory costs many times a copy."""

        def touch(path: Path, tensor: Tensor) -> Tensor:
            return self._buffers.setdefault(path, self._buffer_like(tensor).zero_())

        self._preparation = threading.Thread(target=mapped, args=(payload, touch), name="snapshot", daemon=True)
        self._preparation.start()

    def take(self, payload: Payload) -> None:
        """Copy a payload; returns when the originals may change. The previous copy must no longer be in use."""
        if self._preparation:
            self._preparation.join()
        if self._stream:
            payload = mapped(payload, lambda _, tensor: tensor.clone() if tensor.is_cuda else tensor)
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):  # with None: the current stream
            self._payload = mapped(payload, self._copy)

    def payload(self) -> Payload:
        """The complete copy. It is valid until the next `take`."""
        if self._stream:
            self._stream.synchronize()
        return self._payload

    def _copy(self, path: Path, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(path)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = self._buffers[path] = self._buffer_like(tensor)
        if self._stream and tensor.is_cuda:
            tensor.record_stream(self._stream)  # else the next step could be given its memory while it is read
        return buffer.copy_(tensor, non_blocking=True)

    def _buffer_like(self, tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=self._stream is not None)


def mapped(value: Any, change: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """A copy of nested dicts and lists, in which `change(path, tensor)` replaces every tensor."""
    if isinstance(value, Tensor):
        return change(path, value.detach())
    if isinstance(value, dict):
        return {key: mapped(part, change, (*path, key)) for key, part in value.items()}
    if isinstance(value, list):
        return [mapped(part, change, (*path, number)) for number, part in enumerate(value)]
    return value
