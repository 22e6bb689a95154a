"""The rows of a snapshot as Parquet: whatever lies there, it is read or refused, and never fills the memory."""

import io
import resource

import pyarrow as pa
import pytest
from pyarrow import parquet

from nightshift.data.decode import Shape
from nightshift.data.rows import ROWS, as_parquet, from_parquet, pixels_of
from nightshift.errors import DataCorruptError

SHAPE = Shape(32, "crop")


def rows(count: int, label: str = "ant") -> pa.Table:
    """Rows whose text stands once, in a dictionary."""
    values = {"string": label, "fixed_size_binary[32]": bytes(32)}
    columns = {
        field.name: pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([label]))
        if field.type == pa.string()
        else pa.array([values.get(str(field.type), 0)] * count, field.type)
        for field in ROWS
    }
    return pa.table(columns)


def test_rows_are_read_as_they_were_written() -> None:
    written = rows(100).cast(ROWS)
    assert from_parquet(as_parquet(written, SHAPE), ROWS, SHAPE, "here").equals(written)


def test_rows_whose_pixels_are_stored_in_another_way_are_refused() -> None:
    with pytest.raises(DataCorruptError, match="stored in another way"):
        from_parquet(as_parquet(rows(1).cast(ROWS), SHAPE), ROWS, Shape(48, "crop"), "here")


def test_a_small_file_that_holds_a_hundred_gigabytes_of_text_is_refused_before_it_fills_the_memory() -> None:
    table, buffer = rows(20_000, "x" * 5_000_000), io.BytesIO()
    with parquet.ParquetWriter(buffer, table.schema, store_schema=False, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"pixels": pixels_of(SHAPE)})
    assert len(buffer.getvalue()) < 10_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataCorruptError, match="too large"):
        from_parquet(buffer.getvalue(), ROWS, SHAPE, "here")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 500_000_000
