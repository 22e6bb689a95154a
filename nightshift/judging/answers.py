"""What two versions predict for the same test images, matched by image and by class name.

A champion with stored predictions for tonight's images is compared by these predictions. Any other is tested on
tonight's images. If it can no longer be built, only the images for which both have stored predictions count.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load as load_safetensors

from nightshift import progress
from nightshift.data import rows as table
from nightshift.data.specs import SPECS, is_same_data
from nightshift.data.stored import read_rows
from nightshift.errors import (
    CheckpointCorruptError,
    ConfigError,
    DataCorruptError,
    DocumentDamagedError,
    NotComparableError,
    ObjectNotFoundError,
    SourceError,
)
from nightshift.judging.paired import Division
from nightshift.records.versions import ModelCard, read_tensors
from nightshift.storage.store import Store

PREDICTIONS = "predictions.safetensors"
"""A file of each version: `predicted` and `labels` of the test images in the data set's order.

Both are uint8 (N,), or int32 (N,) where there are more than 256 classes. `content` is the sha256 of each image's file,
uint8 (N, 32). It is missing for nightshift's own data sets, and for versions published before it was introduced.
"""
FEWEST_SHARED = 100
"""With fewer images in common, two versions are not compared."""
Answer = Callable[[ModelCard], np.ndarray]
"""What a version predicts of tonight's test images: the numbers of its card's classes, int (N,).

Raises ConfigError or CheckpointCorruptError where the version cannot be built.
"""


@dataclass(frozen=True)
class Predictions:
    """What a version has said of the test images of its own night, as PREDICTIONS has it; the numbers are int64."""

    card: ModelCard
    predicted: np.ndarray
    labels: np.ndarray
    content: np.ndarray | None


@dataclass(frozen=True)
class Pair:
    """A candidate and another version on the same n test images of tonight."""

    candidate: np.ndarray
    """Whether it classified each image correctly, bool (n,); so is `other`."""
    other: np.ndarray
    labels: np.ndarray
    """The number of each image's class tonight, int64 (n,)."""
    images: np.ndarray
    """Which of tonight's test images these are, int64 (n,)."""
    known: np.ndarray
    """Whether the other version knows the image's class, bool (n,)."""
    note: str = ""
    """What was peculiar about it; empty if nothing was."""


def not_at_hand(card: ModelCard) -> np.ndarray:
    """The `Answer` of whoever has no images at hand."""
    raise ConfigError(f"there is nothing here to test {card.version} on")


def pair(store: Store, ours: Predictions, card: ModelCard, answer: Answer) -> Pair:
    """The candidate and another version on the same images.

    Raises:
        DocumentDamagedError: predictions are not what was published, or the two are not of the same images.
        NotComparableError: the version cannot be built, and too few images have predictions of both; or it was
            trained on all of them.
        StorageError: something cannot be read.
    """
    everything = np.arange(len(ours.labels))
    if is_same_data(card.name, card.dataset_digest, ours.card.dataset_digest):
        theirs = read_predictions(store, card)
        if not np.array_equal(ours.labels, theirs.labels):
            raise _of_other_images(ours.card, card)
        return _paired(ours, card, theirs.predicted, everything)
    try:
        predicted = answer(card)
    except (ConfigError, CheckpointCorruptError) as error:
        return _shared(store, ours, card, str(error))
    if len(predicted) != len(everything):
        raise _of_other_images(ours.card, card)
    fair = np.flatnonzero(~_trained_on(store, ours, card))
    if not len(fair):
        raise NotComparableError(f"{card.version} was trained on all of tonight's test images: the splits were changed")
    left_out = len(everything) - len(fair)
    note = f"without {left_out:,} test images that it was trained on" if left_out else ""
    return _paired(ours, card, predicted[fair], fair, note)


def read_predictions(store: Store, card: ModelCard) -> Predictions:
    """What a version has said of the test images of its own night.

    Raises:
        DocumentDamagedError: they are not what was published, or are none.
        StorageError: they cannot be read.
    """
    return Predictions(card, *read_tensors(store, card, PREDICTIONS, lambda body: _predictions(body, card)))


