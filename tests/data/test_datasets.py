"""The packed data set: whole or not at all, the same bytes everywhere, and mended where it is damaged."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, load_file, save, save_file

from nightshift.data.datasets import fetch, open_dataset, pack
from nightshift.data.specs import Arrays, Spec
from nightshift.errors import DataCorruptError, DataUnavailableError
from nightshift.refs import DatasetRef, RawRef
from nightshift.workspace import Workspace
from tests.data.conftest import Told, cache, files, no_source, provide


@pytest.fixture(scope="module")
def arrays(packed: Path) -> Arrays:
    return load_file(packed)


# Damage


def flip_in_the_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def flip_in_the_statistics(content: bytes) -> bytes:
    digit = content.index(b"mean") + len(rb"mean\": [")
    return content[:digit] + bytes([content[digit] ^ 1]) + content[digit + 1 :]


damaged = pytest.mark.parametrize(
    "damage",
    [flip_in_the_middle, flip_in_the_statistics, lambda content: content[:-1], lambda content: b""],
    ids=["a flipped bit", "a flipped bit in the statistics", "cut short", "empty"],
)


@damaged
def test_a_damaged_cache_is_noticed_warned_of_and_fetched_again_from_the_bucket(
    fresh: Workspace, small: Spec, told: Told, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes]
) -> None:
    ref, path = provide(fresh, "small"), cache(fresh, small)
    no_source(monkeypatch)
    whole = path.read_bytes()
    for again in (
        lambda: fetch(fresh, "small"),
        lambda: pack(fresh, RawRef(name="small", digest=small.digest, source="cache")),
        lambda: open_dataset(fresh, ref),
    ):
        told.warnings.clear()
        path.write_bytes(damage(whole))
        again()
        assert path.read_bytes() == whole
        assert [str(path) in warning and "fetching it again" in warning for warning in told.warnings] == [True]
    assert files(fresh) == [path.name]


@damaged
def test_a_damaged_object_in_the_bucket_is_not_used_and_is_replaced(
    fresh: Workspace, small: Spec, told: Told, damage: Callable[[bytes], bytes]
) -> None:
    provide(fresh, "small")
    path = cache(fresh, small)
    whole = path.read_bytes()
    path.unlink()
    fresh.store.put(small.key, damage(whole))
    ref = provide(fresh, "small")
    assert ref.source == "elsewhere"
    assert path.read_bytes() == fresh.store.get(small.key)[0] == whole
    assert any(fresh.store.url(small.key) in warning for warning in told.warnings)
    assert files(fresh) == [path.name]


def packed_otherwise(spec: Spec, content: bytes, change: Callable[[Arrays, dict[str, str]], object]) -> bytes:
    """The packed data set with something changed, all whose digests are right."""
    arrays = load(content)
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    change(arrays, metadata)
    return save(arrays, metadata)


def flatten(arrays: Arrays, metadata: dict[str, str]) -> None:
    arrays["train_images"] = arrays["train_images"].reshape(-1)


def retype(arrays: Arrays, metadata: dict[str, str]) -> None:
    arrays["test_labels"] = arrays["test_labels"].view(np.int8)


@pytest.mark.parametrize(
    "change",
    [
        flatten,
        retype,
        lambda arrays, metadata: arrays.pop("test_images"),
        lambda arrays, metadata: metadata.clear(),
        lambda arrays, metadata: metadata.update(nightshift="[]"),
        lambda arrays, metadata: metadata.update(nightshift="[" * 100_000),
        lambda arrays, metadata: metadata.update(more="x" * 1024**2),
    ],
    ids=[
        "another shape",
        "another dtype",
        "an array fewer",
        "no facts",
        "facts that are a list",
        "facts without end",
        "a header that is too long",
    ],
)
def test_a_packed_data_set_that_says_something_else_is_not_used(
    fresh: Workspace, small: Spec, told: Told, change: Callable[[Arrays, dict[str, str]], object]
) -> None:
    provide(fresh, "small")
    path = cache(fresh, small)
    fresh.store.put(small.key, packed_otherwise(small, path.read_bytes(), change))
    path.unlink()
    assert fetch(fresh, "small").source == "elsewhere"
    assert any(fresh.store.url(small.key) in warning for warning in told.warnings)


def test_what_is_far_larger_than_a_data_set_does_not_fill_the_disk(
    fresh: Workspace, small: Spec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    provide(fresh, "small")
    path = cache(fresh, small)
    monkeypatch.setattr("nightshift.data.datasets._MAX_BYTES", path.stat().st_size - 1)
    path.unlink()
    assert fetch(fresh, "small").source == "elsewhere"
    assert any("more than the" in warning for warning in told.warnings)


def test_one_machines_bad_disk_does_not_delete_the_data_set_of_all(
    fresh: Workspace, small: Spec, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = provide(fresh, "small")
    stored = fresh.store.head(ref.key)
    cache(fresh, small).unlink()

    def damaged_on_arrival(spec: Spec, path: Path) -> None:
        raise DataCorruptError("a bit has flipped on this disk")

    monkeypatch.setattr("nightshift.data.datasets._check_packed", damaged_on_arrival)
    with pytest.raises(DataUnavailableError):
        open_dataset(fresh, ref)
    assert fresh.store.head(ref.key) == stored
    assert [warning.rpartition(": ")[2] for warning in told.warnings] == [
        "fetching it once more",
        "trying the next source",
    ]


def test_raw_arrays_with_a_wrong_digest_get_neither_into_the_bucket_nor_into_the_cache(
    fresh: Workspace, small: Spec
) -> None:
    raw = fetch(fresh, "small")
    path = fresh.home / "datasets" / f"{small.digest}.raw.npz"
    with np.load(path) as stored:
        wrong = dict(stored)
    wrong["test_labels"][7] ^= 1
    np.savez(path, **wrong)
    with pytest.raises(DataCorruptError, match=r"^test_labels of small"):
        pack(fresh, raw)
    assert list(fresh.store.list("")) == []
    assert files(fresh) == [path.name]


@pytest.mark.parametrize("changed", [{"mean": [0.0, 0.0, 0.0]}, {"std": [1.0, 1.0, 1.0]}, {"classes": ["all"] * 10}])
def test_facts_that_somebody_has_changed_and_sealed_are_not_used(
    fresh: Workspace, small: Spec, told: Told, changed: dict[str, Any]
) -> None:
    provide(fresh, "small")
    path = cache(fresh, small)
    with safe_open(path, framework="np") as file:
        facts = {**json.loads(file.metadata()["nightshift"]), **changed}
    del facts["sha256"]
    facts["sha256"] = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    save_file(load_file(path), path, metadata={"nightshift": json.dumps(facts)})
    fresh.store.put(small.key, path.read_bytes())
    dataset = open_dataset(fresh, provide(fresh, "small"))
    assert dataset.classes == small.classes
    assert dataset.mean[0] > 100
    assert dataset.std[0] > 10
    assert any("are not the known ones" in warning for warning in told.warnings)


# The packed data set


def test_packing_twice_stores_once(fresh: Workspace, small: Spec, told: Told) -> None:
    raw = fetch(fresh, "small")
    first = pack(fresh, raw)
    stored = fresh.store.head(first.key)
    assert pack(fresh, raw) == first
    assert fresh.store.head(first.key) == stored
    assert told.transfers.count("storing small") == 1


def test_two_machines_pack_the_same_raw_data_to_the_same_bytes(
    workspace: Workspace, small: Spec, tmp_path: Path
) -> None:
    packs = []
    for name in ("one", "two"):
        machine = replace(workspace, home=tmp_path / name)
        ref = provide(machine, "small")
        packs.append(cache(machine, small).read_bytes())
        assert workspace.store.get(ref.key)[0] == packs[-1]
        workspace.store.delete(ref.key)
    assert packs[0] == packs[1]


def test_another_machine_can_pack_what_this_one_fetched(fresh: Workspace, small: Spec, tmp_path: Path) -> None:
    raw = fetch(fresh, "small")
    ref = pack(replace(fresh, home=tmp_path / "other"), raw)
    assert fresh.store.head(ref.key) is not None
    assert ref.source == "elsewhere"


def test_the_packed_object_has_all_images_labels_class_names_and_statistics(packed: Path, arrays: Arrays) -> None:
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "train_images": ("uint8", (50_000, 32, 32, 3)),
        "train_labels": ("uint8", (50_000,)),
        "test_images": ("uint8", (10_000, 32, 32, 3)),
        "test_labels": ("uint8", (10_000,)),
    }
    with safe_open(packed, framework="np") as file:
        facts = json.loads(file.metadata()["nightshift"])
    assert ", ".join(facts["classes"]) == "airplane, automobile, bird, cat, deer, dog, frog, horse, ship, truck"
    channels = [arrays["train_images"][..., channel] for channel in range(3)]
    np.testing.assert_allclose(facts["mean"], [channel.mean(dtype=np.float64) for channel in channels], rtol=1e-9)
    np.testing.assert_allclose(facts["std"], [channel.std(dtype=np.float64) for channel in channels], rtol=1e-9)
    assert set(np.bincount(arrays["train_labels"])) == {5000}
    assert set(np.bincount(arrays["test_labels"])) == {1000}


def test_an_open_data_set_is_the_packed_one_mapped_into_memory(
    workspace: Workspace, cifar10: DatasetRef, packed: Path, arrays: Arrays
) -> None:
    dataset = open_dataset(workspace, cifar10)
    spans = [
        range(*(int(bound, 16) for bound in line.split()[0].split("-")))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(packed))
    ]
    for name, array in arrays.items():
        tensor = getattr(dataset, name)
        assert any(tensor.data_ptr() in span for span in spans), f"{name} is not in the mapped file"
        assert np.array_equal(tensor.numpy(), array)
    assert (dataset.name, dataset.digest, len(dataset.classes)) == ("cifar10", cifar10.digest, 10)


def test_a_machine_without_the_data_opens_it_from_the_store(
    fresh: Workspace, small: Spec, few: Arrays, tmp_path: Path
) -> None:
    ref = provide(fresh, "small")
    dataset = open_dataset(replace(fresh, home=tmp_path / "other"), ref)
    assert np.array_equal(dataset.test_images.numpy(), few["test_images"])


def test_a_data_set_that_is_gone_from_here_and_from_the_store_is_told_as_such(fresh: Workspace, small: Spec) -> None:
    ref = provide(fresh, "small")
    cache(fresh, small).unlink()
    fresh.store.delete(ref.key)
    with pytest.raises(DataUnavailableError, match="start the run again") as caught:
        open_dataset(fresh, ref)
    assert fresh.store.url(ref.key) in str(caught.value)
