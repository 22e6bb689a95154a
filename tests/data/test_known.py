"""CIFAR-10 and what else is known by content: a snapshot like any other, always the same, and mended if damaged."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from nightshift.data.datasets import channel_statistics, open_dataset
from nightshift.data.known import fetch
from nightshift.data.specs import SPECS, Arrays, Spec
from nightshift.data.stored import read_rows
from nightshift.errors import ConfigError, DataUnavailableError
from nightshift.records.snapshots import read_history
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.data.conftest import Told, cache, files, no_source, provide, raw


@pytest.fixture(scope="module")
def arrays(packed: Path) -> Arrays:
    return load_file(packed)


def of_before(spec: Spec) -> DatasetRef:
    """What a run of before there were snapshots names."""
    return DatasetRef(name=spec.name, digest=spec.digest, key=spec.key, source="bucket")


def same(fresh: Workspace, ref: DatasetRef, few: Arrays) -> bool:
    dataset = open_dataset(fresh, ref)
    return all(np.array_equal(getattr(dataset, name).numpy(), array) for name, array in few.items())


# The snapshot


def test_every_machine_makes_the_same_snapshot(workspace: Workspace, small: Spec, few: Arrays, tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        machine = replace(workspace, home=tmp_path / name)
        made = fetch(machine, "small")
        digests.append(made.digest)
        assert (made.images, made.read, made.refused) == (600, 600, 0)
        machine.store.delete("datasets/small/history.json")
    assert digests[0] == digests[1]


def test_the_second_who_needs_it_reads_nothing(
    fresh: Workspace, small: Spec, few: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = provide(fresh, "small")
    no_source(monkeypatch)
    other = replace(fresh, home=tmp_path / "other")
    assert provide(other, "small") == ref
    assert files(other) == [cache(other, ref).name]
    assert same(other, ref, few)


def test_its_rows_say_what_those_of_a_teams_own_images_say(fresh: Workspace, small: Spec, few: Arrays) -> None:
    made = fetch(fresh, "small")
    _, rows = read_rows(fresh.store, "small", made.digest)
    row = rows.slice(123, 1).to_pylist()[0]
    assert (row["id"], row["split"], row["width"]) == ("train/00023", "train", 32)
    assert row["label"] == small.classes[few["train_labels"][23]]
    assert row["pixels"] == hashlib.sha256(few["train_images"][23].tobytes()).digest()


def test_its_images_are_in_the_order_in_which_they_always_were(
    workspace: Workspace, cifar10: DatasetRef, packed: Path, arrays: Arrays
) -> None:
    """So a run with the same config ends with the bits it ended with before there were snapshots."""
    spec = SPECS["cifar10"]
    spec.check(arrays)
    assert tuple(sorted(spec.classes)) == spec.classes
    dataset = open_dataset(workspace, cifar10)
    assert dataset.classes == spec.classes
    before = open_dataset(workspace, of_before(spec))
    assert (before.classes, before.mean, before.std) == (dataset.classes, dataset.mean, dataset.std)
    for name in spec.sha256:
        assert getattr(dataset, name).equal(getattr(before, name))


def test_statistics_are_those_of_the_training_images(arrays: Arrays) -> None:
    mean, std = channel_statistics([arrays["train_images"]])
    channels = [arrays["train_images"][..., channel] for channel in range(3)]
    np.testing.assert_allclose(mean, [channel.mean(dtype=np.float64) for channel in channels], rtol=1e-9)
    np.testing.assert_allclose(std, [channel.std(dtype=np.float64) for channel in channels], rtol=1e-9)


def test_an_open_data_set_is_the_packed_one_mapped_into_memory(
    workspace: Workspace, cifar10: DatasetRef, packed: Path, arrays: Arrays
) -> None:
    dataset = open_dataset(workspace, cifar10)
    spans = [
        range(*(int(bound, 16) for bound in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(packed))
    ]
    for name in ("train_images", "test_images"):
        tensor = getattr(dataset, name)
        assert any(tensor.data_ptr() in span for span in spans), f"{name} is not in the mapped file"
        assert np.array_equal(tensor.numpy(), arrays[name])
    assert (dataset.name, dataset.digest) == ("cifar10", cifar10.digest)


# Damage


def flip(body: bytes) -> bytes:
    return body[:-5] + bytes([body[-5] ^ 1]) + body[-4:]


@pytest.mark.parametrize("damage", [flip, lambda body: body[:-1], None], ids=["a flipped bit", "cut short", "gone"])
@pytest.mark.parametrize("what", ["shards/", "snapshots/"])
def test_what_is_damaged_or_gone_in_the_store_is_stored_anew(
    fresh: Workspace, small: Spec, few: Arrays, told: Told, what: str, damage: Callable[[bytes], bytes] | None
) -> None:
    store, ref = fresh.store, provide(fresh, "small")
    stored = {item.key: store.get(item.key)[0] for item in store.list("datasets/")}
    for key, body in stored.items():
        if what in key and not key.endswith(".json"):
            store.put(key, damage(body)) if damage else store.delete(key)
    cache(fresh, ref).unlink()
    assert provide(fresh, "small") == ref
    assert {item.key: store.get(item.key)[0] for item in store.list("datasets/")} == stored
    assert any("the snapshot of small is stored anew" in warning for warning in told.warnings)
    assert same(fresh, ref, few)


def test_another_snapshot_under_its_name_is_not_trained_on(
    fresh: Workspace, small: Spec, few: Arrays, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever can write to the bucket can store one; what it must be stands in the code."""
    other = {**few, "test_labels": (few["test_labels"] + 1) % 10}
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in other.items()}
    with monkeypatch.context() as patch:
        patch.setitem(SPECS, "small", replace(small, sha256=sums))
        patch.setattr("nightshift.data.sources.cifar10.OUTSIDE_SOURCES", {"theirs": lambda scratch: other})
        theirs = provide(fresh, "small")
    ours = provide(fresh, "small")
    assert ours.digest != theirs.digest
    assert "test_labels of small do not have the known sha256" in "".join(told.warnings)
    assert same(fresh, ours, few)
    assert [entry.digest for entry in read_history(fresh.store, "small").entries] == [theirs.digest, ours.digest]


