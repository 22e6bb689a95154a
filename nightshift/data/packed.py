"""A snapshot on this machine: the pixels of its shards in one file, from which they are mapped into memory.

The file is a cache. It is safetensors: for each split uint8 images (N, size, size, 3) and their classes' numbers (N,),
uint8 or, for more than 256 classes, int32; and the sha256 of each test image's file, uint8 (N, 32). Images are in the
order of their ids. When the file is made, each image's pixels are checked against the sha256 that the snapshot's digest
rests on. When it is opened, its arrays are checked against their own.

For encoded images, the file has not the pixels but their places: the number of the shard, int32 (N,), the offset, int64
(N,), and the sha256 of what is stored there, uint8 (N, 32).
"""

import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute
from safetensors import safe_open

from nightshift import progress
from nightshift.config.project import Effect
from nightshift.data import rows as table
from nightshift.data.arrays import write_arrays
from nightshift.data.datasets import Dataset, Judged, Pair, channel_statistics, in_parts
from nightshift.data.encoded import Decoding, EncodedImages
from nightshift.data.near import LEAST_ALIKE, near_pairs
from nightshift.data.shards import Shards, fetch
from nightshift.data.specs import SPECS
from nightshift.data.stored import read_rows
from nightshift.disk import complete_file
from nightshift.errors import DataCorruptError, DatasetRejectedError
from nightshift.records import snapshots
from nightshift.records.snapshots import SPLITS
from nightshift.refs import DatasetRef, SnapshotRef
from nightshift.storage.store import Store
from nightshift.values import Resize
from nightshift.workspace import Workspace

_MOST_PAIRS = 10_000
_NO_MATCH = "the snapshot's rows and its manifest do not match: bring older versions back, or make a new snapshot"
_SAMPLE, _SAMPLED_AT_ONCE = 10_000, 100
"""How many encoded images are looked at for their mean and deviation."""
_whole: dict[tuple[int, ...], dict[str, Any]] = {}
"""The facts of files that were checked, by the file status, which changes if a file is touched."""


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
    if manifest.storage == "encoded" and near_duplicates == "stop":
        progress.current().warn(f"{ref.name}: near duplicates are looked for among images stored as pixels only")
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


