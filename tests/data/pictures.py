"""Small images as files: each number is another picture, and its class can be seen in it."""

import io
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nightshift.config.project import DatasetConfig
from nightshift.data.sources.listed import Listed
from nightshift.errors import StorageUnreachableError

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


@dataclass(frozen=True)
class Made:
    """A source whose images are pictures by number, or do to their reader what they are called."""

    readers: int = 1

    def list(self) -> Iterator[Listed]:
        yield from ()

    def read(self, listed: Listed) -> bytes:
        if listed.id == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if listed.id == "hang":
            time.sleep(1000)
        if listed.id == "no store":
            raise StorageUnreachableError("the store does not answer")
        return picture(int(listed.id))
