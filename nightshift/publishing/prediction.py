"""Predictions of a published model for images in files, folders or an s3:// prefix, in bounded memory."""

import csv
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nightshift.data import batches
from nightshift.data.images import MAX_BYTES, SUFFIXES, check_size, fit, open_image
from nightshift.data.names import check_places
from nightshift.errors import (
    ConfigError,
    NoImagesError,
    StorageError,
    StorageUnreachableError,
    UnreadableImageError,
)
from nightshift.hardware import device_of, find_device
from nightshift.judging import evaluation
from nightshift.judging.published import load_version
from nightshift.records import champions
from nightshift.records.history import read_history
from nightshift.records.versions import read_card
from nightshift.refs import PredictionsRef
from nightshift.storage.store import Store, Stored
from nightshift.text import as_json, csv_cell
from nightshift.values import Resize

_BATCH = 256
"""The most images in a batch."""
OutputFormat = Literal["csv", "jsonl"]
_ESCAPED = "backslashreplace"
r"""How a byte of a file name that is no UTF-8 is written: as \udcff, from which JSON reads back the name."""


@dataclass(frozen=True)
class Prediction:
    """One image: its class and that class's probability, or why it could not be read."""

    image: str
    label: str | None
    probability: float | None
    error: str | None = None

    @property
    def problem(self) -> str:
        """The image and why it could not be read, in UTF-8 whatever its name is."""
        return f"{self.image}: {self.error}".encode(errors=_ESCAPED).decode()


@dataclass(frozen=True)
class _Source:
    """Where an image is said to be. `read` raises UnreadableImageError, and StorageUnreachableError."""

    name: str
    read: Callable[[], Image.Image]