def slices(store: Store, ours: Predictions, columns: Sequence[str]) -> list[Division]:
    """How a candidate's test images divide by columns of the team's own: a part for each value, named COLUMN=VALUE.

    Raises:
        SourceError, DataCorruptError, StorageError: the rows of its snapshot cannot be had, or are of other images.
    """
    card = ours.card
    if not columns or card.name in SPECS:
        return []
    _, rows = read_rows(store, card.name, card.dataset_digest)
    try:
        tested = table.iterate(table.of_split(rows, "test"), "extra")
        extras = [json.loads(extra) if extra else {} for (extra,) in tested]
        values = {column: [str(extra.get(column, "")) for extra in extras] for column in columns}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataCorruptError(f"the columns of the snapshot {card.dataset_digest[:12]} are damaged: {error}") from None
    if len(extras) != len(ours.labels):
        raise DataCorruptError(f"the predictions of {card.version} are not of the images of its snapshot")
    return [_slice(column, values[column]) for column in columns]


def _slice(column: str, values: list[str]) -> Division:
    names, numbers = np.unique(np.array(values, dtype=object), return_inverse=True)
    if not any(names):
        progress.current().warn(f"gate.slices: no test image has a value in the column {column!r}")
    return Division(
        "slice", [f"{column}={name}" for name in names], np.where(np.array(values, dtype=object) == "", -1, numbers)
    )


def _paired(ours: Predictions, card: ModelCard, predicted: np.ndarray, images: np.ndarray, note: str = "") -> Pair:
    """`predicted`: of these images by the other version, in numbers of its own classes."""
    tonight = {name: number for number, name in enumerate(ours.card.classes)}
    in_tonights = np.array([tonight.get(name, -1) for name in card.classes], np.int64)
    labels = ours.labels[images]
    return Pair(
        candidate=ours.predicted[images] == labels,
        other=in_tonights[predicted] == labels,
        labels=labels,
        images=images,
        known=np.isin(labels, in_tonights),
        note=note,
    )


def _shared(store: Store, ours: Predictions, card: ModelCard, why: str) -> Pair:
    theirs = read_predictions(store, card)
    places = {content: at for at, content in enumerate(_contents(theirs))}
    found = [(number, places[content]) for number, content in enumerate(_contents(ours)) if content in places]
    cannot = f"{card.version} can no longer be built here ({why})"
    if len(found) < FEWEST_SHARED:
        raise NotComparableError(
            f"{cannot}, and it has predictions of {len(found):,} of tonight's {len(ours.labels):,} test images, where "
            f"{FEWEST_SHARED} are needed. Install here again what its network needs"
        )
    images, at = np.array(found).T
    note = f"{cannot}, so these are the {len(found):,} of tonight's {len(ours.labels):,} test images it had seen"
    return _paired(ours, card, theirs.predicted[at], images, note)


def _trained_on(store: Store, ours: Predictions, card: ModelCard) -> np.ndarray:
    """Which of tonight's test images another version was trained on, bool (N,).

    An image stays in its split, so there are none unless somebody has changed the split rules. If the version's
    snapshot is gone, none can be found.
    """
    trained = set()
    with suppress(SourceError, DataCorruptError, DocumentDamagedError, ObjectNotFoundError):
        if ours.content is not None:
            rows = table.of_split(read_rows(store, card.name, card.dataset_digest)[1], "train")
            trained = {content for (content,) in table.iterate(rows, "content")}
    return np.array([content in trained for content in _contents(ours)] or [False] * len(ours.labels), bool)


def _contents(predictions: Predictions) -> list[bytes]:
    content = predictions.content
    return [] if content is None else [row.tobytes() for row in content]


def _of_other_images(ours: ModelCard, theirs: ModelCard) -> DocumentDamagedError:
    return DocumentDamagedError(
        f"the predictions of {ours.version} and {theirs.version} are of other images, though both name the same data "
        "set. Promote by hand, or train and publish under another run id"
    )


def _predictions(body: bytes, card: ModelCard) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    stored = load_safetensors(body)
    predicted, labels, content = stored["predicted"], stored["labels"], stored.get("content")
    if predicted.dtype not in (np.uint8, np.int32) or predicted.dtype != labels.dtype:
        raise ValueError("predicted and labels are not both uint8 or both int32")
    if not predicted.shape == labels.shape == (labels.size or 1,):
        raise ValueError("predicted and labels are not of one length")
    if not 0 <= min(predicted.min(), labels.min()) <= max(predicted.max(), labels.max()) < len(card.classes):
        raise ValueError("predicted or labels name a class that the card does not have")
    if content is not None and (content.dtype != np.uint8 or content.shape != (len(labels), 32)):
        raise ValueError("content is no sha256 of each image")
    return predicted.astype(np.int64), labels.astype(np.int64), content
