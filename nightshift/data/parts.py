"""The new images of a night, read in parts: each is committed by itself, so an interrupted snapshot goes on after it.

A part is a function of the listing and of the last snapshot, and its shard is named by its content. So two machines
that do the same work end with the same objects.
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice, starmap

import pyarrow as pa
from pyarrow import compute

from nightshift import progress
from nightshift.data import rows as table
from nightshift.data.decode import Decoded, Decoders, Shape
from nightshift.data.rows import READ
from nightshift.data.sources.listed import ROW, Listed, Source
from nightshift.errors import DataCorruptError, ObjectNotFoundError
from nightshift.records import snapshots
from nightshift.records.keys import DATASETS, place_of
from nightshift.storage.store import Store

Reader = Callable[[Store, str, Source, Shape, pa.Table], Iterator[pa.Table]]
"""What reads the new images of a listing and stores each part, as `read_parts` does. Yields the rows in any order."""
_IMAGES = 2_000
_BYTES = 64 * 1024**2


def pending(store: Store, name: str, shape: Shape) -> dict[str, pa.Table]:
    """The rows of parts that a snapshot which was interrupted has left, by key."""
    parts = {}
    for stored in store.list(f"{DATASETS}{name}/parts/"):
        if place_of(stored.key):
            with suppress(DataCorruptError, ObjectNotFoundError):  # of another shape, damaged, or done meanwhile
                body = store.download_bytes(stored.key, max_bytes=table.MAX_BYTES)
                parts[stored.key] = table.from_parquet(body, READ, shape, store.url(stored.key))
    return parts


def unknown(listing: pa.Table, known: Sequence[pa.Table]) -> pa.Table:
    """The part of a listing that nothing is known of, and that is not refused already."""
    is_new = compute.is_null(table.places_of(listing, known))
    return listing.filter(compute.and_(is_new, compute.equal(listing["refused"], "")))


def mixed(new: pa.Table, shape: Shape) -> pa.Table:
    """The images to read, in the order of reading. For encoded images, that order is unrelated to their classes.

    Training reads these a few shards at a time, so each shard should have some of every class. Images that lie in the
    rows of a table are an exception: they are read in the order of the rows.
    """
    if shape.storage == "pixels" or compute.any(compute.starts_with(new["place"], ROW)).as_py():
        return new
    keys = [hashlib.sha256(name.encode()).digest() for name in new["id"].to_pylist()]
    return new.take(compute.sort_indices(pa.array(keys, pa.binary(32))))


def in_parts(new: pa.Table, shape: Shape) -> Iterator[pa.Table]:
    size = max(1, min(_IMAGES, _BYTES // shape.bytes))
    for start in range(0, len(new), size):
        yield new.slice(start, size)


def part_key(name: str, part: pa.Table, shape: Shape) -> str:
    sha256 = hashlib.sha256(table.pixels_of(shape).encode())
    for row in table.iterate(part, "id", "hint"):
        for value in row:
            sha256.update(f"{len(value)} {value}".encode())
    return snapshots.part_key(name, sha256.hexdigest())


def read_parts(store: Store | None, name: str, source: Source, shape: Shape, new: pa.Table) -> Iterator[pa.Table]:
    """Read images, and store each part as soon as it is complete; without a store, none is. Yields its rows."""
    if not len(new):
        return
    total = compute.sum(new["size"]).as_py()
    with (
        progress.current().transfer(f"reading {len(new):,} images", total) as advance,
        Decoders(source, shape) as decoders,
        ThreadPoolExecutor(1) as uploader,
    ):
        decoded, stored = decoders.read(listed_of(new)), None
        for part in in_parts(new, shape):
            rows, shard = _packed(part, islice(decoded, len(part)), advance)
            if stored:
                stored.result()
            if store:
                stored = uploader.submit(_store_part, store, part_key(name, part, shape), rows, shard, shape)
            yield rows
        if stored:
            stored.result()


def listed_of(listing: pa.Table) -> Iterator[Listed]:
    return starmap(Listed, table.iterate(listing, "id", "place", "hint", "label", "size"))


def _packed(part: pa.Table, decoded: Iterable[Decoded], advance: Callable[[int], object]) -> tuple[pa.Table, bytes]:
    """The rows of a part, and the pixels of its images one after the other. What stands in it twice is stored once."""
    shard, places, offsets, images = bytearray(), dict[bytes | None, int](), [], []
    for image, size in zip(decoded, part["size"].to_pylist(), strict=True):
        at = 0 if image.refused else places.setdefault(image.pixels, len(shard))
        if at == len(shard):
            shard += image.stored
        offsets.append(at)
        images.append(image[1:])
        advance(size)
    content, pixels, width, height, unreadable = zip(*images, strict=True)
    body = bytes(shard)
    values = {
        "id": part["id"],
        "hint": part["hint"],
        "content": content,
        "pixels": pixels,
        "width": width,
        "height": height,
        "shard": [hashlib.sha256(body).digest()] * len(part),
        "offset": offsets,
        "unreadable": unreadable,
    }
    return pa.table(values, READ), body


def _store_part(store: Store, key: str, rows: pa.Table, shard: bytes, shape: Shape) -> None:
    """Store a shard before the rows that name it. One that is there already is written anew, lest gc finds it old."""
    if shard:
        store.upload(snapshots.shard_key(rows["shard"][0].as_py().hex()), io.BytesIO(shard))
    store.put(key, table.as_parquet(rows, shape))
