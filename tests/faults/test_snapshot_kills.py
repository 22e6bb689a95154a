"""SIGKILL while a snapshot is made: it goes on after its last complete part, and ends as if nothing had happened."""

import os
import random
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from nightshift.data import parts
from nightshift.data.snapshot import make_snapshot
from nightshift.local.s3 import embedded_s3
from nightshift.records import orphans, snapshots
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace
from tests.conftest import eventually
from tests.data.pictures import album, config, write
from tests.forked import forked
from tests.sockets import tree

PART, IMAGES = 10, 40
WRITES = 2 * IMAGES // PART + 3 + IMAGES // PART
"""A shard and its rows a part; rows, manifest and history; and each part is deleted."""
POINTS = [f"{when} {write}" for write in range(WRITES) for when in ("before", "after")]


def make(home: Path, prefix: str, root: Path, kill_at: str) -> None:
    """Make a snapshot of small parts; die before or after a write, by its number."""
    written = iter(range(1000))

    def or_die(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            number = next(written)
            if kill_at == f"before {number}":
                os.kill(os.getpid(), signal.SIGKILL)
            result = method(*arguments, **options)
            if kill_at == f"after {number}":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("put", "upload", "delete"):
        setattr(S3, name, or_die(getattr(S3, name)))
    parts._IMAGES = PART
    with embedded_s3(home, prefix) as store:
        make_snapshot(store, "photos", config(root))


def killed_and_made_again(workspace: Workspace, prefix: str, root: Path, kill: str | float) -> None:
    store = workspace.store
    child = forked().Process(target=make, args=(workspace.home, prefix, root, kill if isinstance(kill, str) else ""))
    child.start()
    assert child.pid
    if isinstance(kill, float):
        time.sleep(kill)  # the instant is the point
        family = list(tree(child.pid))
        child.kill()
    child.join()
    if isinstance(kill, float):
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in family))
    else:
        assert child.exitcode == -signal.SIGKILL, kill
    kept = PART * len(names(store, "photos/parts/"))
    done = snapshots.read_history(store, "photos").entries
    made = make_snapshot(store, "photos", config(root))
    assert made.read <= IMAGES - kept
    assert made.read == 0 or not done


def names(store: Any, below: str) -> list[str]:
    return [item.key for item in store.list(f"datasets/{below}")]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "photos", album(range(IMAGES)))
    return tmp_path / "photos"


def check(workspace: Workspace, prefix: str, root: Path, kills: list[str | float]) -> None:
    whole = make_snapshot(workspace.store, "whole", config(root)).digest
    for number, kill in enumerate(kills):
        place = f"{prefix}/{number}"
        with embedded_s3(workspace.home, place) as store:
            here = Workspace(store, workspace.home, 60, 5)
            killed_and_made_again(here, place, root, kill)
            history = snapshots.read_history(store, "photos")
            assert [entry.digest for entry in history.entries] == [whole], kill
            orphans.collect(store, orphans.find(store, timedelta(0)))
            needed = snapshots.read_manifest(store, "photos", whole).shards
            assert names(store, "shards/") == [snapshots.shard_key(shard) for shard in needed], kill
            assert len(names(store, "photos/")) == 3, kill
            assert orphans.find(store, timedelta(0)).keys == [], kill


def test_a_snapshot_killed_before_and_after_writes_ends_the_same_and_leaves_nothing(
    workspace: Workspace, prefix: str, root: Path
) -> None:
    check(workspace, prefix, root, [POINTS[at] for at in (1, 4, 2 * WRITES // 2, -11, -7)])


@pytest.mark.soak
def test_a_snapshot_killed_at_every_point_and_at_fifty_instants_ends_the_same_and_leaves_nothing(
    workspace: Workspace, prefix: str, root: Path
) -> None:
    chance = random.Random(0)
    check(workspace, prefix, root, [*POINTS, *(chance.uniform(0.2, 3) for _ in range(50))])
