"""Batch norm over the batches of all ranks."""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # what torch's three kinds have in common

from nightshift.errors import ConfigError


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The network with each batch norm replaced by one over all ranks, with the same parameters and buffers.

    Raises:
        ConfigError: it has a batch norm of somebody's own, of which nobody knows how to do that.
    """
    for name, module in model.named_modules():
        if isinstance(module, BatchNorm) and not (_is_plain(module) or _is_timms(module)):
            raise ConfigError(
                f"{name} of the network is a {type(module).__name__}, whose statistics several processes cannot share: "
                "set nproc_per_node=1, or let it be one of torch's own batch norms"
            )
    if device.type == "cpu":
        return _synchronized_on_cpu(model)
    if any(map(_is_timms, model.modules())):
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-any-return, no-untyped-call]


class _RowsOfAllRanks(torch.autograd.Function):
    """A row (columns) of each rank → all rows (ranks, columns), through which gradients flow back to each rank."""

    @staticmethod
    def forward(ctx: Any, row: Tensor) -> Tensor:
        rows = [torch.empty_like(row) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, row)  # half as many messages, one after the other, as a sum
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[dist.get_rank()]


class _BatchNorm(BatchNorm):
    """Batch norm over the batches of all ranks; torch's own SyncBatchNorm works on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, ...) → the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        x_float = x.float()  # converted once, so that its gradient is summed before it is rounded
        variances, means = torch.var_mean(x_float, (0, *range(2, x.ndim)), correction=0)
        count = means.new_tensor([x.numel() / x.shape[1]])
        rows = _RowsOfAllRanks.apply(torch.cat([means, variances, count]))
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
        shape = (-1, *[1] * (x.ndim - 2))
        return torch.addcmul(shift.view(shape), x_float, scale.view(shape)).to(x.dtype)

    def _check_input_dim(self, input: Tensor) -> None:
        """Of any number: it stands for each of torch's three kinds."""


class _BatchNormAct(_BatchNorm):
    """timm's BatchNormAct2d, which also drops values and has an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return, operator]


def _synchronized_on_cpu(module: nn.Module) -> nn.Module:
    if isinstance(module, BatchNorm):
        norm = (_BatchNormAct if _is_timms(module) else _BatchNorm)(module.num_features, module.eps, module.momentum)
        norm.weight, norm.bias = module.weight, module.bias
        norm._buffers = module._buffers
        norm._modules = module._modules
        return norm
    for name, child in module.named_children():
        setattr(module, name, _synchronized_on_cpu(child))
    return module


def _is_plain(module: BatchNorm) -> bool:
    """Whether it does what torch's own does, and has all that it can have."""
    return type(module).forward is BatchNorm.forward and module.affine and module.track_running_stats


def _is_timms(module: nn.Module) -> bool:
    if "timm" not in sys.modules or not isinstance(module, BatchNorm):
        return False
    from timm.layers import BatchNormAct2d

    return type(module) is BatchNormAct2d and module.affine and module.track_running_stats
