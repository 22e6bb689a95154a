"""The data sets that are known by content: their classes, and what the sha256 of their arrays must be."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nightshift.errors import ConfigError, DataCorruptError

if TYPE_CHECKING:
    import numpy as np

Arrays = dict[str, "np.ndarray"]


@dataclass(frozen=True)
class Spec:
    """What a data set must be, whatever source it comes from."""

    name: str
    classes: tuple[str, ...]
    """Sorted, as those of a snapshot are."""
    sha256: dict[str, str]
    """The sha256 of the bytes of each array: `train_images`, `train_labels`, `test_images`, `test_labels`."""
    image_size: int = 32
    """The side of its images, in pixels."""

    @property
    def digest(self) -> str:
        """The arrays' name by content: sha256 of the four sums, known before anything is downloaded."""
        return hashlib.sha256(json.dumps(self.sha256, sort_keys=True).encode()).hexdigest()

    @property
    def key(self) -> str:
        """Where a nightshift of before there were snapshots has stored the arrays, as one object."""
        return f"datasets/{self.digest}/packed.safetensors"

    def check(self, arrays: Arrays) -> None:
        """Compare arrays with the known sums.

        Raises:
            DataCorruptError: naming the arrays that differ.
        """
        self.check_sums({name: _sha256(arrays[name]) for name in self.sha256})

    def check_sums(self, sums: Mapping[str, str]) -> None:
        """As `check`, of arrays whose sums are known."""
        if wrong := [name for name, expected in self.sha256.items() if sums.get(name) != expected]:
            raise DataCorruptError(f"{', '.join(wrong)} of {self.name} do not have the known sha256")


SPECS = {
    "cifar10": Spec(
        name="cifar10",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        sha256={
            "train_images": "47af8b02cfcfb6cdf3dbbd1969ad7f1b70f4413f6f80f437b020ee4e5bc8304a",
            "train_labels": "2b7cd2f24487317614016b72ffd53071c3062f592f0eb300c18a770d41ae1253",
            "test_images": "f9b1e2130bab680db56eb06d886f7f1ad0f1183907ceff4659d1735c890f5b04",
            "test_labels": "cec8a24a1e92aa2ecaa0bbd3dbfa86bf6cd8759fbd209a832824c8cf0afca9d5",
        },
    )
}


def get_spec(name: str) -> Spec:
    """The data set of this name. Raises ConfigError, which lists the known data sets, if there is none."""
    if name not in SPECS:
        raise ConfigError(f"there is no data set {name!r}. The data sets are: {', '.join(sorted(SPECS))}")
    return SPECS[name]


def is_same_data(name: str, digest: str, other: str) -> bool:
    """Whether two digests of a data set of this name are of the same images.

    One may be that of the arrays, by which an older nightshift calls what is known by content.
    """
    return digest == other or (name in SPECS and SPECS[name].digest in (digest, other))


def _sha256(array: "np.ndarray") -> str:
    import numpy as np  # here, because a name is looked up in SPECS before anything heavy is imported

    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
