"""Snapshots of a team's own images: what is read, kept, divided, committed and found again."""

import os
import threading
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from nightshift.data.rows import ROWS
from nightshift.data.snapshot import (
    _unfit,
    difference,
    make_snapshot,
    stored_snapshot,
)
from nightshift.data.stored import read_rows
from nightshift.errors import (
    DatasetRejectedError,
    NightshiftError,
    SourceError,
    StorageUnreachableError,
)
from nightshift.records import orphans, snapshots
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Stored
from nightshift.workspace import Workspace
from tests.data.made import keys, left_out, made, splits
from tests.data.pictures import SIZE, album, config, picture, write

# One night after the other


def test_a_second_night_reads_only_what_is_new_and_keeps_every_split(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(60)))
    first = made(memory, root)
    write(root, album(range(60, 70)))
    second = made(memory, root)
    assert (first.images, first.added, first.read) == (60, 60, 60)
    assert (second.images, second.added, second.removed, second.read) == (70, 10, 0, 10)
    before, after = splits(memory, first), splits(memory, second)
    assert {name: after[name] for name in before} == before
    assert set(after.values()) == {"train", "validation", "test"}


def test_a_night_without_changes_is_the_same_snapshot_and_no_second_entry(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    first, second = made(memory, root), made(memory, root)
    assert (first.digest, second.read) == (second.digest, 0)
    assert len(snapshots.read_history(memory, "photos").entries) == 1


def test_a_relabelled_and_a_removed_image_cost_a_row_and_no_shard(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    first, shards = made(memory, root), keys(memory, "shards/")
    (root / "ant" / "00000.png").unlink()
    (root / "labels.csv").write_text(
        "image,label\n"
        + "".join(
            f"{path.relative_to(root)},{'bee' if path.stem == '00004' else path.parent.name}\n"
            for path in sorted(root.rglob("*.png"))
        )
    )
    second = made(memory, root / "labels.csv")
    assert (second.removed, second.relabelled, second.read) == (1, 1, 0)
    assert keys(memory, "shards/") == shards
    assert first.digest != second.digest


def test_an_image_that_was_changed_is_read_again(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    made(memory, root)
    write(root, {"ant/00000.png": picture(1000)})
    second = made(memory, root)
    assert (second.read, second.added, second.removed) == (1, 0, 0)


def test_another_image_size_reads_all_again(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    first = made(memory, root)
    second = made(memory, root, image_size=16)
    assert second.read == 40
    assert first.digest != second.digest


def test_without_a_size_images_are_stored_as_the_first_ones_are_and_stay_so(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    first = made(memory, root, image_size="auto")
    write(root, {f"ant/a{number}.png": picture(number, size=60) for number in range(100)})
    second = made(memory, root, image_size="auto")
    for snapshot in (first, second):
        assert read_rows(memory, "photos", snapshot.digest)[0].image_size == SIZE


def test_a_folder_a_prefix_and_a_table_with_the_same_files_are_the_same_snapshot(
    workspace: Workspace, root: Path
) -> None:
    pictures = album(range(40))
    write(root, pictures)
    write(root, {"labels.csv": "".join(["image,label\n", *(f"{n},{n.split('/')[0]}\n" for n in pictures)]).encode()})
    store = workspace.store
    for name, body in pictures.items():
        store.put(f"photos/{name}", body)
    places = {"folder": root, "prefix": store.url("photos"), "table": root / "labels.csv"}
    assert len({make_snapshot(store, name, config(place)).digest for name, place in places.items()}) == 1


# Splits


def test_copies_of_an_image_are_never_in_two_splits(memory: MemoryStore, root: Path) -> None:
    pictures = album(range(100))
    write(root, pictures)
    write(root, {name.replace(".png", "-copy.png"): body for name, body in pictures.items()})
    snapshot = made(memory, root)
    of = splits(memory, snapshot)
    assert all(of[name] == of[name.replace(".png", "-copy.png")] for name in pictures)
    assert [finding.rule for finding in snapshot.findings] == ["duplicates"]
    assert "100 images" in snapshot.findings[0].detail


def test_a_column_groups_images_and_no_group_is_in_two_splits(memory: MemoryStore, root: Path) -> None:
    pictures = album(range(100))
    write(root, pictures)
    rows = [f"{name},{name.split('/')[0]},plant {number // 5}\n" for number, name in enumerate(pictures)]
    write(root, {"labels.csv": "".join(["image,label,plant\n", *rows]).encode()})
    of = splits(memory, made(memory, root / "labels.csv", split={"by": "plant"}))
    names = list(pictures)
    assert all(len({of[name] for name in names[start : start + 5]}) == 1 for start in range(0, 100, 5))


def test_splits_that_the_source_names_are_taken_as_they_are_and_a_torn_copy_is_a_finding(
    memory: MemoryStore, root: Path
) -> None:
    write(root, {f"{split}/{name}": body for split in ("train", "test") for name, body in album(range(9)).items()})
    snapshot = made(memory, root)
    assert all(name.startswith(split) for name, split in splits(memory, snapshot).items())
    assert "9 groups or images stand in two splits" in {f.rule: f.detail for f in snapshot.findings}["groups"]


# What is left out


def test_an_image_under_two_labels_is_left_out_with_all_its_copies(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    write(root, {"bee/copy.png": picture(0)})
    snapshot = made(memory, root)
    assert left_out(memory, snapshot) == dict.fromkeys(
        ("ant/00000.png", "bee/copy.png"), "it stands under several labels: ant, bee"
    )


def test_an_image_that_a_table_names_twice_counts_once_and_under_two_labels_not_at_all(
    memory: MemoryStore, root: Path
) -> None:
    pictures = album(range(40))
    write(root, pictures)
    rows = [f"{name},{name.split('/')[0]}\n" for name in pictures]
    rows += ["ant/00000.png,ant\n", "ant/00002.png,bee\n"]
    write(root, {"labels.csv": "".join(["image,label\n", *rows]).encode()})
    snapshot = made(memory, root / "labels.csv")
    assert (snapshot.images, left_out(memory, snapshot)) == (
        39,
        {"ant/00002.png": "it stands under several labels"},
    )


def test_an_image_that_a_table_names_under_one_label_only_since_tonight_is_read_tonight(
    memory: MemoryStore, root: Path
) -> None:
    write(root, pictures := album(range(40)))
    rows = "".join(["image,label\n", *(f"{name},{name.split('/')[0]}\n" for name in pictures)])
    write(root, {"labels.csv": f"{rows}ant/00002.png,bee\n".encode()})
    assert made(memory, root / "labels.csv").images == 39
    write(root, {"labels.csv": rows.encode()})
    second = made(memory, root / "labels.csv")
    assert (second.images, second.read) == (40, 1)


BAD = {
    "empty.png": (b"", "it is empty"),
    "text.jpg": (b"this is no image", "not an image"),
    "cut.png": (picture(1)[:-400], "damaged"),
    "cut.jpg": (picture(1, "jpg", 200)[:-4000], "damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_left_out_by_name_and_stops_nothing(memory: MemoryStore, root: Path, name: str) -> None:
    body, reason = BAD[name]
    write(root, {**album(range(40)), f"ant/{name}": body})
    snapshot = made(memory, root)
    assert snapshot.images == 40
    ((image, why),) = left_out(memory, snapshot).items()
    assert image == f"ant/{name}"
    assert reason in why


def test_an_image_of_30000_by_30000_pixels_is_an_error_of_its_own(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    Image.new("1", (30_000, 30_000)).save(root / "ant" / "huge.png")
    snapshot = made(memory, root)
    assert "pixels" in left_out(memory, snapshot)["ant/huge.png"]


def test_a_name_that_is_not_utf_8_is_left_out_by_what_can_be_shown_of_it(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    Path(os.fsdecode(bytes(root / "ant") + b"/\xff.png")).write_bytes(picture(50))
    assert "not UTF-8" in str(left_out(memory, made(memory, root)))


def test_what_could_not_be_read_is_tried_again_the_next_night(memory: MemoryStore, root: Path) -> None:
    write(root, {**album(range(40)), "ant/x.png": b"not yet"})
    first = made(memory, root)
    second = made(memory, root)
    write(root, {"ant/x.png": picture(77)})
    third = made(memory, root)
    assert (first.refused, second.refused, second.read, third.refused, third.images) == (1, 1, 1, 0, 41)


@pytest.mark.parametrize(
    ("pictures", "reason"),
    [
        (album(range(40), ("ant",)), "one class, ant"),
        ({"ant/1.png": b"no", "bee/2.png": b"no"}, "none of its 2 images can be used"),
        ({"train/ant/1.png": picture(1), "train/bee/2.png": picture(2)}, "no image is in the split 'test'"),
    ],
)
def test_images_that_nothing_can_be_trained_on_are_refused_and_nothing_is_half_written(
    memory: MemoryStore, root: Path, pictures: dict[str, bytes], reason: str
) -> None:
    write(root, pictures)
    with pytest.raises(DatasetRejectedError, match=reason):
        made(memory, root)
    assert keys(memory, "photos/snapshots/") == []
    assert snapshots.read_history(memory, "photos").entries == []


# The commit


class Failing(MemoryStore):
    """A store that stops answering at the write of a key."""

    fails_at = "no key"

    def put(self, key: str, *arguments: Any, **options: Any) -> str:
        self._fail(key)
        return super().put(key, *arguments, **options)

    def upload(self, key: str, *arguments: Any, **options: Any) -> None:
        self._fail(key)
        super().upload(key, *arguments, **options)

    def _fail(self, key: str) -> None:
        if self.fails_at in key:
            raise StorageUnreachableError("the store does not answer")


@pytest.mark.parametrize("at", ["shards/", "/parts/", ".parquet", "/snapshots/", "history.json"])
def test_a_store_that_fails_at_any_write_leaves_a_snapshot_that_ends_the_same(root: Path, at: str) -> None:
    write(root, album(range(40)))
    whole = made(MemoryStore(), root)
    store = Failing()
    store.fails_at = at
    with pytest.raises(StorageUnreachableError):
        made(store, root)
    store.fails_at = "no key"
    again = made(store, root)
    assert again.digest == whole.digest
    assert again.read == (40 if at in ("shards/", "/parts/", ".parquet") else 0)
    assert keys(store, "photos/parts/") == []
    assert orphans.find(store, timedelta(0)).objects == []


def test_what_an_interrupted_snapshot_has_left_is_found_by_gc_and_a_whole_one_stays(root: Path) -> None:
    store = Failing()
    write(root, album(range(40)))
    whole = made(store, root)
    write(root, album(range(40, 60)))
    store.fails_at = "history.json"
    with pytest.raises(StorageUnreachableError):
        made(store, root)
    store.fails_at = "no key"
    assert orphans.find(store, timedelta(hours=1)).objects == []
    found = orphans.find(store, timedelta(0))
    assert {key.split("/")[1] for key in found.keys} == {"photos", "shards"}
    assert len(orphans.collect(store, found).objects) == len(found.objects) == 4
    assert len(splits(store, whole)) == 40
    assert len(keys(store, "shards/")) == 1


def test_two_machines_that_make_the_same_snapshot_at_once_end_with_the_same_objects(root: Path) -> None:
    write(root, album(range(40)))
    alone, store = MemoryStore(), MemoryStore()
    made(alone, root)
    threads = [threading.Thread(target=made, args=(store, root)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(snapshots.read_history(store, "photos").entries) == 1
    assert keys(store, "") == keys(alone, "")


def test_a_listing_that_ends_with_an_error_half_way_is_no_snapshot(
    memory: MemoryStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, album(range(40)))

    def scandir(path: Path) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "bee":
            raise PermissionError(13, "Permission denied")
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SourceError, match="Permission denied"):
        made(memory, root)
    assert keys(memory, "") == []


class HalfWay(MemoryStore):
    """A bucket that answers with three images and then no more."""

    def list(self, prefix: str) -> Iterator[Stored]:
        yield from islice(super().list(prefix), 3)
        if prefix == "photos/":
            raise StorageUnreachableError("the store does not answer")


def test_so_is_a_listing_of_a_bucket() -> None:
    bucket = HalfWay()
    for name, body in album(range(40)).items():
        bucket.put(f"photos/{name}", body)
    with pytest.raises(StorageUnreachableError):
        make_snapshot(bucket, "photos", config("s3://memory/photos"))
    assert keys(bucket, "") == []


# What is stored


def test_a_snapshot_is_found_by_the_beginning_of_its_digest_and_no_other(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    digest = made(memory, root).digest
    assert stored_snapshot(memory, "photos", digest[:8]).digest == digest
    with pytest.raises(SourceError, match=f"The newest are: {digest[:12]}"):
        stored_snapshot(memory, "photos", "nothing")


def test_what_lies_in_the_place_of_a_snapshot_is_no_snapshot(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    digest = made(memory, root).digest
    for key in (snapshots.rows_key("photos", digest), snapshots.manifest_key("photos", digest)):
        whole = memory.get(key)[0]
        for body in (b"", b"{}", b"PAR1" + bytes(100) + b"PAR1", whole[:-9], whole[:50] + whole[60:]):
            memory.put(key, body)
            with pytest.raises(NightshiftError):
                read_rows(memory, "photos", digest)
        memory.put(key, whole)
    assert read_rows(memory, "photos", digest)[0].digest == digest


def test_two_snapshots_differ_by_what_was_added_removed_and_relabelled(memory: MemoryStore, root: Path) -> None:
    write(root, album(range(40)))
    (root / "labels.csv").write_text("image,label\n" + "".join(f"{n},{n.split('/')[0]}\n" for n in album(range(40))))
    first = made(memory, root / "labels.csv")
    rows = [f"{n},{n.split('/')[0]}\n" for n in album(range(2, 41))]
    write(root, album([40]))
    rows[0] = "ant/00002.png,bee\n"
    (root / "labels.csv").write_text("image,label\n" + "".join(rows))
    second = made(memory, root / "labels.csv")
    tables = [read_rows(memory, "photos", snapshot.digest)[1] for snapshot in (first, second)]
    assert difference(*tables) == (["ant/00040.png"], ["ant/00000.png", "bee/00001.png"], ["ant/00002.png"])


@pytest.mark.parametrize(
    ("count", "said"), [(100_000, ""), (100_001, "the data set has 100,001 classes: it takes 2 to 100,000")]
)
def test_a_hundred_thousand_classes_are_taken_and_more_refused_with_how_many_there_are(count: int, said: str) -> None:
    several = {name: [""] * count for name in ROWS.names} | {"label": [f"class {n}" for n in range(count)]}
    several |= {"split": ["train", "test"] * (count // 2) + ["train"] * (count % 2)}
    several |= {name: [None] * count for name in ROWS.names if ROWS.field(name).type != pa.string()}
    assert _unfit(pa.table(several, ROWS)) == said
