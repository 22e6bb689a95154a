"""Starts: a run begins with the weights its record names, whatever became of their place and of the champion since."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from models import build_model
from nightshift import networks
from nightshift.checkpoints.payload import read_payload, weights_sha256
from nightshift.config.train import TrainConfig
from nightshift.data.datasets import open_dataset
from nightshift.errors import ConfigError, DataCorruptError, DataUnavailableError, TrainingInterrupted
from nightshift.records import orphans
from nightshift.records.champions import promote_by_hand
from nightshift.records.parents import Parent
from nightshift.records.run import RunRecord, read_record
from nightshift.records.versions import publish_version
from nightshift.refs import DatasetRef
from nightshift.training import starts
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.made_up import NAME, config_of, in_memory, known
from tests.records.test_orphans import NOW
from tests.records.test_versions import card_of

SIZE, CLASSES = 16, 3


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return in_memory(tmp_path)


@pytest.fixture
def ref(workspace: Workspace) -> DatasetRef:
    return known(workspace, SIZE, CLASSES, train=48)


def weights_of(seed: int, classes: int = CLASSES, name: str = "quick_cnn", size: int = SIZE) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_model(name, classes, size).state_dict()


def go_live(workspace: Workspace, version: str, seed: int, **changed: Any) -> None:
    """Publish weights that nobody has trained, and make them the champion."""
    config = config_of().model_dump()
    card = {"name": NAME, "architecture": "quick_cnn", "classes": ("a", "b", "c"), "image_size": SIZE, **changed}
    weights = save(weights_of(seed, len(card["classes"])))
    publish_version(workspace.store, card_of(version, config=config, **card), {"weights.safetensors": weights})
    promote_by_hand(workspace.store, NAME, version)


def small(start: str, **more: Any) -> TrainConfig:
    return config_of(start=start, epochs=2, **more)


def end_of(workspace: Workspace, run_id: str, config: TrainConfig, ref: DatasetRef) -> str:
    """sha256 over every bit a run ends with."""
    return state_sha256(read_payload(workspace.store, train_alone(workspace, run_id, config, ref)))


def record_of(workspace: Workspace, run_id: str = "run") -> RunRecord:
    return read_record(workspace.store, run_id)[0]


def stop_at(workspace: Workspace, run_id: str, config: TrainConfig, ref: DatasetRef, step: int) -> None:
    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, run_id, config, ref, should_stop=lambda done: done == step)


def begun(workspace: Workspace, ref: DatasetRef, config: TrainConfig, classes: tuple[str, ...] = ()) -> nn.Module:
    """The network with the weights that a run with this config begins with."""
    dataset = open_dataset(workspace, ref)
    dataset = replace(dataset, classes=classes) if classes else dataset
    torch.manual_seed(config.seed)
    network = build_model(config.model.name, len(dataset.classes), SIZE)
    parent = starts.parent_of(workspace.store, "new", config, dataset)
    assert parent
    starts.begin(workspace.store, parent, config, dataset, network)
    return network


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "others.pth"
    torch.save(weights_of(7, classes=10), path)
    return path


@pytest.mark.parametrize("start", ["pretrained", "champion", "shrink"])
def test_a_stopped_run_ends_with_the_same_bits_whatever_it_began_with(
    workspace: Workspace, ref: DatasetRef, file: Path, start: str
) -> None:
    go_live(workspace, "first", seed=1)
    config = small(start, weights=str(file))
    whole = end_of(workspace, "whole", config, ref)
    assert whole != end_of(workspace, "scratch", small("scratch"), ref)
    stop_at(workspace, "run", config, ref, 4)
    go_live(workspace, "second", seed=2)
    file.unlink()
    assert end_of(workspace, "run", config, ref) == whole
    parent = record_of(workspace).parent
    assert parent
    assert (parent.kind, parent.source) == (start, str(file) if start == "pretrained" else "first")
    assert parent == record_of(workspace, "whole").parent


@pytest.mark.parametrize("start", ["pretrained", "champion"])
def test_a_run_killed_before_its_first_checkpoint_begins_with_the_same_parent_again(
    workspace: Workspace, ref: DatasetRef, file: Path, start: str
) -> None:
    go_live(workspace, "first", seed=1)
    config = small(start, weights=str(file))
    whole = end_of(workspace, "whole", config, ref)

    def crash(step: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_alone(workspace, "run", config, ref, should_stop=crash)
    assert not record_of(workspace).checkpoints
    go_live(workspace, "second", seed=2)
    torch.save(weights_of(8), file)
    assert end_of(workspace, "run", config, ref) == whole


def test_a_relative_file_is_found_beside_the_project_file_or_where_the_command_is_typed(
    workspace: Workspace, ref: DatasetRef, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("NIGHTSHIFT_PROJECT", str(tmp_path / "project" / "nightshift.toml"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = small("pretrained", weights="w.pth")
    with pytest.raises(ConfigError, match="there is no such file here"):
        begun(workspace, ref, config)
    torch.save(weights_of(8), tmp_path / "elsewhere" / "w.pth")
    expected = sha256_of(begun(workspace, ref, small("pretrained", weights=str(file))))
    typed = sha256_of(begun(workspace, ref, config))
    assert typed != expected
    file.rename(tmp_path / "project" / "w.pth")
    assert sha256_of(begun(workspace, ref, config)) == expected


def sha256_of(network: nn.Module) -> str:
    return weights_sha256(network.state_dict())


def test_the_weights_of_a_file_are_those_of_the_network_but_for_a_head_of_another_size(
    workspace: Workspace, ref: DatasetRef, file: Path
) -> None:
    found, theirs = begun(workspace, ref, small("pretrained", weights=str(file))).state_dict(), weights_of(7, 10)
    fresh = weights_of(0)
    for name, value in found.items():
        expected = theirs[name] if theirs[name].shape == value.shape else fresh[name]
        assert torch.equal(value, expected)
    assert any(theirs[name].shape != value.shape for name, value in found.items())
    head = starts.parent_of(
        workspace.store, "new", small("pretrained", weights=str(file)), open_dataset(workspace, ref)
    )
    assert head
    assert head.detail.startswith("made anew: head")


def renamed(change: Callable[[str], str]) -> dict[str, Tensor]:
    return {change(name): value for name, value in weights_of(7).items()}


@pytest.mark.parametrize(
    ("names", "theirs"),
    [
        ("same", renamed(str)),
        ("order", renamed(lambda name: f"x{hash(name)}")),
        ("module.=", renamed(lambda name: f"module.{name}")),
        (
            "trunk.=,top.=head.",
            renamed(lambda name: name.replace("head.", "top.") if "head." in name else f"trunk.{name}"),
        ),
    ],
)
def test_names_in_the_file_may_be_other_ones(
    workspace: Workspace, ref: DatasetRef, tmp_path: Path, names: str, theirs: dict[str, Tensor]
) -> None:
    torch.save({"state_dict": theirs, "epoch": 3}, tmp_path / "f.pth")
    found = begun(workspace, ref, small("pretrained", weights=str(tmp_path / "f.pth"), names=names)).state_dict()
    assert all(torch.equal(value, found[name]) for name, value in weights_of(7).items())


@pytest.mark.parametrize("kind", ["safetensors", "before 2020", "s3"])
def test_a_file_of_any_kind_is_kept_by_its_sha256_and_the_next_night_needs_no_file(
    workspace: Workspace, ref: DatasetRef, tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "file"
    if kind == "safetensors":
        save_file(weights_of(7), place)
    else:
        torch.save(weights_of(7), place, _use_new_zipfile_serialization=False)
    where = str(place)
    if kind == "s3":
        workspace.store.put("theirs.pth", place.read_bytes())
        where = workspace.store.url("theirs.pth")
    config = small("pretrained", weights=where)
    first = end_of(workspace, "first", config, ref)
    place.unlink()
    workspace.store.delete("theirs.pth")
    assert end_of(workspace, "second", config, ref) == first
    parent = record_of(workspace, "second").parent
    assert parent
    assert [item.key for item in workspace.store.list("weights/")] == [f"weights/{parent.sha256}"]


def test_the_hub_is_asked_once(workspace: Workspace, ref: DatasetRef, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(name: str) -> dict[str, Tensor]:
        asked.append(name)
        return weights_of(7, classes=1000, name=name, size=32)

    monkeypatch.setattr(starts, "pretrained_weights", download)
    config = small("pretrained", model="torchvision:squeezenet1_1", weights="hub", optimizer="adamw", lr=1e-3)
    dataset = replace(open_dataset(workspace, ref), train_images=torch.zeros(4, 32, 32, 3, dtype=torch.uint8))
    found = [starts.parent_of(workspace.store, "a", config, dataset)]
    monkeypatch.setattr(starts, "newest_records", lambda store: iter([_Began(found[0])]))
    found.append(starts.parent_of(workspace.store, "b", config, dataset))
    assert asked == ["torchvision:squeezenet1_1"]
    assert found[0] == found[1]


class _Began:
    def __init__(self, parent: Parent | None) -> None:
        self.parent = parent


def test_a_hub_that_cannot_be_reached_is_told_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("<urlopen error no route to host>")

    monkeypatch.setattr("models.from_torchvision.pretrained", fail)
    with pytest.raises(DataUnavailableError, match=r"no route to host.* set start\.weights to a file"):
        networks.pretrained_weights("torchvision:resnet18")


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, {}, "there is no such file here"),
        (b"x" * 200, {}, "is neither a file of safetensors nor one of torch"),
        ({"epoch": 3}, {}, "holds no weights"),
        ({"a.weight": torch.zeros(2)}, {}, r"none of their names is one of the network's. Theirs are a.weight"),
        ({"a.weight": torch.zeros(2)}, {"names": "order"}, r"the file has 1 tensors, and the network has \d+"),
        (
            {**weights_of(7), "head.weight": torch.zeros(3, 5)},
            {},
            r"do not fit the network: they have head.weight \(3, 5\)",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_told_before_anything_is_recorded(
    workspace: Workspace, ref: DatasetRef, tmp_path: Path, content: object, more: dict[str, str], message: str
) -> None:
    path = tmp_path / "f.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        torch.save(content, path)
    with pytest.raises(ConfigError, match=message):
        train_alone(workspace, "run", small("pretrained", weights=str(path), **more), ref)
    assert not list(workspace.store.list("runs/"))


def test_a_pickle_that_calls_something_is_not_run(workspace: Workspace, ref: DatasetRef, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "it-was-run",)

    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": Attack()}))
    torch.save({"a": Attack()}, tmp_path / "new.pth")
    for name in ("old.pth", "new.pth"):
        with pytest.raises(ConfigError, match="holds weights only"):
            train_alone(workspace, "run", small("pretrained", weights=str(tmp_path / name)), ref)
    assert not (tmp_path / "it-was-run").exists()


@pytest.mark.parametrize(("body", "error"), [(None, DataUnavailableError), (b"x", DataCorruptError)])
def test_weights_that_are_gone_or_changed_in_the_store_are_not_begun_with(
    workspace: Workspace, ref: DatasetRef, file: Path, body: bytes | None, error: type[Exception]
) -> None:
    dataset, config = open_dataset(workspace, ref), small("pretrained", weights=str(file))
    parent = starts.parent_of(workspace.store, "run", config, dataset)
    assert parent
    key = f"weights/{parent.sha256}"
    workspace.store.delete(key)
    if body:
        workspace.store.put(key, body)
    with pytest.raises(error, match=key):
        starts.begin(workspace.store, parent, config, dataset, build_model("quick_cnn", CLASSES, SIZE))


def test_the_champions_classes_are_matched_by_name_and_a_new_one_keeps_its_random_weights(
    workspace: Workspace, ref: DatasetRef
) -> None:
    go_live(workspace, "first", seed=1, classes=("b", "c", "gone"))
    found = begun(workspace, ref, small("champion"), ("a", "b", "c", "d")).state_dict()
    theirs, fresh = weights_of(1), weights_of(0, 4)
    (head,) = (name for name, value in theirs.items() if value.shape != fresh[name].shape)
    expected = torch.stack([fresh[head][0], theirs[head][0], theirs[head][1], fresh[head][3]])
    assert torch.equal(found[head], expected)
    assert all(torch.equal(value, found[name]) for name, value in theirs.items() if name != head)


def test_shrunk_weights_are_a_share_of_the_champions_and_a_share_of_random_ones(
    workspace: Workspace, ref: DatasetRef
) -> None:
    go_live(workspace, "first", seed=1, classes=open_dataset(workspace, ref).classes)
    found = begun(workspace, ref, small("shrink", shrink=0.5, perturb=0.1))
    theirs, fresh = weights_of(1), weights_of(0)
    for name, value in found.named_parameters():
        expected = 0.5 * theirs[name] + 0.1 * fresh[name] if value.requires_grad else theirs[name]
        torch.testing.assert_close(value.detach(), expected)
    assert all(torch.equal(value, theirs[name]) for name, value in found.named_buffers())


def test_without_a_champion_a_run_begins_from_scratch_and_says_so(workspace: Workspace, ref: DatasetRef) -> None:
    assert end_of(workspace, "run", small("champion"), ref) == end_of(workspace, "scratch", small("scratch"), ref)
    assert record_of(workspace).events[0].detail == f"with random weights: {NAME} has no champion yet"
    assert record_of(workspace, "scratch").parent is None


def test_a_champion_of_another_network_is_told(workspace: Workspace, ref: DatasetRef) -> None:
    go_live(workspace, "first", seed=1, architecture="resnet18")
    with pytest.raises(ConfigError, match="first is a resnet18, and its weights are of no use to a quick_cnn"):
        train_alone(workspace, "run", small("champion"), ref)


def test_every_third_night_begins_from_scratch(
    workspace: Workspace, ref: DatasetRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(workspace, "made", small("scratch"), ref, 1)
    go_live(workspace, "first", seed=1)
    nights: list[RunRecord] = []
    monkeypatch.setattr(starts, "newest_records", lambda store: reversed(nights))
    dataset, kinds = open_dataset(workspace, ref), []
    for _ in range(7):
        parent = starts.parent_of(workspace.store, "new", small("champion", scratch_every=3), dataset)
        assert parent
        kinds.append(parent.kind)
        nights.append(record_of(workspace, "made").changed(status="finished", parent=parent))
        # Neither what did not finish nor a trial of a sweep is a night.
        nights.append(nights[-1].changed(status="failed", parent=None))
    assert kinds == ["champion", "champion", "scratch", "champion", "champion", "scratch", "champion"]


def test_weights_stay_as_long_as_a_run_or_a_version_has_begun_with_them(
    workspace: Workspace, ref: DatasetRef, file: Path
) -> None:
    store = workspace.store
    stop_at(workspace, "run", small("pretrained", weights=str(file)), ref, 1)
    store.put(f"weights/{'0' * 64}", b"of a run that never began")
    parent = record_of(workspace).parent
    assert orphans.find(store, NOW).keys == [f"weights/{'0' * 64}"]
    publish_version(store, card_of("run", name=NAME, parent=parent), {})
    store.delete("runs/run.json")
    assert [
        item.key for item in orphans.collect(store, orphans.find(store, NOW)).objects if "weights/" in item.key
    ] == [f"weights/{'0' * 64}"]
    assert len(list(store.list("weights/"))) == 1