def open_packed(workspace: Workspace, ref: DatasetRef, threads: int | None = None) -> Dataset:
    """Map a snapshot into memory, after a look whether this machine's copy is whole.

    Args:
        threads: as of `open_dataset`.

    Raises:
        DataCorruptError, StorageError: it is not here, and cannot be had.
    """
    path, facts = _in_cache(workspace, ref)
    with safe_open(path, framework="pt") as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    images: dict[str, Any] = {}
    if "train_shard" in arrays:
        decoding = Decoding(Shards(workspace), facts["shards"], ref.image_size, threads)
        images = {f"{split}_images": _encoded(decoding, arrays, split) for split in SPLITS}
        arrays = {name: array for name, array in arrays.items() if name.endswith(("_labels", "_content"))}
    return Dataset(
        ref.name,
        ref.digest,
        tuple(facts["classes"]),
        **arrays,
        **images,
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
            path.unlink(missing_ok=True)
    manifest, rows = read_rows(workspace.store, ref.name, ref.digest)
    classes = sorted(manifest.classes)
    if manifest.storage == "encoded":
        arrays, near, shards = _located(rows, classes, manifest.shards), [], manifest.shards
        images = _encoded(Decoding(Shards(workspace), shards, manifest.image_size), arrays, "train")
        sample = (part.numpy() for _, part in islice(in_parts(images, _SAMPLED_AT_ONCE), _SAMPLE // _SAMPLED_AT_ONCE))
    else:
        arrays, shards = _assembled(workspace.store, rows, classes, manifest.image_size), []
        near, sample = [] if ref.name in SPECS else _near(arrays), None
    with complete_file(path) as file:
        facts = write_packed(file.name, ref.name, classes, arrays, manifest.resize, near, sample, shards)
        _check_known(ref.name, facts)
    return path, facts


def write_packed(
    path: str,
    name: str,
    classes: Sequence[str],
    arrays: dict[str, np.ndarray],
    resize: Resize,
    near: Sequence[tuple[str, int, int, float]] = (),
    sample: Iterable[np.ndarray] | None = None,
    shards: Sequence[str] = (),
) -> dict[str, Any]:
    """Write the arrays of all splits to a file, and return what it says of them.

    Args:
        sample: uint8 (N, size, size, 3) in parts, whose mean and deviation count; by default the images to train on.
        shards: in which the images lie, if they are encoded.
    """
    mean, std = channel_statistics([arrays["train_images"]] if sample is None else sample)
    facts = {
        "name": name,
        "classes": classes,
        "mean": mean,
        "std": std,
        "resize": resize,
        "sha256": {name: hashlib.sha256(array.data).hexdigest() for name, array in arrays.items()},
        "near": near,
        "shards": shards,
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
    """What a file says of its arrays, which are as it says. A process looks at them again only if it was touched."""
    try:
        status = path.stat()
    except OSError as error:  # another process has found it damaged meanwhile
        raise DataCorruptError(f"it cannot be read: {error}") from error
    seen = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    if seen not in _whole:
        _whole[seen] = _checked_facts(path)
    return _whole[seen]


def _checked_facts(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:  # which maps what numpy's would copy
            facts: dict[str, Any] = json.loads(file.metadata()["nightshift"])
            if "test_content" not in facts["sha256"]:
                raise DataCorruptError("it does not say which its test images are")
            for name, expected in facts["sha256"].items():
                if hashlib.sha256(file.get_tensor(name).numpy().data).hexdigest() != expected:
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
        labels = np.empty(len(part), _label_type(classes))
        for at, (label, shard, offset, pixels) in enumerate(table.iterate(part, "label", "shard", "offset", "pixels")):
            labels[at] = numbers[label]
            places[shard].append((offset, pixels, images[at]))
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    arrays["test_content"] = _sums(table.of_split(rows, "test")["content"])
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


def _located(rows: pa.Table, classes: list[str], shards: Sequence[str]) -> dict[str, np.ndarray]:
    """Where the images of all splits lie in which shard, and their classes.

    Raises:
        DataCorruptError: a row does not say where, or names a class or a shard that the manifest does not.
    """
    arrays: dict[str, np.ndarray] = {}
    of_shards = pa.array([bytes.fromhex(shard) for shard in shards], pa.binary(32))
    for split in SPLITS:
        part = table.of_split(rows, split)
        if part["offset"].null_count or part["pixels"].null_count:
            raise DataCorruptError(_NO_MATCH)
        arrays |= {
            f"{split}_labels": _numbers(part["label"], pa.array(classes)).astype(_label_type(classes)),
            f"{split}_shard": _numbers(part["shard"], of_shards),
            f"{split}_offset": part["offset"].to_numpy(),
            f"{split}_sha256": _sums(part["pixels"]),
        }
    return arrays | {"test_content": _sums(table.of_split(rows, "test")["content"])}


def _numbers(values: pa.ChunkedArray, known: pa.Array) -> np.ndarray:
    """The place of each value in `known`, int32 (N,)."""
    places = compute.index_in(values, value_set=known)
    if places.null_count:
        raise DataCorruptError(_NO_MATCH)
    numbers: np.ndarray = places.to_numpy()
    return numbers.astype(np.int32)


def _sums(column: pa.ChunkedArray) -> np.ndarray:
    """sha256 sums, uint8 (N, 32)."""
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, 32)


def _label_type(classes: Sequence[str]) -> type[np.generic]:
    return np.uint8 if len(classes) <= 256 else np.int32


def _encoded(decoding: Decoding, arrays: Mapping[str, Any], split: str) -> EncodedImages:
    return EncodedImages(decoding, *(np.asarray(arrays[f"{split}_{name}"]) for name in ("shard", "offset", "sha256")))


def _shard(store: Store, digest: str) -> bytes:
    body = io.BytesIO()
    fetch(store, digest, body)
    return body.getvalue()
