"""Every good image is predicted, every bad one is named."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nightshift.data.datasets import open_dataset
from nightshift.errors import ConfigError, NoImagesError
from nightshift.judging import evaluation, gate
from nightshift.publishing import prediction
from nightshift.publishing.prediction import Classifier, Prediction
from nightshift.refs import DatasetRef, ModelRef
from nightshift.settings import GateSettings
from nightshift.workspace import Workspace
from tests.hostile import HOSTILE, is_harmless

Candidates = tuple[Workspace, dict[int, ModelRef]]


@pytest.fixture(scope="module")
def classifier(candidates: Candidates) -> Classifier:
    workspace, models = candidates
    gate.promote(workspace.store, models[3], GateSettings())
    return Classifier(workspace.store, "cifar10", "champion")


@pytest.fixture
def pixels(candidates: Candidates, cifar10: DatasetRef) -> np.ndarray:
    """Test images, uint8 (N, 32, 32, 3)."""
    return open_dataset(candidates[0], cifar10).test_images.numpy()


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
    assert ref.bad == [f"{store.url('inbox/b.jpg')}: not an image, or damaged"]
    lines = [json.loads(line) for line in store.get("out.jsonl")[0].decode().splitlines()]
    assert [line["image"] for line in lines] == [store.url("inbox/a.png"), store.url("inbox/b.jpg")]
    assert lines[0]["label"] in classifier.classes
    with pytest.raises(ConfigError, match="s3://BUCKET/KEY"):
        predict(classifier, candidates, "s3://")


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
