"""Every good image is predicted, every bad one is named."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from nightshift.data.datasets import open_dataset
from nightshift.data.images import MAX_BYTES
from nightshift.errors import (
    CheckpointCorruptError,
    ConfigError,
    DocumentDamagedError,
    NoImagesError,
    ObjectNotFoundError,
    StorageError,
    StorageUnreachableError,
)
from nightshift.judging import evaluation, gate
from nightshift.publishing import prediction
from nightshift.publishing.prediction import Classifier, Prediction
from nightshift.records import champions
from nightshift.records.versions import publish_version, read_card, read_file
from nightshift.refs import DatasetRef, ModelRef
from nightshift.settings import GateSettings
from nightshift.storage.memory import MemoryStore
from nightshift.workspace import Workspace
from tests.hostile import HOSTILE, is_harmless
from tests.records.test_versions import card_of, replace_card
from tests.stores import Faulty, memory_store

Candidates = tuple[Workspace, dict[int, ModelRef]]


@pytest.fixture(scope="module")
def classifier(candidates: Candidates) -> Classifier:
    workspace, models = candidates
    gate.promote(workspace.store, models[3], GateSettings())
    return Classifier(workspace.store, "cifar10", "champion")


@pytest.fixture
def pixels(candidates: Candidates, cifar10: DatasetRef) -> np.ndarray:
    """Test images, uint8 (N, 32, 32, 3)."""
    return open_dataset(candidates[0], cifar10).test_images[:].numpy()


def predict(classifier: Classifier, candidates: Candidates, *places: str) -> dict[str, Prediction]:
    found = list(classifier.predict(candidates[0].store, places))
    assert len({item.image for item in found}) == len(found)
    return {Path(item.image).name: item for item in found}


def test_a_lossless_test_image_is_predicted_as_the_evaluation_did(
    classifier: Classifier, candidates: Candidates, pixels: np.ndarray, tmp_path: Path
) -> None:
    from safetensors.numpy import load

    for number in range(300):  # more than one batch
        Image.fromarray(pixels[number]).save(tmp_path / f"{number:03}.png")
    found = predict(classifier, candidates, str(tmp_path))
    metrics = evaluation.read_metrics(candidates[0].store, classifier.version)
    assert metrics
    evaluated = load(evaluation.read_predictions(candidates[0].store, metrics))["predicted"][:300]
    assert [item.label for item in found.values()] == [classifier.classes[number] for number in evaluated]


def test_a_folder_with_all_sorts_of_images_loses_none_and_names_the_bad_ones(
    classifier: Classifier, candidates: Candidates, pixels: np.ndarray, tmp_path: Path
) -> None:
    picture, folder = Image.fromarray(pixels[0]), tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    picture.save(folder / "plain.png")
    picture.save(folder / "PHOTO.JPG", format="jpeg")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("RGBA").save(folder / "transparent.png")
    picture.convert("P").save(folder / "palette.gif")
    picture.convert("CMYK").save(folder / "print.jpg")
    picture.resize((640, 480)).save(folder / "deep" / "large.jpeg")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "grey16.png")
    turned = Image.Exif()
    turned[0x0112] = 3
    picture.rotate(180).save(folder / "turned.png", exif=turned)
    whole = (folder / "plain.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").touch()
    (folder / "text.png").write_text("this is no image")
    (folder / "notes.txt").write_text("not an image and not called one")

    found = predict(classifier, candidates, str(folder), str(tmp_path / "missing.png"))
    bad = {name for name, item in found.items() if item.error}
    assert bad == {"cut.png", "empty.jpg", "text.png", "missing.png"}
    assert set(found) - bad == {
        *("plain.png", "PHOTO.JPG", "grey.png", "transparent.png", "palette.gif"),
        *("print.jpg", "large.jpeg", "grey16.png", "turned.png"),
    }
    assert all(
        item.label in classifier.classes and 0 < (item.probability or 0) <= 1
        for name, item in found.items()
        if name not in bad
    )
    for same in ("transparent.png", "turned.png"):
        assert found[same].probability == pytest.approx(found["plain.png"].probability, abs=1e-6)
    assert found["grey16.png"].probability == pytest.approx(found["grey.png"].probability, abs=1e-6)


def test_images_under_an_s3_prefix_are_predicted_and_the_result_can_go_there(
    classifier: Classifier, candidates: Candidates, pixels: np.ndarray, tmp_path: Path
) -> None:
    store = candidates[0].store
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    store.put("inbox/a.png", (tmp_path / "a.png").read_bytes())
    store.put("inbox/b.jpg", b"broken")
    ref = prediction.predict(store, "cifar10", classifier.version, [store.url("inbox/")], store.url("out.jsonl"))
    assert (ref.predicted, ref.version) == (1, classifier.version)
    assert [bad.partition(" of ")[0] for bad in ref.bad] == [f"{store.url('inbox/b.jpg')}: not an image"]
    lines = [json.loads(line) for line in store.get("out.jsonl")[0].decode().splitlines()]
    assert [line["image"] for line in lines] == [store.url("inbox/a.png"), store.url("inbox/b.jpg")]
    assert lines[0]["label"] in classifier.classes
    with pytest.raises(ConfigError, match="s3://BUCKET/KEY"):
        predict(classifier, candidates, "s3://")


def test_what_cannot_be_read_in_a_bucket_stops_nothing_else(
    classifier: Classifier, candidates: Candidates, pixels: np.ndarray
) -> None:
    picture = io.BytesIO()
    Image.fromarray(pixels[0]).save(picture, "png")
    store = memory_store()
    for name in ("", "a.png", "gone.png", "lost.png", "large.png", "z.png"):
        store.put(f"inbox/{name}", picture.getvalue())
    store.put("inbox/large.png", bytes(MAX_BYTES + 1))
    faulty = Faulty(store)
    faulty.at = lambda url: (faulty, url.removeprefix(store.url("")))  # type: ignore[attr-defined]
    faulty.fail("download_bytes", ObjectNotFoundError("there is no such object"), "inbox/gone.png")
    faulty.fail("download_bytes", StorageError("500 InternalError"), "inbox/lost.png")
    found = {Path(item.image).name: item for item in classifier.predict(faulty, [store.url("inbox/")])}
    assert {name: item.error for name, item in found.items() if item.error} == {
        "gone.png": "there is no such object",
        "lost.png": "500 InternalError",
        "large.png": "it has 100 MB, and at most 100 are read: make it smaller",
    }
    assert set(found) == {"a.png", "gone.png", "lost.png", "large.png", "z.png"}
    assert faulty.calls["download_bytes", "inbox"] == 4
    faulty.fail("download_bytes", StorageUnreachableError("no answer"), "inbox/a.png")
    with pytest.raises(StorageUnreachableError):
        list(classifier.predict(faulty, [store.url("inbox/")]))


def test_what_is_no_file_is_named_and_blocks_nothing(
    classifier: Classifier, candidates: Candidates, pixels: np.ndarray, tmp_path: Path
) -> None:
    Image.fromarray(pixels[0]).save(tmp_path / "good.png")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "lost.png").symlink_to("nowhere")
    found = predict(classifier, candidates, str(tmp_path))
    assert {name: bool(item.error) for name, item in found.items()} == {
        "good.png": False,
        "lost.png": True,
        "pipe.png": True,
        "zero.png": True,
    }
    assert "a folder" not in str(found)
    (named,) = predict(classifier, candidates, str(tmp_path / "pipe.png")).values()
    assert named.error == "it is a pipe, and no file with an image"


def test_a_name_that_is_no_utf_8_is_kept_in_the_results_and_can_be_written(
    classifier: Classifier, candidates: Candidates, pixels: np.ndarray, tmp_path: Path
) -> None:
    for name, content in ((b"caf\xe9.png", "png"), (b"bad\xff.png", None)):
        path = tmp_path / "folder" / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        if content:
            Image.fromarray(pixels[0]).save(path, content)
        else:
            path.write_text("no image")
    found = predict(classifier, candidates, str(tmp_path / "folder"))
    assert {os.fsencode(name): bool(item.error) for name, item in found.items()} == {
        b"bad\xff.png": True,
        b"caf\xe9.png": False,
    }
    store = candidates[0].store
    for out in (str(tmp_path / "out.jsonl"), store.url("out.jsonl")):
        ref = prediction.predict(store, "cifar10", classifier.version, [str(tmp_path / "folder")], out)
        body = store.get("out.jsonl")[0] if out.startswith("s3://") else Path(out).read_bytes()
        names = [os.fsencode(json.loads(line)["image"]) for line in body.decode().splitlines()]
        assert [Path(os.fsdecode(name)).name for name in names] == sorted(found)
        assert r"bad\udcff.png: not an image" in ref.model_dump_json().replace("\\\\", "\\")
    out = str(tmp_path / "out.csv")
    prediction.predict(store, "cifar10", classifier.version, [str(tmp_path / "folder")], out)
    assert r"caf\udce9.png," in Path(out).read_text()


def test_an_empty_name_is_no_place_of_images(classifier: Classifier, candidates: Candidates) -> None:
    with pytest.raises(ConfigError, match="an empty name"):
        predict(classifier, candidates, "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.popitem(), "is missing"),
        (lambda weights: weights.update(more=torch.zeros(1)), "more is nothing that the network has"),
        (lambda weights: weights.update({"head.weight": torch.zeros(1)}), r"float32 \(1,\) instead of torch"),
        (None, "is damaged"),
    ],
    ids=["one fewer", "one more", "another shape", "no tensors"],
)
def test_weights_that_are_not_of_the_cards_network_are_refused_by_name(
    candidates: Candidates, change: Callable[[dict[str, torch.Tensor]], object] | None, reason: str
) -> None:
    """Whoever can write to the bucket can write the sha256 of anything."""
    stored, store = candidates[0].store, memory_store()
    card = read_card(stored, "cifar10", "epochs-3")
    weights = load_safetensors(read_file(stored, card, "weights.safetensors"))
    if change:
        change(weights)
    publish_version(store, card, {"weights.safetensors": save_safetensors(weights) if change else b"no tensors"})
    with pytest.raises((StorageError, CheckpointCorruptError), match=reason):
        Classifier(store, "cifar10", "epochs-3")


def test_csv_has_a_line_an_image_whatever_its_name() -> None:
    file = io.StringIO()
    given = [Prediction('a,"b".png', "cat", 0.5), Prediction("c.png", None, None, "damaged")]
    assert prediction.write(given, file, "csv") == (1, [given[1]])
    assert list(csv.DictReader(io.StringIO(file.getvalue()))) == [
        {"image": 'a,"b".png', "label": "cat", "probability": "0.5", "error": ""},
        {"image": "c.png", "label": "", "probability": "", "error": "damaged"},
    ]


def test_csv_is_safe_in_a_spreadsheet_and_json_lines_are_exact_whatever_a_file_is_called() -> None:
    names = [*HOSTILE.values(), "\udcff.png", "-1+1.png"]
    given = [Prediction(name, name, 0.5) for name in names]
    table, lines = io.StringIO(), io.StringIO()
    prediction.write(given, table, "csv")
    prediction.write(given, lines, "jsonl")
    assert is_harmless(table.getvalue())
    rows = list(csv.DictReader(io.StringIO(table.getvalue())))
    assert len(rows) == len(names)
    assert not any(row["image"].startswith(("=", "-")) for row in rows)
    assert {row["probability"] for row in rows} == {"0.5"}
    assert lines.getvalue().isascii()
    assert [json.loads(line)["image"] for line in lines.getvalue().splitlines()] == names


def test_it_is_an_error_if_no_image_at_all_can_be_read(
    classifier: Classifier, candidates: Candidates, tmp_path: Path
) -> None:
    found = classifier.predict(candidates[0].store, [str(tmp_path)])
    with pytest.raises(NoImagesError, match="there is no image here"):
        prediction.write(found, io.StringIO(), "csv")


def test_a_champion_whose_card_was_changed_after_it_went_live_predicts_nothing() -> None:
    store = MemoryStore()
    publish_version(store, card_of("v"), {})
    champions.promote_by_hand(store, "cifar10", "v")
    replace_card(store, card_of("v", classes=["dog", "cat"]))
    with pytest.raises(DocumentDamagedError, match=r"v/card\.json was changed after v went live"):
        Classifier(store, "cifar10", "champion")
