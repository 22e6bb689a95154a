"""Small images as files: each number is another picture, and its class can be seen in it."""

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from nightshift.config.project import DatasetConfig

SIZE = 24
QUIET = {"few_images": "off"}
"""The rules, for data sets as small as those of tests."""


def picture(number: int, kind: str = "png", size: int = SIZE) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG" if kind == "jpg" else "PNG")
    return buffer.getvalue()


def write(root: Path, pictures: Mapping[str, bytes]) -> None:
    for name, body in pictures.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


def album(numbers: Iterable[int], classes: tuple[str, ...] = ("ant", "bee")) -> dict[str, bytes]:
    """Pictures by name, in one folder a class; a number's name, class and content are always the same."""
    return {f"{classes[number % len(classes)]}/{number:05}.png": picture(number) for number in numbers}


def config(source: object, **fields: object) -> DatasetConfig:
    return DatasetConfig.model_validate({"source": str(source), "image_size": SIZE, "rules": QUIET, **fields})
