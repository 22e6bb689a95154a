"""The processes that train one run together: what each takes of a batch, and how they agree.

Each rank holds a copy of the whole state and computes its share of every batch; gradients and the statistics of batch
norm are averaged over all of them. So a run takes the same steps on the same batches however many ranks it has, up to
the rounding of sums that are added in another order.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # one that gradients flow through
from torch.nn.parallel import DistributedDataParallel

from nightshift.errors import ConfigError, RankLostError
from nightshift.state import Payload, mapped


@dataclass(frozen=True)
class Ranks:
    """This process among those that train a run; by default it is alone, and every method does next to nothing."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    nodes: int = 1
    control: dist.ProcessGroup | None = None
    """What they agree by. Always gloo: on a GPU no step has to wait for it."""

    @property
    def leads(self) -> bool:
        """Rank 0 is the only one that talks to the store, and the one that tells how the training goes."""
        return self.rank == 0

    def share_of(self, batch: int) -> slice:
        """Which images of a batch are this rank's; shares differ by one at most."""
        return slice(self.rank * batch // self.world_size, (self.rank + 1) * batch // self.world_size)

    def check_batches(self, smallest: int) -> None:
        """Raise ConfigError if the smallest batch of an epoch has no image for some rank."""
        if smallest < self.world_size:
            raise ConfigError(
                f"the last batch of an epoch has {smallest} images, too few for {self.world_size} processes: set "
                "drop_last=true, another batch_size, or a smaller nproc_per_node"
            )

    def any(self, *asked: bool) -> list[bool]:
        """For each question, whether some rank says yes: the same answer on every rank, so all do the same."""
        if self.world_size == 1:
            return list(asked)
        flags = torch.tensor(asked or (False,), dtype=torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.control)
        return [bool(flag) for flag in flags]

    def total(self, *values: Tensor) -> Tensor:
        """Each scalar's sum over all ranks, float64 (values,); on a GPU this waits for it."""
        sums = torch.stack([value.detach().double().cpu() for value in values])
        if self.world_size > 1:
            dist.all_reduce(sums, group=self.control)
        return sums

    def gather(self, part: Payload) -> list[Payload]:
        """Every rank's part, in order, on rank 0; nothing elsewhere. No rank leaves before all have come."""
        if self.world_size == 1:
            return [part]
        parts = [None] * self.world_size if self.leads else None
        dist.gather_object(mapped(part, lambda _, tensor: tensor.cpu()), parts, group=self.control)
        return parts or []  # type: ignore[return-value]

    def share(self, payload: Payload | None) -> Payload:
        """Rank 0's payload, on every rank. What arrives can only be tensors and plain values."""
        if self.world_size > 1:
            body = io.BytesIO()
            torch.save(payload, body)
            size = torch.tensor(body.tell())
            dist.broadcast(size, 0, self.control)
            data = torch.frombuffer(bytearray(body.getvalue() if self.leads else int(size)), dtype=torch.uint8)
            dist.broadcast(data, 0, self.control)
            payload = torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)
        assert payload is not None
        return payload

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """Enter a block first in one process a machine, then in the others, which find what it has left there."""
        if self.local_rank:
            self.any()
        yield
        if not self.local_rank:
            self.any()

    def synchronized(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch norm over the whole batch instead of each rank's share; its state_dict is the same."""
        if self.world_size == 1:
            return model
        if device.type == "cuda":
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return, no-untyped-call]
        return _synchronized(model)

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """What to call forward on, so that backward averages the gradients over all ranks."""
        if self.world_size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[torch.cuda.current_device()] if device.type == "cuda" else None,
            forward_sync_buffers=False,  # they are equal, for all ranks compute them of the same sums
            # Layers that are fixed half-way need no gradient from then on. And without it the gradients change their
            # places in the buckets after the first step, hence the order in which they are added: a resumed run of
            # three ranks or more would end with other bits.
            find_unused_parameters=True,
        )

    @contextmanager
    def lost_is_told(self) -> Iterator[None]:
        """A collective fails with a RuntimeError when a rank is gone; make it one that says so, and may pass.

        Raises:
            RankLostError: for a RuntimeError, where there are several ranks.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1:
                raise
            why = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]  # without the place in torch's sources
            raise RankLostError(f"rank {self.rank} could not go on: {why}") from error


@contextmanager
def joined(timeout: timedelta) -> Iterator[Ranks]:
    """The ranks that torch's elastic agent has started together, as this process' environment tells.

    Args:
        timeout: how long to wait for a rank that does not answer; one that is dead is noticed at once.
    """
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    try:
        control = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(control, dist.ProcessGroup)
        yield Ranks(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            local_rank=int(os.environ["LOCAL_RANK"]),
            nodes=int(os.environ["GROUP_WORLD_SIZE"]),
            control=control,
        )
    finally:
        dist.destroy_process_group()


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks; torch's own SyncBatchNorm works on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        x_float = x.float()  # once, so that its gradient is summed before it is rounded
        variances, means = torch.var_mean(x_float, (0, 2, 3), correction=0)
        count = means.new_tensor([x.numel() / x.shape[1]])
        # Each rank fills its row of zeros; their sum then holds all rows, and gradients flow back to each.
        rows = torch.zeros(dist.get_world_size(), 2 * len(means) + 1)
        rows = rows.index_add(0, torch.tensor([dist.get_rank()]), torch.cat([means, variances, count])[None])
        rows = all_reduce(rows)  # type: ignore[no-untyped-call]
        counts, total = rows[:, -1:], rows[:, -1].sum()
        means, variances = rows[:, : len(means)], rows[:, len(means) : -1]
        # Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
        mean = (counts * means).sum(0) / total
        variance = (counts * (variances + (means - mean).square())).sum(0) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            weight = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, weight)
            self.running_var.lerp_(variance * total / (total - 1), weight)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return torch.addcmul(shift[:, None, None], x_float, scale[:, None, None]).to(x.dtype)


def _synchronized(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        norm = _BatchNorm(module.num_features, module.eps, module.momentum)
        norm.weight, norm.bias = module.weight, module.bias
        norm._buffers = module._buffers
        return norm
    for name, child in module.named_children():
        setattr(module, name, _synchronized(child))
    return module


ALONE = Ranks()
