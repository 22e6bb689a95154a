"""From training to a prediction: images of any size, any number of classes, and classes of any name."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load as load_safetensors

from nightshift.data.datasets import Dataset, open_dataset
from nightshift.data.images import fit
from nightshift.judging import evaluation, gate
from nightshift.judging.answers import PREDICTIONS
from nightshift.judging.report import Report, publish_report
from nightshift.publishing.export import FORMATS
from nightshift.publishing.prediction import Classifier, Prediction
from nightshift.publishing.publish import _exporter, publish_model
from nightshift.records.run import read_record
from nightshift.records.versions import ModelCard, card_key, read_card, read_file
from nightshift.refs import ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.made_up import NAME, config_of, in_memory, known
from tests.records.test_versions import replace_card

SETS = [(16, 2, 40), (24, 3, 1), (48, 300, 40)]
"""Size of images, number of classes, test images."""


@dataclass
class Night:
    """A run and what came of it."""

    workspace: Workspace
    dataset: Dataset
    model: ModelRef
    card: ModelCard
    verdict: Verdict
    report: Report

    def predict(self, *places: Path) -> list[Prediction]:
        classifier = Classifier(self.workspace.store, NAME, "second")
        return list(classifier.predict(self.workspace.store, map(str, places)))


@pytest.fixture(scope="module", params=SETS, ids=str)
def night(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Night:
    size, classes, test = request.param
    workspace = in_memory(tmp_path_factory.mktemp("home"))
    ref = known(workspace, size, classes, test=test)
    for seed, run_id in enumerate(("first", "second")):
        config = config_of(seed=seed, tta="crops", translate=2, epochs=6)
        checkpoint = train_alone(workspace, run_id, config, ref)
        evaluated = evaluation.evaluate(workspace, checkpoint, ref)
        model = publish_model(workspace, checkpoint, ref, evaluated)
        verdict = gate.promote(workspace.store, model, GateSettings(max_regression=1))
        report = publish_report(workspace, checkpoint, evaluated, model, verdict, None)
    card = read_card(workspace.store, NAME, "second")
    return Night(workspace, open_dataset(workspace, ref), model, card, verdict, report)


def test_the_card_says_what_the_network_takes_and_names_its_classes(night: Night) -> None:
    size = night.dataset.image_size
    assert (night.card.image_size, night.card.resize) == (size, "stretch")
    assert night.card.classes == night.dataset.classes
    assert f"(batch, 3, {size}, {size})" in night.card.input


def test_a_test_image_is_predicted_as_the_evaluation_did(night: Night, tmp_path: Path) -> None:
    for number, image in enumerate(night.dataset.test_images[:].numpy()):
        Image.fromarray(image).save(tmp_path / f"{number:03}.png")
    answers = load_safetensors(read_file(night.workspace.store, night.card, PREDICTIONS))
    assert answers["predicted"].dtype == answers["labels"].dtype == night.dataset.test_labels.dtype
    assert torch.equal(answers["labels"], night.dataset.test_labels)
    expected = [night.dataset.classes[number] for number in answers["predicted"].tolist()]
    assert [item.label for item in night.predict(tmp_path)] == expected


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_exported_for_any_size_and_takes_batches_of_any_size(night: Night, name: str) -> None:
    record, _ = read_record(night.workspace.store, "second")
    weights = load_safetensors(read_file(night.workspace.store, night.card, "weights.safetensors"))
    body = _exporter(weights, record.train_config(), night.dataset)(name)
    size, classes = night.dataset.image_size, len(night.dataset.classes)
    fresh = evaluation.load_model(record.train_config(), weights, classes, image_size=size)
    for count in (1, 2, 5):
        images = torch.randn(count, 3, size, size)
        assert FORMATS[name].run(body, fresh, images).shape == (count, classes)


def test_the_gate_has_compared_the_two_versions_on_the_same_images(night: Night) -> None:
    assert night.verdict.comparison
    assert night.verdict.comparison.images == len(night.dataset.test_images)


def test_the_report_shows_a_matrix_of_few_classes_and_pairs_of_many(night: Night) -> None:
    few = len(night.dataset.classes) <= evaluation.MATRIX_CLASSES
    assert ("confusion" in night.report.plots) == few
    assert ("Most often confused" in night.report.markdown) != few
    metrics = evaluation.read_metrics(night.workspace.store, "second")
    assert metrics
    assert [metric.name for metric in metrics.classes] == list(night.dataset.classes)
    assert sum(metric.images for metric in metrics.classes) == len(night.dataset.test_images)
    assert any(metric.recall is None for metric in metrics.classes) == (
        len(set(night.dataset.test_labels.tolist())) < len(metrics.classes)
    )


@pytest.mark.parametrize("how", ["crop", "pad", "stretch"])
def test_an_image_of_another_shape_is_predicted_as_its_card_says(night: Night, tmp_path: Path, how: str) -> None:
    size = night.dataset.image_size
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size, 3 * size, 3), dtype=np.uint8))
    wide.save(tmp_path / "wide.png")
    fit(wide, size, how).save(tmp_path / "square.png")  # type: ignore[arg-type]
    store, key = night.workspace.store, card_key(NAME, "second")
    before = store.get(key)[0]
    try:
        replace_card(store, night.card.changed(resize=how))
        classifier = Classifier(store, NAME, "second")
        found = [
            item.probability
            for item in classifier.predict(store, [str(tmp_path / name) for name in ("wide.png", "square.png")])
        ]
    finally:
        store.put(key, before)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_card_whose_network_takes_no_images_of_its_size_is_told(night: Night) -> None:
    store, key = night.workspace.store, card_key(NAME, "second")
    before = store.get(key)[0]
    config = {**night.card.config, "model": {"name": "simple_cnn"}}
    try:
        replace_card(store, night.card.changed(config=config))
        with pytest.raises(Exception, match="takes images with a side of 32 pixels"):
            Classifier(store, NAME, "second")
    finally:
        store.put(key, before)
