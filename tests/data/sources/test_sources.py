"""The sources of a team's own images: what each lists, reads, and refuses by name."""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from nightshift.data.sources.listed import Listed
from nightshift.data.sources.places import open_source
from nightshift.errors import NightshiftError, NoImagesError, SourceError, UnreadableImageError
from nightshift.storage.memory import MemoryStore
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace
from tests.data.pictures import album, config, picture, write

Rows = list[dict[str, Any]]


def listed(place: object, **fields: object) -> dict[str, Listed]:
    source = open_source(config(place, **fields), MemoryStore())
    return {image.id: image for image in source.list()}


def read(place: object, name: str) -> bytes:
    source = open_source(config(place), MemoryStore())
    return source.read({image.id: image for image in source.list()}[name])


def as_csv(path: Path, rows: Rows) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(names), *(",".join(str(row.get(name, "")) for name in names) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def as_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(path: Path, rows: Rows) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = pytest.mark.parametrize(
    ("name", "write_table"), [("labels.csv", as_csv), ("labels.jsonl", as_jsonl), ("labels.parquet", as_parquet)]
)


def test_a_folder_of_folders_names_the_class_of_each_image(tmp_path: Path) -> None:
    write(tmp_path, {"ant/1.png": picture(1), "bee/deep/2.JPG": picture(2, "jpg"), "bee/notes.txt": b"no image"})
    found = listed(tmp_path)
    assert {name: image.label for name, image in found.items()} == {"ant/1.png": "ant", "bee/deep/2.JPG": "bee"}
    assert {image.split for image in found.values()} == {""}
    assert read(tmp_path, "ant/1.png") == picture(1)


def test_folders_called_train_validation_and_test_name_splits(tmp_path: Path) -> None:
    write(tmp_path, {f"{split}/ant/1.png": picture(1) for split in ("Train", "val", "test")})
    assert {image.split: image.label for image in listed(tmp_path).values()} == dict.fromkeys(
        ("train", "validation", "test"), "ant"
    )


def test_a_class_called_test_beside_another_class_is_a_class(tmp_path: Path) -> None:
    write(tmp_path, {"test/1.png": picture(1), "cat/2.png": picture(2)})
    assert {image.label for image in listed(tmp_path).values()} == {"test", "cat"}


def test_what_begins_with_a_dot_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, {"ant/1.png": picture(1), "ant/.2.png": picture(2), ".trash/ant/3.png": picture(3)})
    assert list(listed(tmp_path)) == ["ant/1.png"]


