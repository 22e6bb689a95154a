"""Images as files in class folders: CIFAR-10's as they are, or enlarged until they cost as much as photographs."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

_NOISE = 9
"""Its standard deviation, of 255. A file of 500 by 375 pixels then has 67 kB, about as a photograph has."""


def write_files(images: np.ndarray, paths: Sequence[Path], size: tuple[int, int] | None, quality: int = 90) -> None:
    """Write uint8 images (N, side, side, 3) to files, in all cores.

    Args:
        size: to which they are enlarged, width and height, with the noise of a sensor; None: they stay as they are.
    """
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor() as pool:
        for _ in pool.map(partial(_write, size, quality), images, paths, chunksize=500):
            pass


def _write(size: tuple[int, int] | None, quality: int, pixels: np.ndarray, path: Path) -> None:
    image = Image.fromarray(pixels)
    if size:
        large = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.int16)
        image = Image.fromarray((large + _noise(size)).clip(0, 255).astype(np.uint8))
    image.save(path, quality=quality)


@cache
def _noise(size: tuple[int, int]) -> np.ndarray:
    """Of a sensor, the same in every image. Without it enlarged images are smooth, and decoded in half the time."""
    width, height = size
    return np.random.default_rng(0).normal(0, _NOISE, (height, width, 3)).astype(np.int16)
