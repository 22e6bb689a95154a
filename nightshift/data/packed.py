"""A snapshot on this machine: the pixels of its shards in one file, from which they are mapped into memory.

The file is a cache. It is safetensors: for each split uint8 images (N, size, size, 3) and their classes' numbers (N,),
uint8 or, for more than 256 classes, int32; and the sha256 of each test image's file, uint8 (N, 32). Images are in the
order of their ids. When the file is made, each image's pixels are compared with the sha256 that the snapshot's digest
rests on; when it is opened, the file with its own.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import safe_open

from nightshift import progress
from nightshift.config.project import Effect
from nightshift.data import rows as table
from nightshift.data.arrays import write_arrays
from nightshift.data.datasets import Dataset, Judged, Pair, channel_statistics
from nightshift.data.near import LEAST_ALIKE, near_pairs
from nightshift.data.snapshot import read_rows
from nightshift.data.specs import SPECS
from nightshift.disk import complete_file
from nightshift.errors import DataCorruptError, DatasetRejectedError, ObjectNotFoundError, ObjectTooLargeError
from nightshift.records import snapshots
from nightshift.records.snapshots import SPLITS
from nightshift.refs import DatasetRef, SnapshotRef
from nightshift.storage.store import Store
from nightshift.values import Resize
from nightshift.workspace import Workspace

_MAX_SHARD = 1024**3
_MOST_PAIRS = 10_000


def pack_snapshot(workspace: Workspace, snapshot: SnapshotRef, near_duplicates: Effect = "off") -> DatasetRef:
    """Make sure that this machine has a snapshot's pixels, and return what names them.

    Args:
        near_duplicates: the effect of the rule, which needs the pixels of all splits.

    Raises:
        DatasetRejectedError: images to train on are nearly the same as ones to judge by, and the rule stops the night.
        DataCorruptError, StorageError: the pixels cannot be had.
    """
    manifest = snapshots.read_manifest(workspace.store, snapshot.name, snapshot.digest)
    ref = DatasetRef(
        name=snapshot.name,
        digest=snapshot.digest,
        key=snapshots.rows_key(snapshot.name, snapshot.digest),
        source=f"snapshot {snapshot.digest[:12]}",
        classes=len(manifest.classes),
        image_size=manifest.image_size,
    )
    _, facts = _in_cache(workspace, ref)
    judged = {(split, image) for split, image, _, alike in facts["near"] if alike >= LEAST_ALIKE}
    if judged and near_duplicates != "off":
        detail = f"{len(judged):,} images to validate or test on are nearly the same as ones to train on"
        if near_duplicates == "stop":
            raise DatasetRejectedError(
                f"tonight's images of {ref.name} are not trained on: {detail}. Give each such pair one group "
                f'(split.by); or set near_duplicates = "warn" in [datasets.{ref.name}.rules]'
            )
        progress.current().warn(f"{ref.name}: {detail}")
    return ref


def open_packed(workspace: Workspace, ref: DatasetRef) -> Dataset:
    """Map a snapshot into memory, after a look whether this machine's copy is whole.

    Raises:
        DataCorruptError, StorageError: it is not here, and cannot be had.
    """
    path, facts = _in_cache(workspace, ref)
    with safe_open(path, framework="pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Dataset(
        ref.name,
        ref.digest,
        tuple(facts["classes"]),
        **arrays,
        mean=tuple(facts["mean"]),
        std=tuple(facts["std"]),
        resize=facts["resize"],
        near=tuple(Pair(*pair) for pair in facts["near"]),
    )


def _in_cache(workspace: Workspace, ref: DatasetRef) -> tuple[Path, dict[str, Any]]:
    path = workspace.home / "datasets" / f"{ref.digest}.safetensors"
    if path.exists():
        try:
            facts = _facts(path)
            _check_known(ref.name, facts)
            return path, facts
        except DataCorruptError as error:
            progress.current().warn(f"{path} is damaged or of an older nightshift ({error}): packing it again")
            path.unlink()
    manifest, rows = read_rows(workspace.store, ref.name, ref.digest)
    classes = sorted(manifest.classes)
    arrays = _assembled(workspace.store, rows, classes, manifest.image_size)
    near = [] if ref.name in SPECS else _near(arrays)
    with complete_file(path) as file:
        facts = write_packed(file.name, ref.name, classes, arrays, manifest.resize, near)
        _check_known(ref.name, facts)
    return path, facts


def write_packed(
    path: str,
    name: str,
    classes: Sequence[str],
    arrays: dict[str, np.ndarray],
    resize: Resize,
    near: Sequence[tuple[str, int, int, float]] = (),
) -> dict[str, Any]:
    """Write the arrays of all splits to a file, and return what it says of them."""
    mean, std = channel_statistics(arrays["train_images"])
    facts = {
        "name": name,
        "classes": classes,
        "mean": mean,
        "std": std,
        "resize": resize,
        "sha256": {name: hashlib.sha256(array.data).hexdigest() for name, array in arrays.items()},
        "near": near,
    }
    # One metadata entry, because safetensors writes several in an order that varies.
    write_arrays(path, arrays, {"nightshift": json.dumps(facts)})
    return facts


def _check_known(name: str, facts: dict[str, Any]) -> None:
    """Raise DataCorruptError if a data set that is known by content is another, whoever has stored it."""
    if spec := SPECS.get(name):
        if tuple(facts["classes"]) != spec.classes:
            raise DataCorruptError(f"the classes of {name} are not the known ones")
        spec.check_sums(facts["sha256"])


def _near(arrays: dict[str, np.ndarray]) -> list[tuple[str, int, int, float]]:
    with progress.current().transfer("looking for near duplicates", None):
        judged: tuple[Judged, ...] = ("test", "validation")
        pairs = [
            pair for split in judged for pair in near_pairs(split, arrays[f"{split}_images"], arrays["train_images"])
        ]
    return [astuple(pair) for pair in pairs[:_MOST_PAIRS]]


def _facts(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="np") as file:
            facts: dict[str, Any] = json.loads(file.metadata()["nightshift"])
            if "test_content" not in facts["sha256"]:
                raise DataCorruptError("it does not say which its test images are")
            for name, expected in facts["sha256"].items():
                if hashlib.sha256(np.ascontiguousarray(file.get_tensor(name)).data).hexdigest() != expected:
                    raise DataCorruptError(f"{name} does not have its sha256")
    except DataCorruptError:
        raise
    except Exception as error:  # readers raise anything on bytes that nobody has written
        raise DataCorruptError(f"it cannot be read: {str(error) or type(error).__name__}") from error
    return facts


def _assembled(store: Store, rows: pa.Table, classes: list[str], size: int) -> dict[str, np.ndarray]:
    """The arrays of all splits, from the shards. A class' number is its place in `classes`."""
    numbers = {name: number for number, name in enumerate(classes)}
    arrays: dict[str, np.ndarray] = {}
    places: dict[bytes, list[tuple[int, bytes, np.ndarray]]] = defaultdict(list)
    for split in SPLITS:
        part = table.of_split(rows, split)
        images = np.empty((len(part), size, size, 3), np.uint8)
        labels = np.empty(len(part), np.uint8 if len(classes) <= 256 else np.int32)
        for at, (label, shard, offset, pixels) in enumerate(table.iterate(part, "label", "shard", "offset", "pixels")):
            labels[at] = numbers[label]
            places[shard].append((offset, pixels, images[at]))
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    content = b"".join(sha256 for (sha256,) in table.iterate(table.of_split(rows, "test"), "content"))
    arrays["test_content"] = np.frombuffer(content, np.uint8).reshape(-1, 32)
    count = sum(len(arrays[f"{split}_labels"]) for split in SPLITS)
    with progress.current().transfer(f"packing {count:,} images", None) as advance:
        for shard, wanted in places.items():
            body = _shard(store, shard.hex())
            for offset, pixels, into in wanted:
                image = body[offset : offset + into.nbytes]
                if hashlib.sha256(image).digest() != pixels:
                    raise DataCorruptError(
                        f"{store.url(snapshots.shard_key(shard.hex()))} does not hold what it should"
                    )
                into[:] = np.frombuffer(image, np.uint8).reshape(into.shape)
            advance(len(body))
    return arrays


def _shard(store: Store, digest: str) -> bytes:
    """A shard's bytes. One that arrives damaged is fetched a second time."""
    key = snapshots.shard_key(digest)
    for _ in range(2):
        try:
            body = store.download_bytes(key, max_bytes=_MAX_SHARD)
        except (ObjectNotFoundError, ObjectTooLargeError) as error:
            raise DataCorruptError(f"{error}: bring an older version of it back, or make a new snapshot") from error
        if hashlib.sha256(body).hexdigest() == digest:
            return body
        progress.current().warn(f"{store.url(key)} arrived damaged")
    raise DataCorruptError(f"{store.url(key)} is damaged: bring an older version of it back")
