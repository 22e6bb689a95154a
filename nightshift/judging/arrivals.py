"""What came in since the champion was trained: tonight's snapshot beside the champion's, image by image.

An image is known by the sha256 of its file. One with more copies counts once.
"""

import hashlib
import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import compute

from nightshift.data import rows as table
from nightshift.data.stored import read_rows
from nightshift.records.snapshots import SPLITS, Split
from nightshift.storage.store import Store

_KEY = b"nightshift drift/"
_FEWEST = 20
"""A group (stayed, came, went) with fewer images is left out of the test."""
_FEWEST_EXPECTED = 5
"""How many images of each class the test has to expect among those that stayed, came or went (Cochran 1954)."""


class Image(NamedTuple):
    """An image of tonight's snapshot: its name, its number in its split, and the name of its class."""

    id: str
    split: Split
    number: int
    label: str


@dataclass(frozen=True)
class Counts:
    """How many images to train on there are of each class, by name, in two snapshots."""

    before: Mapping[str, int]
    tonight: Mapping[str, int]
    stayed: Mapping[str, int]
    """Images in both, under the same label. A relabelled image has gone from one class and come to the other."""
    came: Mapping[str, int]
    went: Mapping[str, int]

    def moved(self) -> dict[str, float]:
        """By how much the share of each class has grown, if it has moved; those that moved most first."""
        before, tonight = (max(sum(counts.values()), 1) for counts in (self.before, self.tonight))
        moved = {
            name: self.tonight.get(name, 0) / tonight - self.before.get(name, 0) / before
            for name in sorted({*self.before, *self.tonight})
        }
        return {name: moved[name] for name in sorted(moved, key=lambda name: -abs(moved[name])) if moved[name]}

    def p_value(self) -> float | None:
        """The p-value of Pearson's chi-squared test that the images that stayed, came and went are of the same classes.

        The two snapshots themselves are not two samples, because most images are in both. Rare classes are pooled.
        None if too few images came and went.
        """
        from scipy.stats import chi2_contingency  # here, because it costs every start half a second

        groups = [group for group in (self.stayed, self.came, self.went) if sum(group.values()) >= _FEWEST]
        names = sorted({name for group in groups for name in group})
        counts = _pooled(np.array([[group.get(name, 0) for name in names] for group in groups], np.int64))
        return float(chi2_contingency(counts, correction=False).pvalue) if min(counts.shape) > 1 else None


@dataclass(frozen=True)
class Arrivals:
    """What came in, and what it is compared with."""

    came: int
    """How many images are new, in all splits: the champion was trained on none of them."""
    new: list[Image]
    """Some of these."""
    old: list[Image]
    """Some of tonight's test images that the champion's snapshot had too, and that it was not trained on."""
    counts: Counts


def arrivals(store: Store, name: str, tonight: str, before: str, most: int) -> Arrivals:
    """What is in a snapshot that was not in another.

    Args:
        tonight, before: the digests of the two.
        most: how many new and how many old images are chosen; a keyed hash of their content decides which.

    Raises:
        SourceError: there is no such snapshot any more.
        DataCorruptError, StorageError: its rows cannot be had.
    """
    ours, theirs = _numbered(store, name, tonight), _numbered(store, name, before)
    is_known = compute.is_in(ours["content"], value_set=theirs["content"])
    trained_on = theirs.filter(compute.equal(theirs["split"], "train"))
    is_tested = compute.and_(is_known, compute.equal(ours["split"], "test"))
    is_tested = compute.and_not(is_tested, compute.is_in(ours["content"], value_set=trained_on["content"]))
    new = _each_once(ours.filter(compute.invert(is_known)))
    return Arrivals(
        came=len(new),
        new=_chosen(new, most),
        old=_chosen(_each_once(ours.filter(is_tested)), most),
        counts=_counts(trained_on, ours.filter(compute.equal(ours["split"], "train"))),
    )


def judged(store: Store, name: str, digest: str, most: int) -> list[Image]:
    """Some images of a snapshot that are not trained on, chosen as those of `arrivals`; raises what that does."""
    images = _numbered(store, name, digest)
    return _chosen(_each_once(images.filter(compute.not_equal(images["split"], "train"))), most)


def _numbered(store: Store, name: str, digest: str) -> pa.Table:
    """The images that are used, in the order in which each split is packed."""
    _, rows = read_rows(store, name, digest)
    parts = []
    for split in SPLITS:
        part = table.of_split(rows, split).select(["content", "id", "split", "label"])
        parts.append(part.append_column("number", pa.array(np.arange(len(part)))))
    return pa.concat_tables(parts)


def _each_once(images: pa.Table) -> pa.Table:
    """Without copies."""
    places = images.select(["content"]).append_column("at", pa.array(np.arange(len(images))))
    return images.take(places.group_by("content").aggregate([("at", "min")])["at_min"])


def _chosen(images: pa.Table, most: int) -> list[Image]:
    def order(values: tuple[bytes, str, Split, int, str]) -> bytes:
        return hashlib.sha256(_KEY + values[0]).digest()

    values = table.iterate(images, "content", "id", "split", "number", "label")
    return [Image(*rest) for _, *rest in heapq.nsmallest(most, values, key=order)]


def _counts(before: pa.Table, tonight: pa.Table) -> Counts:
    ours, theirs = _labelled(tonight), _labelled(before)
    is_in_both = compute.is_in(ours, value_set=theirs)
    return Counts(
        before=_by_class(before),
        tonight=_by_class(tonight),
        stayed=_by_class(tonight.filter(is_in_both)),
        came=_by_class(tonight.filter(compute.invert(is_in_both))),
        went=_by_class(before.filter(compute.invert(compute.is_in(theirs, value_set=ours)))),
    )


def _labelled(images: pa.Table) -> pa.ChunkedArray:
    content, label = images["content"].cast(pa.binary()), images["label"].cast(pa.binary())
    return compute.binary_join_element_wise(content, label, b"")


def _by_class(images: pa.Table) -> dict[str, int]:
    counted = compute.value_counts(images["label"])
    return dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))


def _pooled(counts: np.ndarray) -> np.ndarray:
    """Counts (groups, classes) with the rare classes as one, so that each is expected often enough in each group."""
    if not counts.size:
        return counts
    images = counts.sum(0)
    enough = _FEWEST_EXPECTED * images.sum() / counts.sum(1).min()
    by_size = images.argsort(kind="stable")
    rare = int((images < enough).sum())
    while 0 < rare < len(images) and images[by_size[:rare]].sum() < enough:
        rare += 1
    parts = [counts[:, by_size[rare:]]]
    return np.concatenate([*parts, counts[:, by_size[:rare]].sum(1, keepdims=True)] if rare else parts, axis=1)
