"""Whether two sets of vectors are of one distribution."""

import math

import pytest
import torch
from torch import Generator, Tensor

from nightshift.data.chance import generator_of
from nightshift.judging.two_samples import discrepancy, distances


def drawn(seed: int, count: int, mean: float = 0.0, width: float = 1.0) -> Tensor:
    """Vectors of length 1, as embeddings are."""
    vectors = mean + width * torch.randn(count, 8, generator=Generator().manual_seed(seed))
    return torch.nn.functional.normalize(vectors + torch.arange(8), dim=1)


def p_value(seed: int, **changed: float) -> float:
    return discrepancy(drawn(2 * seed, 60), drawn(2 * seed + 1, 90, **changed), generator_of(seed, "test"))[1]


def test_samples_of_one_distribution_are_told_apart_by_chance_only() -> None:
    """At 0.05, in 100 seeds: 5 are expected, and more than 12 come once in 700 times."""
    assert sum(p_value(seed) < 0.05 for seed in range(100)) <= 12


@pytest.mark.parametrize("changed", [{"mean": 1.0}, {"width": 2.0}])
def test_samples_of_two_distributions_are_told_apart(changed: dict[str, float]) -> None:
    assert all(p_value(seed, **changed) < 0.01 for seed in range(10))


def test_it_is_the_unbiased_estimate_of_gretton_et_al() -> None:
    one, other = drawn(0, 7), drawn(1, 5, mean=0.5)
    pooled = [*one.double(), *other.double()]
    squared = [[float((a - b) @ (a - b)) for b in pooled] for a in pooled]
    width = sorted(value for row in squared for value in row)[(len(pooled) ** 2 - 1) // 2]

    def mean(rows: range, columns: range) -> float:
        values = [math.exp(-squared[a][b] / width) for a in rows for b in columns if a != b]
        return sum(values) / len(values)

    ours, theirs = range(7), range(7, 12)
    expected = mean(ours, ours) + mean(theirs, theirs) - 2 * mean(ours, theirs)
    assert discrepancy(one, other, generator_of(0, "test"))[0] == pytest.approx(expected, abs=1e-5)


def test_the_same_samples_give_the_same_value_again() -> None:
    assert p_value(3) == p_value(3)


def test_vectors_that_are_all_alike_do_not_differ() -> None:
    found, p_value = discrepancy(torch.ones(30, 4), torch.ones(40, 4), generator_of(0, "test"))
    assert found == pytest.approx(0, abs=1e-6)
    assert p_value == 1


def test_of_a_network_that_has_diverged_nothing_is_told() -> None:
    with pytest.raises(ValueError, match="is no number"):
        discrepancy(torch.full((30, 4), torch.nan), torch.ones(40, 4), generator_of(0, "test"))


def test_a_vector_that_is_far_from_all_known_ones_has_the_largest_distance() -> None:
    known = drawn(0, 200)
    vectors = torch.cat([drawn(1, 50), -drawn(2, 1)])
    assert int(distances(vectors, known).argmax()) == 50
    assert distances(vectors, known[:3]).shape == (51,)
