"""Images stored as JPEG: the same pixels whoever asks, from wherever, whatever happens to the shards on the way."""

import errno
import io
import os
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nightshift.data import parts, shards
from nightshift.data.batches import Batches, batch_indices, epoch_order, make_plan, training_batch
from nightshift.data.datasets import Dataset, few, in_parts, open_dataset
from nightshift.data.encoded import EncodedImages
from nightshift.data.packed import pack_snapshot
from nightshift.data.rows import of_split
from nightshift.data.stored import read_rows
from nightshift.disk import complete_file
from nightshift.errors import DataCorruptError, StorageUnreachableError
from nightshift.records.snapshots import manifest_key, write_manifest
from nightshift.refs import DatasetRef
from nightshift.storage.memory import MemoryStore
from nightshift.training.ranks import Ranks
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.data.conftest import Told
from tests.data.made import keys, made
from tests.data.pictures import SIZE, album, picture, write

CLASSES = ("ant", "bee", "cow")


@pytest.fixture
def here(memory: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A machine, and a store in which a shard has 25 images."""
    monkeypatch.setattr(parts, "_IMAGES", 25)
    return Workspace(memory, tmp_path / "home", lease_seconds=60, save_retry_seconds=5)


@pytest.fixture
def ref(here: Workspace, root: Path) -> DatasetRef:
    write(root, album(range(200), CLASSES))
    return pack_snapshot(here, made(here.store, root, storage="encoded"))


def images_of(dataset: Dataset) -> EncodedImages:
    assert isinstance(dataset.train_images, EncodedImages)
    return dataset.train_images


def test_each_image_is_what_pillow_makes_of_the_jpeg_of_its_pixels(
    here: Workspace, ref: DatasetRef, root: Path
) -> None:
    dataset = open_dataset(here, ref)
    _, rows = read_rows(here.store, ref.name, ref.digest)
    assert len(dataset.train_images) + len(dataset.test_images) + len(dataset.images_of("validation")) == 200
    train = of_split(rows, "train")["id"].to_pylist()
    for number, name in enumerate(train):
        jpeg = io.BytesIO()
        with Image.open(root / name) as image:
            image.save(jpeg, "JPEG", quality=95)
        with Image.open(jpeg) as again:
            assert np.array_equal(dataset.train_images[number].numpy(), np.asarray(again)), name
        assert dataset.classes[dataset.train_labels[number]] == name.split("/")[0]


def test_images_are_selected_as_those_of_a_tensor_are(here: Workspace, ref: DatasetRef) -> None:
    images = images_of(open_dataset(here, ref))
    whole = images[:]
    assert images.shape == whole.shape == (len(images), SIZE, SIZE, 3)
    for which in (3, -1, slice(5, 9), slice(None, None, 7), [4, 2, 4], [], torch.tensor([1, 0])):
        assert torch.equal(images[which], whole[which]), which
    numbers, parts_of = zip(*in_parts(images, 16), strict=True)
    assert torch.equal(torch.cat(parts_of), whole[torch.cat(numbers)])
    assert sorted(torch.cat(numbers).tolist()) == list(range(len(images)))


def test_memory_is_used_again_when_nobody_has_the_images_in_it(here: Workspace, ref: DatasetRef) -> None:
    images = images_of(open_dataset(here, ref))
    first = images[:10]
    address, before = first.data_ptr(), first.clone()
    assert images[10:20].data_ptr() != address
    some = first[2:4]
    del first
    assert images[20:30].data_ptr() != address
    assert torch.equal(some, before[2:4])
    del some
    again = images[:10]
    assert again.data_ptr() == address
    assert torch.equal(again, before)


def test_a_jpeg_of_the_right_size_is_stored_as_it_came_and_any_other_is_made_anew(here: Workspace, root: Path) -> None:
    pictures = {f"{CLASSES[number % 3]}/{number}.jpg": picture(number, "jpg") for number in range(60)}
    turned, larger = io.BytesIO(), io.BytesIO()
    one = Image.open(io.BytesIO(picture(1, "jpg")))
    exif = Image.Exif()
    exif[0x0112] = 6
    one.save(turned, "JPEG", exif=exif)
    one.resize((40, 40)).save(larger, "JPEG")
    write(root, {**pictures, "ant/turned.jpg": turned.getvalue(), "ant/larger.jpg": larger.getvalue()})
    made(here.store, root, storage="encoded")
    stored = b"".join(here.store.get(key)[0] for key in keys(here.store, "shards/"))
    assert all(body in stored for body in pictures.values())
    assert turned.getvalue() not in stored
    assert larger.getvalue() not in stored


def test_the_shards_of_a_night_have_images_of_every_class(here: Workspace, ref: DatasetRef) -> None:
    dataset = open_dataset(here, ref)
    shards = images_of(dataset).shards
    assert set(shards.tolist()) == set(range(8))
    for shard in range(8):
        assert set(dataset.train_labels[shards == shard].tolist()) == {0, 1, 2}


def test_every_batch_is_the_same_for_any_ranks_threads_and_cache(
    here: Workspace, ref: DatasetRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightshift.data.batches._WINDOW", 50)
    config = small_config("quick", batch_size=16, epochs=3, crop=0.5, mixup=0.2, flip="random", translate=2)
    dataset = open_dataset(here, ref)
    plan = make_plan(config, dataset)
    expected = [training_batch(dataset, config, plan, step) for step in range(plan.total_steps)]
    for world in (1, 2, 4):
        for threads in (1, 3, 8):
            home = tmp_path / f"{world} {threads}" if threads != 3 else here.home
            ranks = [Ranks(rank, world) for rank in range(world)]
            mine = open_dataset(replace(here, home=home), ref, threads)
            begin = 0 if world != 2 else 17  # as after a kill
            readers = [Batches(mine, config, plan, rank.share_of) for rank in ranks]
            for step in range(begin, plan.total_steps):
                shares = [reader.batch(step) for reader in readers]
                for found, wanted in zip(zip(*shares, strict=True), expected[step], strict=True):
                    assert torch.equal(torch.cat(found), wanted), (world, threads, step)


def test_an_epoch_shows_each_image_once_and_reads_one_window_after_the_other(
    here: Workspace, ref: DatasetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nightshift.data.batches._WINDOW", 50)
    config = small_config("quick", batch_size=16, epochs=3, drop_last=False)
    dataset = open_dataset(here, ref)
    plan, shards = make_plan(config, dataset), images_of(dataset).shards
    orders = [epoch_order(plan, 0, epoch) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(plan.images))
        read = [set(part.tolist()) for part in torch.split(shards[order], 30)]
        assert not read[0] & read[-2]
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(torch.cat([batch_indices(plan, 0, step) for step in range(plan.steps_per_epoch)]), orders[0])


@pytest.mark.parametrize("what", ["changed", "cut", "empty", "another"])
def test_a_shard_that_is_damaged_on_this_machine_is_fetched_again(here: Workspace, ref: DatasetRef, what: str) -> None:
    expected = open_dataset(here, ref).train_images[:]
    for path in (here.home / "shards").iterdir():
        body = path.read_bytes()
        if path.suffix != ".lock":
            path.write_bytes(
                {"changed": bytes(len(body)), "cut": body[:100], "empty": b"", "another": body[::-1]}[what]
            )
    assert torch.equal(open_dataset(here, ref).train_images[:], expected)


@pytest.mark.parametrize("what", ["changed", "gone"])
def test_a_shard_that_is_damaged_in_the_store_is_named_and_never_trained_on(
    here: Workspace, ref: DatasetRef, tmp_path: Path, what: str
) -> None:
    for key in keys(here.store, "shards/"):
        body = bytearray(here.store.get(key)[0])
        body[len(body) // 2] ^= 1
        here.store.put(key, bytes(body)) if what == "changed" else here.store.delete(key)
    with pytest.raises(DataCorruptError, match="datasets/shards/"):
        open_dataset(replace(here, home=tmp_path / "other"), ref)


def test_a_store_that_is_away_is_waited_for(here: Workspace, ref: DatasetRef, tmp_path: Path, told: Told) -> None:
    expected = open_dataset(here, ref).train_images[:]

    class Away(MemoryStore):
        refusals = 0

        def download(self, *arguments: object, **more: object) -> None:
            Away.refusals += 1
            if Away.refusals < 4:
                raise StorageUnreachableError("it does not answer")
            here.store.download(*arguments, **more)  # type: ignore[arg-type]

    for path in (here.home / "shards").iterdir():
        path.unlink()
    assert torch.equal(open_dataset(replace(here, store=Away()), ref).train_images[:], expected)
    assert any("waited for: it does not answer" in warning for warning in told.warnings)


def test_no_more_shards_are_kept_than_may_be_and_the_pixels_are_the_same(
    here: Workspace, ref: DatasetRef, tmp_path: Path
) -> None:
    expected = open_dataset(here, ref).train_images[:]
    sizes = [len(here.store.get(key)[0]) for key in keys(here.store, "shards/")]
    few = replace(here, home=tmp_path / "few", cache_gigabytes=2.5 * max(sizes) / 1e9)
    assert torch.equal(open_dataset(few, ref).train_images[:], expected)
    kept = [path for path in (few.home / "shards").iterdir() if path.suffix != ".lock"]
    assert sum(path.stat().st_size for path in kept) <= 2.5 * max(sizes)
    assert torch.equal(open_dataset(few, ref).train_images[:], expected)


def test_a_disk_without_room_is_waited_for_and_costs_no_image(
    here: Workspace, ref: DatasetRef, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = open_dataset(here, ref).train_images[:]
    other = replace(here, home=tmp_path / "other")
    complete, is_full = complete_file, [True, True]

    def no_room(path: Path) -> Any:
        if len(list(path.parent.glob("?" * 64))) >= 3 and is_full:
            raise OSError(errno.ENOSPC, f"no room {is_full.pop()}")
        return complete(path)

    monkeypatch.setattr(shards, "complete_file", no_room)
    assert torch.equal(open_dataset(other, ref).train_images[:], expected)
    assert not is_full


def test_validation_and_test_images_are_read_shard_by_shard(here: Workspace, ref: DatasetRef) -> None:
    images = images_of(open_dataset(here, ref))
    order = images.shards[images.order].tolist()
    assert order == sorted(order)
    parts = [list(in_parts(images, 30, rank, 3)) for rank in range(3)]
    numbers = [number for rank in parts for some, _ in rank for number in some.tolist()]
    assert sorted(numbers) == list(range(len(images)))
    assert torch.equal(few(images, 5), images[images.order[:5]])


@pytest.mark.parametrize("what", ["shards", "classes"])
def test_rows_that_name_what_the_manifest_does_not_are_told_in_a_sentence(
    here: Workspace, ref: DatasetRef, tmp_path: Path, what: str
) -> None:
    manifest, _ = read_rows(here.store, ref.name, ref.digest)
    less = {"shards": manifest.shards[1:]} if what == "shards" else {"classes": {"ant": 200}}
    here.store.delete(manifest_key(ref.name, ref.digest))
    write_manifest(here.store, manifest.changed(**less))
    with pytest.raises(DataCorruptError, match="rows and its manifest do not match"):
        open_dataset(replace(here, home=tmp_path / "other"), ref)


def test_an_image_that_is_read_again_lies_where_it_lay(here: Workspace, ref: DatasetRef, root: Path) -> None:
    expected = open_dataset(here, ref).train_images[:]
    for path in sorted(root.rglob("*.png"))[:3]:
        os.utime(path, (0, 0))
    again = made(here.store, root, storage="encoded")
    assert (again.digest, again.read) == (ref.digest, 3)
    manifest, rows = read_rows(here.store, ref.name, ref.digest)
    assert {shard.hex() for shard in rows["shard"].to_pylist()} == set(manifest.shards)
    assert made(here.store, root, storage="encoded").read == 0
    other = replace(here, home=here.home / "other")
    assert torch.equal(open_dataset(other, ref).train_images[:], expected)


def test_threads_and_machines_that_share_too_little_room_see_no_other_image(
    here: Workspace, ref: DatasetRef, tmp_path: Path
) -> None:
    expected = open_dataset(here, ref).train_images[:]
    none = replace(here, home=tmp_path / "none", cache_gigabytes=0)
    several = [images_of(open_dataset(none, ref, 4)) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            found = list(pool.map(lambda images: images[torch.randperm(len(images)).argsort()], several))
            assert all(len(images) == len(expected) for images in found)
    assert all(torch.equal(images[:], expected) for images in several)


def test_an_interrupted_process_does_not_wait_for_the_store(
    here: Workspace, ref: DatasetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Away(MemoryStore):
        def download(self, *arguments: object, **more: object) -> None:
            raise StorageUnreachableError("it does not answer")

    dataset = open_dataset(here, ref)
    for path in (here.home / "shards").iterdir():
        path.unlink()
    images = images_of(open_dataset(replace(here, store=Away(), save_retry_seconds=600), ref))
    pending = images.begin(torch.arange(len(dataset.train_images)))

    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pending.parts[0], "result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pending.wait()
    monkeypatch.undo()
    for part in pending.parts:
        assert part.cancelled() or isinstance(part.exception(timeout=30), StorageUnreachableError | CancelledError)
