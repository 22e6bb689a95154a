"""Images of the training split that are nearly the same as ones to validate or test on.

Candidates have perceptual hashes (imagehash's difference hash, 64 bits) that differ in few bits, and pixels that go
together somewhat. Those whose pixels go together well, with a correlation of at least `LEAST_ALIKE`, are nearly the
same. Of the others, a trained network tells more (`judging.near`).
"""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from nightshift.data.datasets import Judged, Pair

LEAST_ALIKE = 0.9
_POSSIBLY = 0.5
_MOST_BITS = 10
_MOST_OTHERS = 100
"""With how many others an image is compared at most: a plain one has the hash of all plain ones."""


def near_pairs(split: Judged, images: np.ndarray, train: np.ndarray) -> list[Pair]:
    """The candidates among uint8 images (N, size, size, 3) and (M, size, size, 3), most alike first.

    Exact copies are among them.
    """
    if not len(images) or not len(train):
        return []
    ours, theirs = hashes(images), hashes(train)
    pairs = [
        Pair(split, image, other, _correlation(images[image], train[other]))
        for image, other in _candidates(ours, theirs)
    ]
    return sorted(
        (pair for pair in pairs if pair.alike >= _POSSIBLY), key=lambda pair: (-pair.alike, pair.image, pair.train)
    )


def hashes(images: np.ndarray) -> np.ndarray:
    """The difference hash of each image: uint64 (N,)."""
    import imagehash  # here, because whoever only judges needs it not, nor scipy, which it imports

    bits = [imagehash.dhash(Image.fromarray(image)).hash.ravel() for image in images]
    return np.packbits(np.stack(bits), axis=1).view(np.uint64).ravel()


def _candidates(ours: np.ndarray, theirs: np.ndarray) -> Iterator[tuple[int, int]]:
    for image, bits in enumerate(ours):
        for other in np.flatnonzero(np.bitwise_count(theirs ^ bits) <= _MOST_BITS)[:_MOST_OTHERS]:
            yield image, int(other)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    a, b = (pixels.astype(np.float64).ravel() - pixels.mean() for pixels in (one, other))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else 0.0
