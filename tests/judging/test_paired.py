"""Whether one classifier is worse than another on a part of the images, and not only by chance."""

import numpy as np
import pytest

from nightshift.judging.paired import Division, compare, guard, holm
from nightshift.refs import MOST_GUARDS


def classes_of(labels: np.ndarray) -> Division:
    return Division("class", [f"class {number}" for number in range(labels.max() + 1)], labels)


def test_mcnemars_test_and_its_interval_are_the_published_ones() -> None:
    candidate = np.array([True] * 10 + [False] * 2 + [True] * 70 + [False] * 18)
    champion = np.array([False] * 10 + [True] * 2 + [True] * 70 + [False] * 18)
    found = compare(candidate, champion, "champion")
    assert (found.only_candidate, found.only_champion, found.difference) == (10, 2, 0.08)
    # Twice the chance of at most 2 heads in 12 throws.
    assert found.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    # Bonett and Price (2012): (11 - 3) / 102, and 1.96 standard errors around it.
    assert (found.low, found.high) == pytest.approx((0.0081638, 0.1486990), abs=1e-6)


def test_two_that_do_not_differ_are_not_certain_to_be_equal() -> None:
    same = np.array([True, False] * 50)
    found = compare(same, same, "champion")
    assert (found.difference, found.p_value) == (0, 1)
    assert found.low == -found.high < 0


def test_p_values_are_corrected_as_holm_has_published() -> None:
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.4, 0.9])).tolist() == pytest.approx([0.8, 0.9])
    assert holm(np.array([])).tolist() == []


def test_a_guard_is_mcnemars_exact_test_on_one_side() -> None:
    candidate = np.array([True] * 2 + [False] * 10 + [True] * 88)
    champion = np.array([False] * 2 + [True] * 10 + [True] * 88)
    found = guard(candidate, champion, [classes_of(np.zeros(100, int))], 30, 0)
    # The chance of at most 2 heads in 12 throws.
    assert found.worst[0].p_value == pytest.approx((1 + 12 + 66) / 2**12)
    assert (found.worst[0].difference, found.worst[0].ok, found.broken) == (-0.08, False, 1)
    assert guard(candidate, champion, [classes_of(np.zeros(100, int))], 30, 0.08).broken == 0
    assert guard(champion, candidate, [classes_of(np.zeros(100, int))], 30, 0).broken == 0


def test_one_lost_class_is_seen_among_forty_though_the_whole_is_better() -> None:
    labels = np.repeat(np.arange(40), 50)
    chance = np.random.default_rng(0)
    champion = chance.random(2000) < 0.8
    candidate = np.where(labels == 7, False, chance.random(2000) < 0.9)
    assert candidate.mean() > champion.mean()
    found = guard(candidate, champion, [classes_of(labels)], 30, 0.05)
    assert (found.parts, found.broken, found.worst[0].name) == (40, 1, "class 7")
    assert len(found.worst) == MOST_GUARDS


def test_a_part_with_too_few_images_has_no_guard() -> None:
    labels = np.repeat([0, 1, 2], [29, 30, 0])
    found = guard(np.zeros(59, bool), np.ones(59, bool), [classes_of(labels)], 30, 0)
    assert (found.parts, [part.name for part in found.worst]) == (1, ["class 1"])
    nothing = guard(np.zeros(59, bool), np.ones(59, bool), [Division("slice", [], np.full(59, -1))], 30, 0)
    assert (nothing.parts, nothing.worst) == (0, [])


def test_of_two_equal_models_the_guards_on_forty_classes_refuse_one_in_twenty_nights_at_most() -> None:
    """400 nights: more than 5 % could be chance up to 7 %, which is two deviations above."""
    labels, chance, refused = np.repeat(np.arange(40), 60), np.random.default_rng(1), 0
    for _ in range(400):
        is_hard = chance.random(len(labels)) < 0.3  # both are unsure of the same images
        candidate, champion = (~is_hard | (chance.random(len(labels)) < 0.5) for _ in range(2))
        refused += guard(candidate, champion, [classes_of(labels)], 30, 0).broken > 0
    assert refused <= 400 * 0.07


def test_slices_that_lie_over_classes_have_guards_of_their_own_and_all_are_corrected_together() -> None:
    labels, cameras = np.tile([0, 1], 100), np.repeat([0, 1, -1], [60, 60, 80])
    champion = np.ones(200, bool)
    candidate = np.where(cameras == 1, np.arange(200) % 4 > 1, True)
    divisions = [classes_of(labels), Division("slice", ["camera=door", "camera=yard"], cameras)]
    found = guard(candidate, champion, divisions, 30, 0.16)
    assert found.parts == 4
    assert {part.name for part in found.worst if not part.ok} == {"camera=yard"}