def test_a_damaged_copy_on_this_machine_is_packed_again(
    fresh: Workspace, small: Spec, few: Arrays, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = provide(fresh, "small")
    no_source(monkeypatch)
    path = cache(fresh, ref)
    path.write_bytes(flip(path.read_bytes()))
    assert same(fresh, ref, few)
    assert "packing it again" in told.warnings[0]


# What an older nightshift has stored


def test_a_run_of_before_there_were_snapshots_goes_on_with_what_its_store_has(
    fresh: Workspace, small: Spec, few: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_source(monkeypatch)
    fresh.store.put(small.key, save(few))
    assert same(fresh, of_before(small), few)
    dataset = open_dataset(fresh, of_before(small))
    assert (dataset.classes, dataset.resize, dataset.test_content) == (small.classes, "stretch", None)
    assert [item.key for item in fresh.store.list("")] == [small.key]


def test_such_a_run_goes_on_though_its_object_is_gone(fresh: Workspace, small: Spec, few: Arrays) -> None:
    assert same(fresh, of_before(small), few)
    assert files(fresh) == [raw(fresh, small).name]


def test_a_store_of_before_there_were_snapshots_needs_no_source_outside(
    fresh: Workspace, small: Spec, few: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_source(monkeypatch)
    fresh.store.put(small.key, save(few))
    assert same(fresh, provide(fresh, "small"), few)


# No data


def test_without_any_place_that_has_it_nothing_is_stored(
    fresh: Workspace, small: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_source(monkeypatch)
    with pytest.raises(DataUnavailableError, match="no source has small"):
        provide(fresh, "small")
    assert list(fresh.store.list("")) == []


def test_an_unknown_data_set_is_refused_with_the_known_ones(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"'mnist'.*cifar10"):
        fetch(workspace, "mnist")
