"""A snapshot on a machine: its pixels are those that the source had, or it is not trained on."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from nightshift.data.datasets import open_dataset
from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import (
    stored_snapshot,
)
from nightshift.errors import (
    DataCorruptError,
)
from nightshift.workspace import Workspace
from tests.data.conftest import Told
from tests.data.made import keys, made, splits
from tests.data.pictures import SIZE, album, write


def test_a_snapshot_is_trained_on_as_it_was_when_it_was_made(workspace: Workspace, root: Path, tmp_path: Path) -> None:
    pictures = album(range(60), ("ant", "bee", "cow"))
    write(root, pictures)
    ref = pack_snapshot(workspace, made(workspace.store, root))
    write(root, album(range(60, 90)))
    elsewhere = replace(workspace, home=tmp_path / "elsewhere")
    dataset = open_dataset(elsewhere, ref)
    assert dataset.classes == ("ant", "bee", "cow")
    assert dataset.train_images.shape[1:] == (SIZE, SIZE, 3)
    of = splits(workspace.store, stored_snapshot(workspace.store, "photos", ref.digest[:12]))
    names = sorted(name for name in pictures if of[name] == "train")
    for image, label, name in zip(dataset.train_images[:], dataset.train_labels, names, strict=True):
        with Image.open(root / name) as expected:
            assert np.array_equal(image.numpy(), np.asarray(expected)), name
        assert dataset.classes[label] == name.split("/")[0]


@pytest.mark.parametrize("what", ["shard", "rows", "swapped"])
def test_damaged_pixels_and_rows_are_never_trained_on(workspace: Workspace, root: Path, what: str) -> None:
    store = workspace.store
    write(root, album(range(60)))
    snapshot = made(store, root)
    ref = pack_snapshot(replace(workspace, home=root / "other"), snapshot)
    key = keys(store, "shards/")[0] if what != "rows" else ref.key
    body = bytearray(store.get(key)[0])
    body[len(body) // 2] ^= 1
    if what == "swapped":  # another image's pixels where this one's should be
        body = bytearray(store.get(key)[0])
        size = 3 * SIZE * SIZE
        body[:size], body[size : 2 * size] = body[size : 2 * size], body[:size]
    store.put(key, bytes(body))
    with pytest.raises(DataCorruptError, match=key.rpartition("/")[2][:12]):
        open_dataset(replace(workspace, home=root / "fresh"), ref)


def test_a_damaged_copy_on_this_machine_is_packed_again(workspace: Workspace, root: Path, told: Told) -> None:
    write(root, album(range(60)))
    workspace = replace(workspace, home=root / "home")
    ref = pack_snapshot(workspace, made(workspace.store, root))
    before = open_dataset(workspace, ref).train_images[:].clone()
    (path,) = (workspace.home / "datasets").iterdir()
    body = bytearray(path.read_bytes())
    body[-5] ^= 1
    path.write_bytes(body)
    assert open_dataset(workspace, ref).train_images[:].equal(before)
    assert "packing it again" in told.warnings[0]


def test_a_copy_that_an_older_nightshift_has_packed_is_packed_again(
    workspace: Workspace, root: Path, told: Told
) -> None:
    """It did not say which its test images are."""
    write(root, album(range(60)))
    workspace = replace(workspace, home=root / "home")
    ref = pack_snapshot(workspace, made(workspace.store, root))
    (path,) = (workspace.home / "datasets").iterdir()
    with safe_open(path, framework="np") as file:
        arrays, facts = {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["nightshift"])  # noqa: SIM118
    del arrays["test_content"], facts["sha256"]["test_content"]
    save_file(arrays, path, metadata={"nightshift": json.dumps(facts)})
    content = open_dataset(workspace, ref).test_content
    assert "packing it again" in told.warnings[0]
    of = splits(workspace.store, stored_snapshot(workspace.store, "photos", ref.digest))
    tested = [root / name for name, split in sorted(of.items()) if split == "test"]
    assert content is not None
    assert [row.numpy().tobytes() for row in content] == [hashlib.sha256(path.read_bytes()).digest() for path in tested]


def test_more_than_256_classes_have_numbers_of_their_own(workspace: Workspace, root: Path) -> None:
    names = tuple(f"class {number:03}" for number in range(300))
    write(
        root,
        {f"{split}/{name}": body for split in ("train", "test") for name, body in album(range(300), names).items()},
    )
    ref = pack_snapshot(workspace, made(workspace.store, root, rules={"groups": "off", "few_images": "off"}))
    dataset = open_dataset(workspace, ref)
    assert sorted(dataset.train_labels.tolist()) == list(range(300))
