"""A team's own images, as a user trains on them: a folder, a prefix or a table, night after night."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nightshift.data.datasets import Dataset, open_dataset
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.commands import Command, Finished
from tests.conftest import eventually
from tests.own_images import EVERY_NIGHT, has_saved, write_images

FAST = ("--set", "epochs=1", "--json")


@pytest.fixture(scope="session")
def cifar(home: Path, server: object, cifar10: DatasetRef) -> Dataset:
    return open_dataset(Workspace(server, home, 60, 5), cifar10)  # type: ignore[arg-type]


def write(root: Path, cifar: Dataset, numbers: range) -> list[str]:
    """CIFAR-10's training images by number in one folder a class: PNG, and each tenth as JPEG. Returns their names."""
    names = []
    for number in numbers:
        label = cifar.classes[int(cifar.train_labels[number])]
        path = root / label / f"{number:05}.{'png' if number % 10 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(cifar.train_images[number])).save(path, quality=95)
        names.append(f"{label}/{path.name}")
    return names


def spoil(root: Path, names: list[str], broken: int, copies: int) -> None:
    """Break some images, and copy some others within their class."""
    for name in names[:broken]:
        (root / name).write_bytes((root / name).read_bytes()[:200])
    for name in names[broken : broken + copies]:
        (root / name).with_stem(f"{Path(name).stem}-copy").write_bytes((root / name).read_bytes())


@pytest.mark.soak
def test_ten_thousand_images_are_trained_on_wherever_they_lie_and_the_bad_ones_are_named(
    nightshift: Callable[..., Finished], workspace: Workspace, tmp_path: Path, cifar: Dataset
) -> None:
    root, images, broken = tmp_path / "photos", 10_000, 20
    names = write(root, cifar, range(images))
    spoil(root, names, broken, copies=5 * broken // 2)
    files = sorted(path for path in root.rglob("*.*g"))
    rows = [f"{path.relative_to(root)},{path.parent.name}\n" for path in files]
    (root / "labels.csv").write_text("".join(["image,label\n", *rows]))
    for path in files:
        workspace.store.put(f"photos/{path.relative_to(root)}", path.read_bytes())
    done = nightshift("train", "--images", str(root), *FAST)
    assert done.exit_code == 0, done.err
    summary = done.json
    assert (summary["status"], summary["champion"]["version"]) == ("finished", summary["run_id"])
    assert summary["snapshot"] == read_record(workspace.store, summary["run_id"])[0].dataset.digest
    checked = nightshift("data", "check", str(root), "--json").json
    assert {item["image"] for item in checked["unreadable"]} == set(names[:broken])
    assert checked["duplicates"] == 5 * broken // 2
    assert sum(checked["splits"].values()) == checked["images"] == images - broken + 5 * broken // 2
    digests = {
        nightshift("data", "snapshot", str(place), "--json").json["digest"]
        for place in (workspace.store.url("photos"), root / "labels.csv")
    }
    assert digests == {summary["snapshot"]}


def test_a_night_with_nothing_new_trains_nothing_one_with_more_images_does_and_an_earlier_one_can_be_had_again(
    nightshift: Callable[..., Finished], tmp_path: Path, cifar: Dataset, prefect_api: str
) -> None:
    def night(*options: str) -> Finished:
        return nightshift("train", "--images", str(tmp_path / "photos"), *FAST, *options, PREFECT_API_URL=prefect_api)

    write(tmp_path / "photos", cifar, range(200))
    first, second = night(), night()
    assert second.json["run_id"] == first.json["run_id"]
    assert f"nothing has changed since {first.json['run_id']}" in second.err
    write(tmp_path / "photos", cifar, range(200, 220))
    third = night()
    assert third.json["run_id"] != first.json["run_id"]
    assert third.json["snapshot"] != first.json["snapshot"]
    compared, (whole, *_) = third.json["verdict"]["comparison"], third.json["verdict"]["guards"]
    assert compared["champion"] == first.json["run_id"]
    assert (whole["kind"], whole["images"], whole["difference"]) == (
        "whole",
        compared["images"],
        compared["difference"],
    )
    assert f"testing {first.json['run_id']} on tonight's images" in third.err
    drift = nightshift("show", third.json["run_id"], "--json").json["drift"]
    assert (drift["champion"], drift["came_in"]["images"], drift["problems"]) == (first.json["run_id"], 20, [])
    shutil.rmtree(tmp_path / "photos")
    again = night("--snapshot", first.json["snapshot"][:12], "--set=epochs=1")
    assert (again.json["status"], again.json["snapshot"]) == ("finished", first.json["snapshot"])


@pytest.mark.parametrize("storage", ["encoded", pytest.param("pixels", marks=pytest.mark.soak)])
def test_a_run_that_was_killed_ends_with_its_own_bits_though_images_came_and_the_project_file_went(
    storage: str,
    start: Callable[..., Command],
    nightshift: Callable[..., Finished],
    workspace: Workspace,
    tmp_path: Path,
    prefect_api: str,
) -> None:
    (tmp_path / "nightshift.toml").write_text(EVERY_NIGHT.replace("image_size", f'storage = "{storage}"\nimage_size'))
    write_images(tmp_path, range(150))
    train = ("train", "--recipe=parts", "--set=epochs=20", "--json")
    whole = nightshift(*train, "--run-id=whole", PREFECT_API_URL=prefect_api)
    assert whole.exit_code == 0, whole.err

    killed = start(*train, "--run-id=killed", PREFECT_API_URL=prefect_api)
    eventually(partial(has_saved, workspace.store, "killed"))
    killed.kill()
    write_images(tmp_path, range(150, 180))
    (tmp_path / "nightshift.toml").unlink()
    recovered = nightshift("recover", "--json", PREFECT_API_URL=prefect_api)
    assert recovered.json["started"] == ["killed"], recovered.err
    record, _ = read_record(workspace.store, "killed")
    assert [event.what for event in record.events] == ["started", "recovered", "resumed", "finished"]
    assert record.dataset.digest == whole.json["snapshot"]
    assert record.result
    assert record.result.weights_sha256 == whole.json["weights_sha256"]
