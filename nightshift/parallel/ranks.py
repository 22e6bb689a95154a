"""The ranks that train one run together: which share of a batch each takes, and how they agree.

Each rank holds a copy of the whole state and computes its share of every batch. Gradients and the statistics of batch
norm are averaged over all ranks. So a run takes the same steps on the same batches however many ranks it has, except
that sums are added in another order and round differently.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nightshift.checkpoints.payload import Payload
from nightshift.errors import RankLostError
from nightshift.parallel.batch_norm import synchronized
from nightshift.training.ranks import Ranks
from nightshift.training.snapshot import mapped


@dataclass(frozen=True)
class JoinedRanks(Ranks):
    """This process as one of several; the methods are those of `Ranks`."""

    control: dist.ProcessGroup | None = None
    """The process group in which they agree. It is always gloo, so that no step on a GPU has to wait for it."""

    def any(self, *asked: bool) -> list[bool]:
        flags = torch.tensor(asked or (False,), dtype=torch.uint8)
        everyones = [torch.empty_like(flags) for _ in range(self.world_size)]
        dist.all_gather(everyones, flags, self.control)  # half as many messages, one after the other, as a sum
        return [bool(flag) for flag in torch.stack(everyones).amax(0)]

    def total(self, *values: Tensor) -> Tensor:
        sums = super().total(*values)
        dist.all_reduce(sums, group=self.control)
        return sums

    def gather(self, part: Payload) -> list[Payload]:
        data = _packed(mapped(part, lambda _, tensor: tensor.cpu()))
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self.control)
        longest = int(sizes.max())  # only tensors of one size can be gathered
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes] if self.leads else None
        dist.gather(F.pad(data, (0, longest - len(data))), parts, group=self.control)
        return [_unpacked(data[:size]) for data, size in zip(parts, sizes, strict=True)] if parts else []

    def share(self, payload: Payload | None) -> Payload:
        data = _packed(payload)
        size = torch.tensor(len(data))
        dist.broadcast(size, 0, self.control)
        data = data if self.leads else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0, self.control)
        return _unpacked(data)

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        if self.local_rank:
            self.any()
        yield
        if not self.local_rank:
            self.any()

    def synchronized(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model if self.world_size == 1 else synchronized(model, device)

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        return model if self.world_size == 1 else averaging(model, device)

    def unaveraged(self, module: nn.Module) -> AbstractContextManager[None]:
        if self.world_size == 1:
            return nullcontext()
        assert isinstance(module, DistributedDataParallel)
        return module.no_sync()

    @contextmanager
    def loss_explained(self) -> Iterator[None]:
        """Raise RankLostError for a RuntimeError, with which a collective fails when a rank is gone."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1:
                raise
            why = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]  # without the place in torch's sources
            raise RankLostError(f"rank {self.rank} could not go on: {why}") from error


def averaging(model: nn.Module, device: torch.device) -> nn.Module:
    """The module to call for the forward pass, so that the backward pass averages gradients over all ranks."""
    averaged = DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
        # Layers that are fixed part-way through need no gradient from then on. And without this, gradients change
        # their buckets after the first step, and so the order in which they are added: a resumed run of three or
        # more ranks would end with other bits.
        find_unused_parameters=True,
    )
    # They are equal, because all ranks compute them from the same sums. As an argument it has another name since torch
    # 2.15.
    averaged.broadcast_buffers = False
    return averaged


def _packed(payload: Payload | None) -> Tensor:
    """A payload as bytes (n,), uint8."""
    body = io.BytesIO()
    torch.save(payload, body)
    return torch.frombuffer(body.getbuffer(), dtype=torch.uint8)


def _unpacked(data: Tensor) -> Payload:
    """The payload in bytes (n,), uint8. Only tensors and plain values can arrive: nobody asks who has sent them."""
    payload: Payload = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
    return payload


@contextmanager
def joined(store: Store, timeout: timedelta) -> Iterator[JoinedRanks]:
    """The ranks that torch's elastic agent has started together, according to this process' environment.

    Args:
        store: where they find each other.
        timeout: how long to wait for a rank that does not answer; one that is dead is noticed at once.
    """
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timeout,
    )
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)
        yield JoinedRanks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            local_rank=int(os.environ["LOCAL_RANK"]),
            nodes=int(os.environ["GROUP_WORLD_SIZE"]),
            control=control,
        )
    except BaseException:
        if torch.cuda.is_available():
            # Destroying a group waits for its NCCL operations, and those of a lost rank never end.
            dist.distributed_c10d._abort_process_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()
