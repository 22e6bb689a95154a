"""Two classifiers on the same images, image by image: on the whole, and on each part of the images that is guarded.

Both classify most images alike, and those images say nothing about the difference. So the comparison can detect half a
point, which two separate intervals would hide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nightshift.refs import MOST_GUARDS, Comparison, Guard

SIGNIFICANCE = 0.05
Kind = Literal["known", "class", "slice"]


@dataclass(frozen=True)
class Division:
    """How images divide into parts, each of which has a guard of its own."""

    kind: Kind
    names: Sequence[str]
    numbers: np.ndarray
    """The place in `names` of the part an image belongs to, int (N,); -1 for none."""


@dataclass(frozen=True)
class Guarded:
    """What the guards say. A class that is only ever gained is guarded too, so `parts` counts what was tested."""

    parts: int
    broken: int
    worst: list[Guard]
    """Those that are broken, then those that are closest to it, `MOST_GUARDS` at most."""


def compare(candidate: np.ndarray, champion: np.ndarray, name: str) -> Comparison:
    """Compare two classifiers on the same images.

    The test is McNemar's (1947) in its exact form, a binomial test on the images that only one of them has right. The
    interval is that of Bonett and Price (2012) for the difference of paired proportions, which also holds where the
    two hardly differ.

    Args:
        candidate, champion: bool (N,), whether each image was classified correctly; one image at least.
        name: the champion's version.
    """
    from scipy.stats import binomtest  # here, because it costs every start half a second

    images = len(candidate)
    gained, lost = int((candidate & ~champion).sum()), int((champion & ~candidate).sum())
    low, high = _interval(gained, lost, images)
    return Comparison(
        champion=name,
        images=images,
        only_candidate=gained,
        only_champion=lost,
        difference=(gained - lost) / images,
        low=low,
        high=high,
        p_value=float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
    )


def guard(
    candidate: np.ndarray, champion: np.ndarray, divisions: Sequence[Division], fewest: int, allowed: float
) -> Guarded:
    """On which parts of the images the candidate is worse, beyond what chance explains.

    A guard is broken if McNemar's exact test says so on one side, at a level of 0.05 for all guards together (Holm
    1979), and if the loss is larger than what is allowed.

    Args:
        candidate, champion: bool (N,), whether each image was classified correctly.
        fewest: a part with fewer images is not guarded.
        allowed: the share of a part's images that may be lost.
    """
    from scipy.stats import binom  # as above

    parts: list[tuple[Kind, str]] = []
    counts: list[list[int]] = []
    for division in divisions:
        counted = [
            np.bincount(division.numbers[chosen & (division.numbers >= 0)], minlength=len(division.names))
            for chosen in (np.ones_like(candidate), candidate & ~champion, champion & ~candidate)
        ]
        for at in np.flatnonzero(counted[0] >= max(fewest, 1)).tolist():
            parts.append((division.kind, division.names[at]))
            counts.append([column[at] for column in counted])
    images, gained, lost = np.array(counts, np.int64).reshape(-1, 3).T
    p_values = holm(binom.sf(lost - 1, gained + lost, 0.5))
    # Counted in images: -0.005 and (120 - 170) / 10000 need not be the same floating-point number.
    broken = (p_values < SIGNIFICANCE) & (lost - gained > allowed * images + 1e-6)
    worst = np.lexsort(((gained - lost) / np.maximum(images, 1), p_values, ~broken))[:MOST_GUARDS]
    return Guarded(
        len(parts),
        int(broken.sum()),
        [
            _guard(parts[at], int(images[at]), int(gained[at]), int(lost[at]), float(p_values[at]), not broken[at])
            for at in worst.tolist()
        ],
    )


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values (N,) corrected for their number, after Holm (1979): below 0.05, each holds at that level for all."""
    order = p_values.argsort()
    corrected = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    return np.minimum(corrected, 1)[order.argsort()]


def of_whole(found: Comparison, is_ok: bool) -> Guard:
    """The comparison of all images as the first line of a table of guards."""
    fields = found.model_dump(include={"images", "difference", "low", "high", "p_value"})
    return Guard(name="all images", kind="whole", ok=is_ok, **fields)


def _guard(part: tuple[Kind, str], images: int, gained: int, lost: int, p_value: float, is_ok: bool) -> Guard:
    (kind, name), (low, high) = part, _interval(gained, lost, images)
    difference = (gained - lost) / images
    return Guard(
        name=name, kind=kind, images=images, difference=difference, low=low, high=high, p_value=p_value, ok=is_ok
    )


def _interval(gained: int, lost: int, images: int) -> tuple[float, float]:
    """The 95 % interval of the difference of two paired proportions, after Bonett and Price (2012)."""
    from scipy.stats import norm  # as above

    share_gained, share_lost = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    middle = share_gained - share_lost
    half = norm.ppf(1 - SIGNIFICANCE / 2) * math.sqrt((share_gained + share_lost - middle**2) / (images + 2))
    return float(middle - half), float(middle + half)