def test_links_are_followed_and_one_that_leads_in_a_circle_or_nowhere_ends_nothing(tmp_path: Path) -> None:
    write(tmp_path, {"store/1.png": picture(1), "images/ant/2.png": picture(2)})
    images = tmp_path / "images"
    (images / "ant" / "again").symlink_to(images)
    (images / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (images / "bee").symlink_to(tmp_path / "store")
    found = listed(images)
    assert set(found) == {"ant/2.png", "ant/gone.png", "bee/1.png"}
    assert "leads nowhere" in found["ant/gone.png"].refused
    assert read(images, "bee/1.png") == picture(1)


@pytest.mark.parametrize("empty", [True, False])
def test_a_folder_without_images_in_folders_is_refused_with_what_to_do(tmp_path: Path, empty: bool) -> None:
    if not empty:
        write(tmp_path, {"1.png": picture(1)})
    with pytest.raises(NoImagesError, match="put one folder a class there"):
        listed(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no folder"):
        listed(tmp_path / "typo")


def test_a_folder_that_cannot_be_listed_is_no_empty_folder(tmp_path: Path) -> None:
    write(tmp_path, album(range(4)))
    images = open_source(config(tmp_path), MemoryStore()).list()
    assert next(images).label == "ant"
    shutil.rmtree(tmp_path / "bee")  # as one that may not be listed, it raises an OSError; to root, all may be listed
    with pytest.raises(SourceError, match="bee cannot be listed"):
        list(images)


@contextmanager
def nobody() -> Iterator[None]:
    """Be a user whom permissions bind, as they do not bind root."""
    user = os.geteuid()
    os.seteuid(65534 if user == 0 else user)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_to_all() -> Iterator[Path]:
    """A folder that everybody may reach, as they may not reach pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)
        for path in Path(folder).rglob("*"):
            path.chmod(0o755)


def test_what_may_not_be_read_is_one_image_and_what_may_not_be_listed_ends_the_listing(open_to_all: Path) -> None:
    write(open_to_all, album(range(4)))
    (open_to_all / "ant" / "00002.png").chmod(0)
    with nobody():
        source = open_source(config(open_to_all), MemoryStore())
        images = {image.id: image for image in source.list()}
        with pytest.raises(UnreadableImageError, match="Permission denied"):
            source.read(images["ant/00002.png"])
        assert source.read(images["ant/00000.png"]) == picture(0)
    (open_to_all / "bee").chmod(0)
    with nobody(), pytest.raises(SourceError, match=r"bee cannot be listed \(Permission denied\)"):
        listed(open_to_all)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, album(range(2)))
    source = open_source(config(tmp_path), MemoryStore())
    image = next(iter(source.list()))

    def another_writes(size: int) -> None:
        with open(tmp_path / image.id, "ab") as file:
            file.write(b"more")

    monkeypatch.setattr("nightshift.data.sources.files.check_size", another_writes)  # between the look and the read
    with pytest.raises(UnreadableImageError, match="it changed while it was read"):
        source.read(image)


def test_a_file_that_changes_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    write(tmp_path, album(range(2)))
    source = open_source(config(tmp_path), MemoryStore())
    image = next(iter(source.list()))
    (tmp_path / image.id).write_bytes(picture(9))
    with pytest.raises(UnreadableImageError, match="changed"):
        source.read(image)


def test_a_pipe_is_no_image_and_nobody_waits_for_it(tmp_path: Path) -> None:
    write(tmp_path, album(range(2)))
    os.mkfifo(tmp_path / "ant" / "pipe.png")
    with pytest.raises(UnreadableImageError, match="no regular file"):
        read(tmp_path, "ant/pipe.png")


# Tables


@WRITERS
def test_a_table_names_images_beside_it(tmp_path: Path, name: str, write_table: Callable[[Path, Rows], None]) -> None:
    write(tmp_path, album(range(3)))
    rows = [
        {"image": "ant/00000.png", "label": "ant", "split": "train", "group": "g", "camera": "left"},
        {"image": str(tmp_path / "bee/00001.png"), "label": "bee", "split": "val", "group": "g", "camera": "right"},
        {"image": "./ant/00002.png", "label": "ant", "split": "", "group": "", "camera": ""},
    ]
    write_table(tmp_path / name, rows)
    found = listed(tmp_path / name)
    assert {image.id: (image.label, image.split, image.group) for image in found.values()} == {
        "ant/00000.png": ("ant", "train", "g"),
        "bee/00001.png": ("bee", "validation", "g"),
        "ant/00002.png": ("ant", "", ""),
    }
    assert json.loads(found["ant/00000.png"].extra) == {"camera": "left"}
    assert not any(image.refused for image in found.values())
    assert read(tmp_path / name, "bee/00001.png") == picture(1)


def test_a_label_stays_the_text_that_stands_in_the_csv(tmp_path: Path) -> None:
    write(tmp_path, album(range(2)))
    as_csv(tmp_path / "labels.csv", [{"image": "ant/00000.png", "label": "007"}, {"image": "x", "label": "1.0"}])
    assert [image.label for image in listed(tmp_path / "labels.csv").values()] == ["007", "1.0"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"image": {"bytes": picture(number), "path": f"{number}.png"}, "label": "ant"} for number in range(250)],
        [{"bytes": picture(number), "label": "ant"} for number in range(250)],
    ],
    ids=["as Hugging Face stores them", "bytes"],
)
def test_a_parquet_file_may_hold_the_images_themselves(tmp_path: Path, rows: Rows) -> None:
    path = tmp_path / "labels.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    source = open_source(config(path), MemoryStore())
    images = list(source.list())
    assert [source.read(image) for image in images] == [picture(number) for number in range(250)]
    assert images[7].id == ("7.png" if "image" in rows[0] else "row 7")


@WRITERS
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "ant/00000.png", "label": ""}, "no label"),
        ({"image": "ant/00000.png", "label": "NaN"}, "no label"),
        ({"image": "", "label": "ant"}, "no path"),
        ({"image": "../secret.png", "label": "ant"}, "leads out of the table's folder"),
        ({"image": "ant/../../secret.png", "label": "ant"}, "leads out of the table's folder"),
        ({"image": "ant/typo.png", "label": "ant"}, "no such file"),
        ({"image": "ant/00000.png", "label": "ant", "split": "exam"}, "not one of train, validation and test"),
    ],
)
def test_a_bad_row_of_a_table_is_refused_by_name(
    tmp_path: Path, name: str, write_table: Callable[[Path, Rows], None], row: dict[str, Any], reason: str
) -> None:
    write(tmp_path / "data", album(range(2)))
    write(tmp_path, {"secret.png": picture(9)})
    write_table(tmp_path / "data" / name, [row, {"image": "bee/00001.png", "label": "bee"}])
    bad, good = listed(tmp_path / "data" / name).values()
    assert reason in bad.refused
    assert not good.refused


def test_labels_that_are_no_text_are_taken_as_text_and_nan_and_null_as_none(tmp_path: Path) -> None:
    write(tmp_path, album(range(3)))
    names = pa.array(sorted(album(range(3))))
    for labels, kept in (([7.5, float("nan"), None], "7.5"), ([7, None, None], "7"), ([True, None, None], "True")):
        parquet.write_table(pa.table({"image": names, "label": pa.array(labels)}), tmp_path / "labels.parquet")
        assert [(image.label, image.refused) for image in listed(tmp_path / "labels.parquet").values()] == [
            (kept, ""),
            ("", "it has no label"),
            ("", "it has no label"),
        ]


@WRITERS
@pytest.mark.parametrize(
    ("row", "fields", "reason"),
    [
        ({"file": "a.png", "label": "ant"}, {}, "no column `image`; it has: file, label"),
        ({"image": "a.png", "class": "ant"}, {}, "no column `label`; it has: image, class"),
        ({"image": "a.png", "label": "ant"}, {"split": {"by": "plant"}}, "no column 'plant'"),
    ],
)
def test_a_table_without_a_column_is_refused_with_those_it_has(
    tmp_path: Path,
    name: str,
    write_table: Callable[[Path, Rows], None],
    row: dict[str, Any],
    fields: dict[str, Any],
    reason: str,
) -> None:
    write_table(tmp_path / name, [row])
    with pytest.raises(SourceError, match=reason):
        listed(tmp_path / name, **fields)


@pytest.mark.parametrize("name", ["labels.csv", "labels.jsonl", "labels.parquet"])
@pytest.mark.parametrize("body", [b"", b"\x00\xff\xfe", b"image,label\n", b'{"image": 1'])
def test_a_table_that_is_none_is_refused_in_a_sentence(tmp_path: Path, name: str, body: bytes) -> None:
    (tmp_path / name).write_bytes(body)
    with pytest.raises(NightshiftError, match=name):
        listed(tmp_path / name)


def test_a_table_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no table"):
        listed(tmp_path / "typo.csv")


# Buckets


@pytest.fixture
def bucket(workspace: Workspace) -> S3:
    assert isinstance(workspace.store, S3)
    return workspace.store


def test_a_prefix_and_a_table_in_a_bucket_list_what_the_same_folder_does(bucket: S3, tmp_path: Path) -> None:
    pictures = album(range(5))
    write(tmp_path, pictures)
    as_csv(tmp_path / "labels.csv", [{"image": name, "label": name.split("/")[0]} for name in pictures])
    for name in [*pictures, "labels.csv"]:
        bucket.put(f"photos/{name}", (tmp_path / name).read_bytes())
    on_disk = [(image.id, image.label) for image in listed(tmp_path).values()]
    for place in (bucket.url("photos"), bucket.url("photos/"), bucket.url("photos/labels.csv")):
        source = open_source(config(place), bucket)
        images = sorted(source.list(), key=lambda image: image.id)
        assert [(image.id, image.label) for image in images] == on_disk, place
        assert [source.read(image) for image in images] == [pictures[image.id] for image in images]


def test_an_object_that_is_replaced_or_deleted_after_it_was_listed_is_refused(bucket: S3) -> None:
    for name, body in album(range(2)).items():
        bucket.put(f"photos/{name}", body)
    source = open_source(config(bucket.url("photos")), bucket)
    first, second = source.list()
    bucket.put(f"photos/{first.id}", picture(9))
    bucket.delete(f"photos/{second.id}")
    for image, reason in ((first, "changed"), (second, "gone")):
        with pytest.raises(UnreadableImageError, match=reason):
            source.read(image)


def test_a_table_in_a_bucket_names_no_file_of_this_machine(bucket: S3, tmp_path: Path) -> None:
    write(tmp_path, {"1.png": picture(1)})
    table = io.StringIO()
    table.write(f"image,label\n{tmp_path / '1.png'},ant\n")
    bucket.put("photos/labels.csv", table.getvalue().encode())
    (image,) = open_source(config(bucket.url("photos/labels.csv")), bucket).list()
    assert "leads out" in image.refused


def test_a_table_on_this_machine_may_name_images_in_buckets(bucket: S3, tmp_path: Path) -> None:
    bucket.put("photos/1.png", picture(1))
    write(tmp_path, {"2.png": picture(2)})
    url = bucket.url("photos/1.png")
    as_csv(
        tmp_path / "labels.csv",
        [{"image": name, "label": "ant"} for name in (url, "2.png", bucket.url("photos/typo.png"), "s3:///x.png")],
    )
    source = open_source(config(tmp_path / "labels.csv"), bucket)
    first, second, typo, nowhere = source.list()
    assert (first.id, source.read(first), source.read(second)) == (url, picture(1), picture(2))
    assert typo.refused == "there is no such file"
    assert nowhere.refused


def test_an_empty_prefix_is_refused_with_its_address(bucket: S3) -> None:
    with pytest.raises(NoImagesError, match="photos"):
        list(open_source(config(bucket.url("photos")), bucket).list())