class Classifier:
    """A published version, loaded from its verified weights."""

    def __init__(self, store: Store, name: str, version: str) -> None:
        """`version`: a version's name, or `champion`.

        Raises:
            ModelNotFoundError: no such version is published, or there is no champion.
            HistoryLostError: there was a champion, and its history is missing.
            DocumentDamagedError, CheckpointCorruptError: its card or its weights are not what was published.
            StorageError: they cannot be read.
            ConfigError: there is no such network here, it takes no images of this size, or its config cannot be read.
        """
        if version == "champion":
            history = read_history(store, name)
            card = champions.read_card_of(store, history, champions.champion_of(store, history).version)
        else:
            card = read_card(store, name, version)
        self.version, self.classes, self._tta = card.version, card.classes, card.train_config().evaluation.tta
        self.image_size, self.resize = card.image_size, card.resize
        self._model: nn.Module = load_version(store, card, find_device())
        self._scale, self._shift = batches.scale_and_shift(card.mean, card.std)

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 images (batch, side, side, 3) → probabilities (batch, classes), float32 on the CPU."""
        inputs = batches.to_input(images, self._scale, self._shift)
        return evaluation.predict(self._model, inputs, self._tta).softmax(1)

    def predict(self, store: Store, places: Iterable[str]) -> Iterator[Prediction]:
        """Predict each image at these places, in their order. A bad one is reported and does not stop the others.

        Each becomes a square as the training images did.

        Args:
            store: its connection reads the places that begin with s3://.
            places: files, folders (searched recursively), s3://BUCKET/PREFIX. In a folder or under a prefix, only files
                with one of SUFFIXES count. A file that is named itself may have any suffix.

        Raises:
            ConfigError: as `check_places`, or a place begins with s3:// and names no bucket.
            StorageError: a bucket cannot be listed, or the store does not answer.
        """
        sources = _sources(store, places)
        size = min(_BATCH, batches.images_at_a_time(self.image_size, len(self.classes), device_of(self._model)))
        while batch := list(islice(sources, size)):
            decoded = [_decode(source, self.image_size, self.resize) for source in batch]
            good = [image for image in decoded if isinstance(image, np.ndarray)]
            found = iter(self.probabilities(torch.from_numpy(np.stack(good))) if good else ())
            for source, image in zip(batch, decoded, strict=True):
                if isinstance(image, str):
                    yield Prediction(source.name, None, None, image)
                else:
                    probability, number = next(found).max(0)
                    yield Prediction(source.name, self.classes[number], float(probability))


def write(predictions: Iterable[Prediction], file: IO[str], kind: OutputFormat) -> tuple[int, list[Prediction]]:
    """Write a line per image, as CSV with a header or as JSON Lines.

    JSON Lines hold names exactly. CSV is for people and spreadsheets too, so it holds them as `csv_cell` shows them.

    Returns:
        How many were predicted, and those that could not be read.

    Raises:
        NoImagesError: none could be read. Their lines are written all the same.
    """
    fields = list(Prediction.__dataclass_fields__)
    table = csv.DictWriter(file, fields, lineterminator="\n")
    if kind == "csv":
        table.writeheader()
    good, bad = 0, []
    for prediction in predictions:
        if prediction.error:
            bad.append(prediction)
        else:
            good += 1
        if kind == "csv":
            table.writerow({name: csv_cell(value) for name, value in asdict(prediction).items()})
        else:
            file.write(as_json(asdict(prediction)) + "\n")
    if not good:
        named = "".join(f"\n  {prediction.problem}" for prediction in bad[:20])
        raise NoImagesError(f"none of {len(bad)} images can be read:{named}")
    return good, bad


def write_to(store: Store, out: str, predictions: Iterable[Prediction]) -> tuple[int, list[Prediction]]:
    """`write` to a file or, with s3://BUCKET/KEY, to an object. Its suffix decides the format.

    Raises:
        ConfigError: `out` ends neither in .csv nor in .jsonl.
        NoImagesError, StorageError: as `write` and `Store.upload`.
    """
    kind = output_format(out)
    if not out.startswith("s3://"):
        with open(out, "w", encoding="utf-8", errors=_ESCAPED) as file:
            return write(predictions, file, kind)
    bucket, key = store.at(out)
    with tempfile.TemporaryFile() as body:
        text = io.TextIOWrapper(body, encoding="utf-8", errors=_ESCAPED, write_through=True)
        written = write(predictions, text, kind)
        body.seek(0)
        bucket.upload(key, text.detach())
    return written


def predict(store: Store, name: str, version: str, places: Iterable[str], out: str) -> PredictionsRef:
    """Write a published model's predictions for images to `out`.

    Raises:
        ConfigError, ModelNotFoundError, NoImagesError, StorageError: as `Classifier` and `write_to`.
    """
    classifier = Classifier(store, name, version)
    good, bad = write_to(store, out, classifier.predict(store, places))
    return PredictionsRef(out=out, version=classifier.version, predicted=good, bad=[item.problem for item in bad])


def output_format(path: str) -> OutputFormat:
    """The format that the suffix of a file's name asks for.

    Raises:
        ConfigError: the suffix is neither .csv nor .jsonl.
    """
    if path.endswith(".csv"):
        return "csv"
    if path.endswith(".jsonl"):
        return "jsonl"
    raise ConfigError(f"{path!r}: predictions are written as .csv or .jsonl")


def _sources(store: Store, places: Iterable[str]) -> Iterator[_Source]:
    def none() -> Image.Image:
        raise UnreadableImageError(f"there is no image here ({', '.join(sorted(SUFFIXES))})")

    places = list(places)
    check_places(places)
    for place in places:
        found = _in_bucket(store, place) if place.startswith("s3://") else _on_disk(Path(place))
        first = next(found, _Source(place, none))
        yield first
        yield from found


def _on_disk(place: Path) -> Iterator[_Source]:
    if not _is_folder(place):
        yield _Source(str(place), partial(open_image, place))
        return
    for path in sorted(place.rglob("*")):
        # What is no file, such as a pipe, is named as unreadable, and not passed over.
        if path.suffix.lower() in SUFFIXES and not _is_folder(path):
            yield _Source(str(path), partial(open_image, path))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # it may not be looked at, and so not be read
        return False


def _in_bucket(store: Store, url: str) -> Iterator[_Source]:
    bucket, prefix = store.at(url)
    for stored in bucket.list(prefix):
        is_named = stored.key == prefix and not prefix.endswith("/")  # else it marks a folder
        if is_named or Path(stored.key).suffix.lower() in SUFFIXES:
            yield _Source(bucket.url(stored.key), partial(_from_bucket, bucket, stored))


def _from_bucket(bucket: Store, stored: Stored) -> Image.Image:
    check_size(stored.size)
    try:
        return open_image(bucket.download_bytes(stored.key, MAX_BYTES))
    except StorageUnreachableError:
        raise
    except StorageError as error:  # this object only: it is gone, or the store cannot read it
        raise UnreadableImageError(str(error)) from error


def _decode(source: _Source, size: int, how: Resize) -> np.ndarray | str:
    """The image as `fit` makes it, or the reason why it cannot be read."""
    try:
        image = source.read()
    except UnreadableImageError as error:
        return str(error)
    return np.asarray(fit(image, size, how))
