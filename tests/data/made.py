"""Snapshots of pictures in a folder, and what can be seen of them."""

from pathlib import Path
from typing import Any

from nightshift.data.rows import iterate, kept
from nightshift.data.snapshot import make_snapshot, refusals_of
from nightshift.data.stored import read_rows
from nightshift.refs import SnapshotRef
from nightshift.storage.store import Store
from tests.data.pictures import config


def made(store: Store, root: Path, name: str = "photos", **fields: Any) -> SnapshotRef:
    return make_snapshot(store, name, config(root, **fields))


def splits(store: Store, snapshot: SnapshotRef) -> dict[str, str]:
    _, rows = read_rows(store, snapshot.name, snapshot.digest)
    return dict(iterate(kept(rows), "id", "split"))


def left_out(store: Store, snapshot: SnapshotRef) -> dict[str, str]:
    return dict(refusals_of(read_rows(store, snapshot.name, snapshot.digest)[1]))


def keys(store: Store, kind: str) -> list[str]:
    return [item.key for item in store.list(f"datasets/{kind}")]
