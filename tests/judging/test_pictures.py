"""The images on a report's page: small, alike in size, and few enough bytes."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nightshift.judging.drift import CameIn, Drift, Unusual
from nightshift.judging.pictures import pictures
from nightshift.storage.memory import MemoryStore
from nightshift.workspace import Workspace
from tests.judging.full import full_report
from tests.made_up import arrays_of, known

MB = 10**6


def shown(home: Path, size: int, number: int = 0) -> list[tuple[Image.Image, bool]]:
    """What is shown of an unusual image of a data set: the images, and whether their pixels are to be seen."""
    workspace = Workspace(MemoryStore(), home, 60, 5)
    image = Unusual(split="train", number=number, id="a", label="cat", predicted="dog", confidence=0.5, distance=1.0)
    drift = Drift(run_id="run", weights_sha256="0" * 64, came_in=CameIn(images=1, unusual=[image]))
    found = pictures(workspace, known(workspace, size, 2, train=4, test=4), None, drift)
    assert set(found) <= {"unusual"}
    return [
        (Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,")))), each.is_pixels)
        for each in found.get("unusual", [])
        for source in each.sources
    ]


@pytest.mark.parametrize("size", [16, 32, 64])
def test_a_small_image_is_shown_pixel_by_pixel(size: int, home: Path) -> None:
    ((image, is_pixels),) = shown(home, size)
    assert is_pixels
    assert np.array_equal(np.asarray(image.convert("RGB")), arrays_of(size, 2, train=4, test=4)["train_images"][0])


@pytest.mark.parametrize("size", [65, 128, 512])
def test_a_large_image_is_shown_smaller_and_smoothed(size: int, home: Path) -> None:
    ((image, is_pixels),) = shown(home, size)
    assert (image.size, is_pixels) == ((min(size, 128),) * 2, False)


def test_an_image_that_the_data_set_has_not_is_left_out(home: Path) -> None:
    assert shown(home, 16, number=4) == []


@pytest.mark.parametrize("classes", [10, 32, 1000])
def test_the_report_of_1000_classes_and_of_photographs_is_smaller_than_3_mb(classes: int, home: Path) -> None:
    report = full_report(Workspace(MemoryStore(), home, 60, 5), classes)
    counts = {name: len(those) for name, those in report.pictures.items()}
    assert counts == {"unusual": 20, "suspects": 20, "mistakes": 10, "near": 20}
    assert report.html.count("data:image/webp;base64,") == 90
    assert len(set(re.findall(r"data:image/webp;base64,[^\"]+", report.html))) > 45, "they are different photographs"
    assert set(report.plots) >= {
        "loss",
        "accuracy",
        "learning-rate",
        "goodput",
        "throughput",
        "stalls",
        "nights",
        "goodputs",
    }
    assert len(report.html.encode()) < 3 * MB
