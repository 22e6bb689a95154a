"""The rows of a snapshot, one an image, as a table of Arrow and as Parquet in the store.

Whoever can write to the bucket can write such a file. So its size and columns are bounded before it is read, and what
training rests on is bound by the snapshot's digest: image, label, split and the sha256 of the pixels.
"""

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyarrow import compute, parquet

from nightshift.data.decode import Shape
from nightshift.errors import DataCorruptError, ObjectTooLargeError

_SHA256 = pa.binary(32)
LISTED = pa.schema(
    {
        "id": pa.string(),
        "place": pa.string(),
        "hint": pa.string(),
        "size": pa.int64(),
        "label": pa.string(),
        "split": pa.string(),
        "group": pa.string(),
        "extra": pa.string(),
        "refused": pa.string(),
    }
)
"""What `Listed` has."""
READ = pa.schema(
    {
        "id": pa.string(),
        "hint": pa.string(),
        "content": _SHA256,
        "pixels": _SHA256,
        "width": pa.int32(),
        "height": pa.int32(),
        "shard": _SHA256,
        "offset": pa.int64(),
        "unreadable": pa.string(),
    }
)
"""What is known of an image once it was read, or why it cannot be: the sha256 of its file and of its pixels as they are
stored, its size in pixels, and where in which shard they lie, in bytes."""
ROWS = pa.schema(
    [
        *(LISTED.field(name) for name in ("id", "hint", "label", "split", "group", "extra")),
        *(field for field in READ if field.name not in ("id", "hint")),
        pa.field("refused", pa.string()),
    ]
)
"""A snapshot. `split` is empty where `refused` says why the image is left out."""

MAX_BYTES = 8 * 1024**3
"""Of a file of rows, and of what is in it."""
_MOST_ROWS = 20_000_000
_BATCH = 10_000


def as_parquet(rows: pa.Table, shape: Shape) -> bytes:
    """The file in which rows are stored. It says how their pixels are stored."""
    buffer = io.BytesIO()
    parquet.write_table(rows.replace_schema_metadata({"pixels": pixels_of(shape)}), buffer, compression="zstd")
    return buffer.getvalue()


def from_parquet(body: bytes, schema: pa.Schema, shape: Shape, url: str) -> pa.Table:
    """The rows that were stored.

    Raises:
        DataCorruptError: it is no such file, or its pixels are stored in another way.
    """
    try:
        texts = [field.name for field in schema if field.type == pa.string()]
        # In a dictionary each value stands once, and the file may name it a million times.
        file = parquet.ParquetFile(io.BytesIO(body), read_dictionary=texts)
        if not parquet.read_schema(io.BytesIO(body)).equals(schema):
            raise ValueError("its columns are others")
        if (file.schema_arrow.metadata or {}).get(b"pixels") != pixels_of(shape).encode():
            raise ValueError("its pixels are stored in another way")
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        if file.metadata.num_rows > _MOST_ROWS or sum(group.total_byte_size for group in groups) > MAX_BYTES:
            raise ObjectTooLargeError(f"{url} is too large")
        rows = file.read()
        rows.validate(full=True)
        if sum(_text_bytes(rows[name]) for name in texts) > MAX_BYTES:
            raise ObjectTooLargeError(f"{url} is too large")
        rows = rows.cast(schema)
    except Exception as error:  # a reader of Parquet raises anything on bytes that are none
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataCorruptError(f"{url} is damaged, or no rows of a snapshot: {reason}") from None
    return rows.replace_schema_metadata(None)


def _text_bytes(column: pa.ChunkedArray) -> int:
    """How many bytes a column of text takes without its dictionary."""
    lengths = (
        compute.sum(compute.binary_length(chunk.dictionary).take(chunk.indices)).as_py() for chunk in column.chunks
    )
    return sum(length or 0 for length in lengths)


def pixels_of(shape: Shape) -> str:
    """What was done to the pixels, in a word: part of a snapshot's digest."""
    return f"{'RGB' if shape.storage == 'pixels' else 'JPEG'} {shape.size} {shape.resize} 1"


def kept(rows: pa.Table, *columns: str) -> pa.Table:
    """The rows of images that are used, or some of their columns."""
    return (rows.select(columns) if columns else rows).filter(compute.equal(rows["refused"], ""))


def of_split(rows: pa.Table, split: str) -> pa.Table:
    """The rows of images that are used in a split, in the order in which they are packed and tested."""
    used = kept(rows)
    return used.filter(compute.equal(used["split"], split))


def repeated(rows: pa.Table, column: str) -> pa.Table:
    """The rows whose value of a column stands in another row too."""
    counted = rows.select([column]).group_by(column).aggregate([([], "count_all")])
    several = counted.filter(compute.greater(counted["count_all"], 1))
    return rows.filter(compute.is_in(rows[column], value_set=several[column]))


def places_of(rows: pa.Table, known: Sequence[pa.Table]) -> pa.ChunkedArray:
    """For each row, the place of the first known row with its id and hint, counted over all tables; null if none.

    If an id occurs several times in a table, only its first row there counts. A join would do the same, and take
    several times the memory.
    """
    places, start = pa.chunked_array([pa.nulls(len(rows), pa.int64())]), 0
    for part in known:
        at = compute.index_in(rows["id"], value_set=part["id"]).cast(pa.int64())
        is_same = compute.equal(part["hint"].take(at), rows["hint"])
        places = compute.coalesce(places, compute.if_else(is_same, compute.add(at, start), None))
        start += len(part)
    return places


def digest_of(rows: pa.Table, shape: Shape, split: str | None = None) -> str:
    """sha256, hexadecimal, over the sorted images that are used: id, content, label, split and pixels.

    Args:
        split: of this one alone.
    """
    sha256 = hashlib.sha256(pixels_of(shape).encode())
    used = kept(rows, "id", "content", "label", "split", "pixels")
    if split:
        used = used.filter(compute.equal(used["split"], split))
    for batch in used.to_batches(_BATCH):
        parts = [part for column in batch.columns for part in _with_length(column.cast(pa.binary()))]
        joined = compute.binary_join_element_wise(*parts, b"")
        sha256.update(memoryview(joined.buffers()[2])[: compute.sum(compute.binary_length(joined)).as_py()])
    return sha256.hexdigest()


def _with_length(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """The length of each value in four bytes, little-endian, and the values."""
    lengths = compute.binary_length(values)  # int32
    packed = pa.Array.from_buffers(pa.binary(4), len(values), [None, lengths.buffers()[1]], offset=lengths.offset)
    return packed.cast(pa.binary()), values


def iterate(rows: pa.Table, *columns: str) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row; a batch at a time is in Python's memory."""
    for batch in rows.select(columns).to_batches(_BATCH):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def with_columns(rows: pa.Table, columns: Mapping[str, list[Any]]) -> pa.Table:
    """Rows with some columns replaced."""
    for name, values in columns.items():
        index = rows.schema.get_field_index(name)
        rows = rows.set_column(index, rows.schema.field(name), pa.array(values, rows.schema.field(name).type))
    return rows
