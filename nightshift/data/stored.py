"""A snapshot in the store: its manifest and its rows."""

import pyarrow as pa
from pyarrow import compute

from nightshift.data import rows as table
from nightshift.data.decode import Shape
from nightshift.data.rows import ROWS
from nightshift.errors import DataCorruptError, DocumentDamagedError, ObjectNotFoundError, SourceError
from nightshift.records import snapshots
from nightshift.records.snapshots import Manifest
from nightshift.storage.store import Store

UNUSABLE = (DataCorruptError, SourceError, ObjectNotFoundError, DocumentDamagedError)
"""What `read_rows` raises of a snapshot that is damaged or not there, while the store answers."""


def read_rows(store: Store, name: str, digest: str) -> tuple[Manifest, pa.Table]:
    """A snapshot's manifest and rows, which were checked against its digest.

    Raises:
        SourceError: there is no such snapshot.
        DataCorruptError: its rows are not what its digest says.
    """
    manifest = snapshots.read_manifest(store, name, digest)
    shape = shape_of(manifest)
    key = snapshots.rows_key(name, digest)
    body = store.download_bytes(key, max_bytes=table.MAX_BYTES)
    rows = table.from_parquet(body, ROWS, shape, store.url(key))
    if table.digest_of(rows, shape) != digest:
        raise DataCorruptError(f"{store.url(key)} is not what its digest says: bring an older version of it back")
    return manifest, rows


def shape_of(manifest: Manifest) -> Shape:
    """How the images of a snapshot are stored."""
    return Shape(manifest.image_size, manifest.resize, manifest.storage)


def lying_as_before(store: Store, manifest: Manifest, rows: pa.Table) -> pa.Table:
    """The rows, in which images lie where the snapshot of the same digest says that they lie, if there was one.

    An image that was read again, because its file was touched or came back, lies in another shard too. But the stored
    manifest names the shards that `gc` keeps, and their order is that of training.
    """
    try:
        _, stored = read_rows(store, manifest.name, manifest.digest)
    except UNUSABLE:
        return rows
    used = table.kept(stored, "id", "shard", "offset")
    at = compute.index_in(rows["id"], value_set=used["id"])
    return table.with_columns(
        rows, {name: compute.coalesce(used[name].take(at), rows[name]).to_pylist() for name in ("shard", "offset")}
    )
