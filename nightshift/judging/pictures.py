"""The report's images: each of them small, with what is said of it as text of the page.

The page places them, so a row has as many as the screen has room for. There are ninety at most. Even of noise, which
compresses worst, they take half of the 3 MB that a report may have.
"""

import base64
import io
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from nightshift.data.datasets import Dataset, open_dataset
from nightshift.judging.drift import Drift
from nightshift.judging.evaluation import Metrics
from nightshift.records.snapshots import Split
from nightshift.refs import DatasetRef
from nightshift.text import short
from nightshift.workspace import Workspace

_NEAR = 20
"""How many pairs of nearly the same images are shown."""
_SIDE = 128
"""Larger images are shown as small as this."""
_PIXELS = 64
"""Images up to this side are stored without loss, and enlarged without smoothing."""


@dataclass(frozen=True)
class Picture:
    """An image, or two side by side, and the lines below."""

    sources: list[str]
    """`data:` URLs of WebP files."""
    lines: tuple[str, ...]
    is_pixels: bool
    """Whether each pixel is to be seen."""


@dataclass(frozen=True)
class _Wanted:
    places: list[tuple[Split, int]]
    """Of each image: its split, and its number there."""
    lines: tuple[str, ...]


def pictures(
    workspace: Workspace, ref: DatasetRef, found: Metrics | None, drift: Drift | None
) -> dict[str, list[Picture]]:
    """All images that a report shows, by the name of their part; those that the data set has not are left out.

    Raises:
        StorageError, DataUnavailableError: the data set cannot be had. Where there is nothing to show, nobody asks.
    """
    wanted = _wanted(found, drift)
    if not any(wanted.values()):
        return {}
    dataset = open_dataset(workspace, ref)
    shown = {
        name: [
            Picture([_source(image) for image in images], each.lines, dataset.image_size <= _PIXELS)
            for each in those
            if len(images := _there(dataset, each.places)) == len(each.places)
        ]
        for name, those in wanted.items()
    }
    return {name: those for name, those in shown.items() if those}


def _wanted(found: Metrics | None, drift: Drift | None) -> dict[str, list[_Wanted]]:
    unusual = drift.came_in.unusual if drift and drift.came_in else []
    suspects = drift.label_errors.suspects if drift and drift.label_errors else []
    return {
        "unusual": [
            _Wanted([(image.split, image.number)], _taken_for(image.label, image.predicted, image.confidence))
            for image in unusual
        ],
        "suspects": [
            _Wanted([(image.split, image.number)], _taken_for(image.label, image.suggested, image.probability))
            for image in suspects
        ],
        "mistakes": [
            _Wanted([("test", image.image)], _taken_for(image.label, image.predicted, image.probability))
            for image in (found.mistakes if found else [])
        ],
        "near": [  # the image to judge by on the left of the other
            _Wanted(
                [(pair.split, pair.image), ("train", pair.train)],
                (
                    f"{pair.split} {pair.image}, train {pair.train}",
                    f"pixels {pair.pixels:.2f}",
                    f"network {pair.network:.2f}",
                ),
            )
            for pair in (found.near[:_NEAR] if found else [])
        ],
    }


def _taken_for(label: str, other: str, probability: float) -> tuple[str, ...]:
    return short(label), f"→ {short(other)}", f"{probability:.1%}"


def _there(dataset: Dataset, places: list[tuple[Split, int]]) -> list[Tensor]:
    """Those of the images that there are, uint8 (side, side, 3) each."""
    return [images[number] for split, number in places if 0 <= number < len(images := dataset.images_of(split))]


def _source(pixels: Tensor) -> str:
    image, buffer = Image.fromarray(pixels.numpy()), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE))
    image.save(buffer, "webp", lossless=len(pixels) <= _PIXELS)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
