"""Images that cannot be trained on, as a user meets them: one sentence, its exit code, and nothing stored."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.data.pictures import album, picture, write

PLACES: Mapping[str, tuple[dict[str, bytes], str]] = {
    "an empty folder": ({}, "has no images"),
    "one class only": (album(range(40), ("ant",)), "all its images are of one class, ant"),
    "nothing but broken images": (
        {"ant/1.png": b"", "bee/2.jpg": b"text"},
        "none of the first images can be read (ant/1.png: it is empty; bee/2.jpg: not an image of BMP",
    ),
    "a table without the column": (
        {"labels.csv": b"file,label\na.png,ant\n"},
        "no column `image`; it has: file, label",
    ),
    "a table of images that are gone": (
        {"labels.csv": b"image,label\nant/00000.png,ant\n"},
        "(ant/00000.png: there is no such file)",
    ),
    "a table that leaves its folder": (
        {"labels.csv": b"image,label\n../a.png,ant\n"},
        "(../a.png: it leads out of the table's folder",
    ),
    "a table that is none": ({"labels.parquet": picture(1)}, "labels.parquet cannot be read as a table"),
}


@pytest.mark.parametrize("case", PLACES)
def test_images_that_cannot_be_trained_on_are_told_in_a_sentence_and_nothing_is_stored(
    nightshift: Callable[..., Finished], workspace: Workspace, tmp_path: Path, case: str
) -> None:
    pictures, said = PLACES[case]
    root = tmp_path / "photos"
    root.mkdir()
    write(root, pictures)
    ended = nightshift("data", "snapshot", str(next(root.glob("labels.*"), root)))
    assert ended.exit_code in (1, 2)
    assert "Error: " in ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err
    stored = [item.key for item in workspace.store.list("")]
    assert [key for key in stored if not re.search("/parts/|/shards/", key)] == []  # as of one that was interrupted
