"""A million images that nobody has: the listing of a bucket, diffed against the last snapshot. `snapshot.py` runs this.

The store makes the keys up while they are listed, in ten class folders, as ListObjectsV2 would give them; whatever is
read of it is one small image. The last snapshot's rows are made up too: no image of it was ever read. Neither torch nor
a server is in this process, as in `nightshift data snapshot`, so its peak memory is that of the snapshot and of the
last one's rows, which the store holds.

    python benchmarks/made_up.py prepare FOLDER IMAGES      write the last snapshot into FOLDER
    python benchmarks/made_up.py diff FOLDER IMAGES NEW     diff against it a listing that has so many more
"""

import io
import json
import re
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
from PIL import Image

from nightshift.config.project import DatasetConfig
from nightshift.data import rows as table
from nightshift.data.decode import Shape
from nightshift.data.snapshot import _manifest, make_snapshot
from nightshift.records import snapshots
from nightshift.records.snapshots import Entry
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Stored

_NAME, _CLASSES, _SIZE = "made-up", 10, 32
_IMAGES = "images/"
_ETAG = '"d41d8cd98f00b204e9800998ecf8427e"'
_SHAPE = Shape(_SIZE, "crop")


class MadeUp(MemoryStore):
    """A store in memory, which besides has so many images that it makes up."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self._images = images
        picture = io.BytesIO()
        Image.new("RGB", (_SIZE, _SIZE), (90, 120, 150)).save(picture, "PNG")
        self._picture = picture.getvalue()

    def __reduce__(self) -> tuple[Any, ...]:
        return MadeUp, (self._images,)  # whoever decodes needs no snapshot

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def list(self, prefix: str) -> Iterator[Stored]:
        if prefix != _IMAGES:
            yield from super().list(prefix)
            return
        at = datetime.now(UTC)
        for number in range(self._images):
            yield Stored(_IMAGES + _name(number), len(self._picture) + len(_name(0)), _ETAG, at)

    def folders(self, prefix: str) -> Iterator[str]:
        return iter(["0"]) if prefix == _IMAGES else iter([])

    def get(self, key: str, max_bytes: int | None = None) -> tuple[bytes, str]:
        if key.startswith(_IMAGES):
            return self._picture + key.removeprefix(_IMAGES).encode(), _ETAG  # what follows a PNG is not looked at
        return super().get(key, max_bytes)


def _name(number: int) -> str:
    return f"{number % _CLASSES}/camera-{number % 7}/2026/{number:09}.png"


def prepare(folder: Path, images: int) -> None:
    """Write a snapshot of so many images as files: its rows, its manifest, and a history with it."""
    store = MadeUp(images)
    hint = f"{len(store._picture) + len(_name(0))} {_ETAG}"
    random = np.random.default_rng(1)
    names = sorted(map(_name, range(images)))
    sha256s = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(32), images, [None, pa.py_buffer(random.bytes(32 * images))]
    )
    columns = {
        **{field.name: [""] * images for field in table.ROWS if field.type == pa.string()},
        "id": names,
        "hint": [hint] * images,
        "label": [name[0] for name in names],
        "split": np.random.default_rng(2).choice(["train", "validation", "test"], images, p=[0.8, 0.1, 0.1]),
        "content": sha256s,
        "pixels": sha256s,
        "width": [_SIZE] * images,
        "height": [_SIZE] * images,
        "shard": [bytes(32)] * images,
        "offset": [0] * images,
    }
    rows = pa.table({field.name: pa.array(columns[field.name], field.type) for field in table.ROWS})
    manifest = _manifest(_NAME, rows, _SHAPE)
    store.put(snapshots.rows_key(_NAME, manifest.digest), table.as_parquet(rows, _SHAPE))
    snapshots.write_manifest(store, manifest)
    entry = Entry(
        digest=manifest.digest,
        at=store.now(),
        images=images,
        classes=_CLASSES,
        **dict.fromkeys(("added", "removed", "relabelled", "refused", "read"), 0),
    )
    snapshots.append(store, _NAME, entry)
    for stored in store.list("datasets/"):
        path = folder / stored.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(store.get(stored.key)[0])


def _peak() -> int:
    """The most memory this program had at once, in bytes. `ru_maxrss` may be that of the process which started it."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def diff(folder: Path, images: int, new: int) -> dict[str, Any]:
    """Make the snapshot of a night on which there are so many more."""
    store = MadeUp(images + new)
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(path.relative_to(folder).as_posix(), path.read_bytes())
    before, started, cpu = _peak(), time.perf_counter(), time.process_time()
    config = DatasetConfig(source=f"s3://{store.bucket}/{_IMAGES}", image_size=_SIZE)
    made = make_snapshot(store, _NAME, config)
    seconds = time.perf_counter() - started
    return {
        "images": made.images,
        "read": made.read,
        "added": made.added,
        "seconds": seconds,
        "peak_bytes": _peak(),
        "before_bytes": before,
        "cpu_seconds": time.process_time() - cpu,
    }


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare", folder, images]:
            prepare(Path(folder), int(images))
        case ["diff", folder, images, new]:
            print(json.dumps(diff(Path(folder), int(images), int(new))))
        case _:
            sys.exit(__doc__)
