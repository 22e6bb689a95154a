"""Predictions of a published model for images in files, folders or an s3:// prefix, in bounded memory."""

import csv
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from nightshift.data import batches
from nightshift.errors import ConfigError, NoImagesError, StorageError
from nightshift.hardware import find_device
from nightshift.judging import evaluation
from nightshift.records import champions
from nightshift.records.versions import read_card, read_file
from nightshift.refs import PredictionsRef
from nightshift.storage.store import Store
from nightshift.text import as_json, csv_cell

_BATCH = 256
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""What counts as an image in a folder or under a prefix. A file that is named itself may have any suffix."""
OutputFormat = Literal["csv", "jsonl"]


@dataclass(frozen=True)
class Prediction:
    """One image: its class and that class's probability, or why it could not be read."""

    image: str
    label: str | None
    probability: float | None
    error: str | None = None


@dataclass(frozen=True)
class _Source:
    name: str
    read: Callable[[], bytes]


class Classifier:
    """A published version, loaded from its verified weights."""

    def __init__(self, store: Store, name: str, version: str) -> None:
        """`version`: a version's name, or `champion`.

        Raises:
            ModelNotFoundError: no such version is published, or there is no champion.
            StorageError: its weights cannot be read, or are not what was published.
        """
        if version == "champion":
            version = champions.read_champion(store, name).version
        card = read_card(store, name, version)
        config = card.train_config()
        weights = load_safetensors(read_file(store, card, "weights.safetensors"))
        self.version, self.classes, self._tta = version, card.classes, config.evaluation.tta
        device = find_device()
        self._model: nn.Module = evaluation.load_model(config, weights, len(self.classes), device)
        self._scale, self._shift = batches.scale_and_shift(card.mean, card.std)

    def probabilities(self, images: Tensor) -> Tensor:
        """uint8 images (batch, 32, 32, 3) → probabilities (batch, classes), float32 on the CPU."""
        inputs = batches.to_input(images, self._scale, self._shift)
        return evaluation.predict(self._model, inputs, self._tta).softmax(1)

    def predict(self, store: Store, places: Iterable[str]) -> Iterator[Prediction]:
        """Predict each image at these places, in their order. A bad one is reported and does not stop the others.

        Args:
            store: its connection reads the places that begin with s3://.
            places: files, folders (searched recursively), s3://BUCKET/PREFIX.

        Raises:
            StorageError: the store fails.
        """
        sources = _sources(store, places)
        while batch := list(islice(sources, _BATCH)):
            decoded = [_decode(source) for source in batch]
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
        named = "".join(f"\n  {prediction.image}: {prediction.error}" for prediction in bad[:20])
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
        with open(out, "w", encoding="utf-8") as file:
            return write(predictions, file, kind)
    bucket, key = store.at(out)
    with tempfile.TemporaryFile() as body:
        text = io.TextIOWrapper(body, encoding="utf-8", write_through=True)
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
    unread = [f"{prediction.image}: {prediction.error}" for prediction in bad]
    return PredictionsRef(out=out, version=classifier.version, predicted=good, bad=unread)


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
    def none() -> bytes:
        raise NoImagesError(f"there is no image here ({', '.join(sorted(SUFFIXES))})")

    for place in places:
        found = _in_bucket(store, place) if place.startswith("s3://") else _on_disk(Path(place))
        first = next(found, _Source(place, none))
        yield first
        yield from found


def _on_disk(place: Path) -> Iterator[_Source]:
    is_folder = place.is_dir()
    for path in sorted(place.rglob("*")) if is_folder else [place]:
        if not is_folder or (path.suffix.lower() in SUFFIXES and path.is_file()):
            yield _Source(str(path), path.read_bytes)


def _in_bucket(store: Store, url: str) -> Iterator[_Source]:
    bucket, prefix = store.at(url)
    for stored in bucket.list(prefix):
        if stored.key == prefix or Path(stored.key).suffix.lower() in SUFFIXES:
            yield _Source(bucket.url(stored.key), lambda key=stored.key: bucket.download_bytes(key))  # type: ignore[misc]


def _decode(source: _Source, size: int = 32) -> np.ndarray | str:
    """The image as uint8 (size, size, 3), upright, RGB; or the reason why it cannot be read."""
    try:
        with Image.open(io.BytesIO(source.read())) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # PIL would clip 16-bit grey at 255
                upright = Image.fromarray((np.asarray(upright) // 257).astype(np.uint8))
            rgb = upright.convert("RGB")
            return np.asarray(rgb if rgb.size == (size, size) else rgb.resize((size, size), Image.Resampling.BICUBIC))
    except UnidentifiedImageError:
        return "not an image, or damaged"  # PIL's own message names an object in memory
    except StorageError:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        return str(error) or type(error).__name__
