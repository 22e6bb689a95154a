"""Batch norm over the batches of all ranks, on CPUs."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce  # the one that gradients flow through


class _BatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all ranks; torch's own SyncBatchNorm works on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, height, width) → the same shape and dtype."""
        if not self.training:
            return super().forward(x)
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        x_float = x.float()  # converted once, so that its gradient is summed before it is rounded
        variances, means = torch.var_mean(x_float, (0, 2, 3), correction=0)
        count = means.new_tensor([x.numel() / x.shape[1]])
        # Each rank fills one row of zeros. The sum over ranks has all rows, and gradients flow back to each rank.
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


def synchronized_on_cpu(module: nn.Module) -> nn.Module:
    """The module with each batch norm replaced by one over all ranks, with the same parameters and buffers."""
    if isinstance(module, nn.BatchNorm2d):
        norm = _BatchNorm(module.num_features, module.eps, module.momentum)
        norm.weight, norm.bias = module.weight, module.bias
        norm._buffers = module._buffers
        return norm
    for name, child in module.named_children():
        setattr(module, name, synchronized_on_cpu(child))
    return module
