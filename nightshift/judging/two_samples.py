"""Whether two sets of vectors are of one distribution, and which vector is far from a set."""

import torch
from torch import Generator, Tensor

_PERMUTATIONS = 1000
_NEIGHBOURS = 10


def discrepancy(one: Tensor, other: Tensor, generator: Generator) -> tuple[float, float]:
    """The maximum mean discrepancy of two samples, and the p-value of a permutation test that they differ.

    It is the unbiased estimate of the squared discrepancy of Gretton et al. (2012, "A Kernel Two-Sample Test"), with
    their Gaussian kernel whose width is the median of the distances. The p-value is 1/1001 at the least.

    Args:
        one, other: float32 (N, features) and (M, features), both at least two. The memory grows as (N + M) squared.
    """
    count, all_of_them = len(one), len(one) + len(other)
    pooled = torch.cat([one, other])
    squared = torch.cdist(pooled, pooled).square_()
    width = squared.median()
    if not width.isfinite():
        raise ValueError("what the network sees of some images is no number")
    kernel = squared.div_(-width.clamp_min(torch.finfo().tiny)).exp_().fill_diagonal_(0)
    # A column says which images are of the first sample: as it is, and then by chance.
    chosen = torch.zeros(all_of_them, 1 + _PERMUTATIONS)
    chosen[:count, 0] = 1
    for column in range(1, 1 + _PERMUTATIONS):
        chosen[torch.randperm(all_of_them, generator=generator)[:count], column] = 1
    of_all = kernel.sum(1, dtype=torch.float64)
    touching = of_all @ chosen.double()
    within = (chosen * (kernel @ chosen)).sum(0, dtype=torch.float64)
    across = touching - within
    without = of_all.sum() - 2 * touching + within
    others = all_of_them - count
    found = within / (count * (count - 1)) + without / (others * (others - 1)) - 2 * across / (count * others)
    # Values that differ only by rounding count as equal.
    at_least = int((found[1:] >= found[0] - 1e-7).sum())
    return float(found[0]), (1 + at_least) / (1 + _PERMUTATIONS)


def distances(vectors: Tensor, known: Tensor) -> Tensor:
    """How far each vector is from its tenth nearest known one, float32 (N,): Sun et al. (2022, arXiv 2204.06507).

    Args:
        vectors, known: float32 (N, features) and (M, features). Of fewer than ten known ones the furthest counts.
    """
    return torch.cdist(vectors, known).kthvalue(min(_NEIGHBOURS, len(known)), dim=1).values
