"""What is measured, on what, and in which mode."""

import json

import pytest
import torch
from torch import nn

from models import build_model
from nightshift.checkpoints.payload import weights_sha256
from nightshift.data import batches
from nightshift.data.datasets import open_dataset
from nightshift.data.names import check_classes
from nightshift.judging import evaluation
from nightshift.judging.evaluation import Answers, Metrics
from nightshift.records.keys import report_key
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef, ModelRef
from nightshift.storage.memory import MemoryStore
from nightshift.values import MOST_CLASSES
from nightshift.workspace import Workspace
from tests.made_up import config_of, made_up

CLASSES = ("cat", "dog", "frog")


class Modal(nn.Module):
    """A network whose answers depend on its mode and, in training, on the other images of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout, self.head = nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Linear(3, 3)
        self.inference = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inference = torch.is_inference_mode_enabled()
        logits: torch.Tensor = self.head(self.dropout(self.norm(x).mean((2, 3))))
        return logits


def test_evaluation_is_in_inference_mode_with_batch_norm_and_dropout_off() -> None:
    model, images = Modal().train(), torch.randn(8, 3, 32, 32)
    before = weights_sha256(model.state_dict())
    together = evaluation.predict(model, images)
    assert model.inference
    assert torch.equal(evaluation.predict(model, images), together)
    one_by_one = torch.cat([evaluation.predict(model, image[None]) for image in images])
    assert torch.allclose(one_by_one, together, atol=1e-6)
    assert weights_sha256(model.state_dict()) == before


def test_with_tta_an_image_and_its_mirror_are_the_same() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))
    images = torch.randn(4, 3, 32, 32)
    assert torch.equal(evaluation.predict(model, images, "flip"), evaluation.predict(model, images.flip(3), "flip"))
    assert not torch.equal(evaluation.predict(model, images, "crops"), evaluation.predict(model, images, "flip"))
    assert not torch.equal(evaluation.predict(model, images), evaluation.predict(model, images.flip(3)))


def test_the_metrics_of_a_known_case_are_the_known_ones() -> None:
    probabilities = torch.tensor([[0.9, 0.05, 0.05], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1], [0.1, 0.8, 0.1]])
    labels = torch.tensor([0, 1, 1, 2])
    found = evaluation.measure(evaluation.answers_to(probabilities.log(), labels), CLASSES)
    assert (found["images"], found["accuracy"], found["top5"]) == (4, 0.5, 1.0)
    assert found["interval"] == pytest.approx((0.1500, 0.8500), abs=1e-4)  # Wilson's, of 2 in 4
    assert found["loss"] == pytest.approx(-float(torch.tensor([0.9, 0.7, 0.3, 0.1]).log().mean()))
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert [(c.name, c.images, c.precision, c.recall, c.f1) for c in found["classes"]] == [
        ("cat", 1, 0.5, 1.0, pytest.approx(2 / 3)),
        ("dog", 2, 0.5, 0.5, 0.5),
        ("frog", 1, 0.0, 0.0, 0.0),
    ]
    # Four bins of one image each: |1 - 0.9|, |1 - 0.7|, |0 - 0.6|, |0 - 0.8|.
    assert found["calibration_error"] == pytest.approx((0.1 + 0.3 + 0.6 + 0.8) / 4)
    assert [(b.images, b.accuracy) for b in found["reliability"]] == [(1, 0.0), (1, 1.0), (1, 0.0), (1, 1.0)]
    assert [(m.image, m.label, m.predicted) for m in found["mistakes"]] == [(3, "frog", "dog"), (2, "dog", "cat")]


def test_what_is_stored_agrees_with_the_predictions_image_by_image(
    candidates: tuple[Workspace, dict[int, ModelRef]], cifar10: DatasetRef
) -> None:
    from safetensors.torch import load

    workspace, models = candidates
    metrics = evaluation.read_metrics(workspace.store, models[3].run_id)
    assert metrics
    stored = load(evaluation.read_predictions(workspace.store, metrics))
    dataset = open_dataset(workspace, cifar10)
    assert torch.equal(stored["labels"], dataset.test_labels)
    confusion = torch.tensor(metrics.confusion)
    for label, predicted in ((0, 0), (3, 5)):
        assert confusion[label, predicted] == ((stored["labels"] == label) & (stored["predicted"] == predicted)).sum()
    assert metrics.accuracy == int(confusion.diagonal().sum()) / 10_000 == models[3].test_accuracy
    assert metrics.interval[0] < metrics.accuracy < metrics.interval[1]
    assert len(metrics.mistakes) == 10


def test_what_was_measured_is_not_measured_again(
    candidates: tuple[Workspace, dict[int, ModelRef]], cifar10: DatasetRef
) -> None:
    workspace, models = candidates
    record, _ = read_record(workspace.store, models[1].run_id)
    key = report_key(record.run_id, "evaluation.json")
    body = workspace.store.get(key)[0]
    # A mark that a second measurement would not make.
    workspace.store.put(key, json.dumps({**json.loads(body), "loss": 42.0}).encode())
    again = evaluation.evaluate(workspace, record.ref(record.checkpoints[-1]), cifar10)
    workspace.store.put(key, body)
    assert again.loss == 42.0


def answers_of(labels: list[int], predicted: list[int]) -> Answers:
    """Answers as sure as the number of the image says."""
    count = len(labels)
    return Answers(
        labels=torch.tensor(labels),
        predicted=torch.tensor(predicted),
        confidence=torch.linspace(0.1, 0.9, count),
        in_top5=torch.zeros(count, dtype=torch.bool),
        loss=torch.ones(count),
    )


def metrics_of(answers: Answers, classes: tuple[str, ...]) -> Metrics:
    digests = dict.fromkeys(("checkpoint", "dataset_digest", "weights_sha256", "predictions_sha256"), "0" * 64)
    return Metrics(**digests, tta="off", predictions="none", **evaluation.measure(answers, classes))


def test_of_a_class_without_test_images_nothing_is_known() -> None:
    found = metrics_of(answers_of([0, 0, 2], [0, 1, 2]), ("cat", "dog", "frog", "owl"))
    assert [(c.name, c.images, c.precision, c.recall, c.f1) for c in found.classes] == [
        ("cat", 2, 1.0, 0.5, pytest.approx(2 / 3)),
        ("dog", 0, None, None, None),
        ("frog", 1, 1.0, 1.0, 1.0),
        ("owl", 0, None, None, None),
    ]


def test_of_many_classes_the_pairs_that_are_confused_most_are_kept_by_name() -> None:
    classes = tuple(f"class {number}" for number in range(300))
    found = metrics_of(answers_of([7, 299, 7, 3, 299, 7], [8, 0, 8, 3, 256, 9]), classes)
    assert found.confusion == []
    assert [(pair.label, pair.predicted, pair.images) for pair in found.confused] == [
        ("class 7", "class 8", 2),
        ("class 7", "class 9", 1),
        ("class 299", "class 0", 1),
        ("class 299", "class 256", 1),
    ]


def test_the_metrics_of_the_most_classes_are_stored_and_read_in_bounded_memory() -> None:
    """A confusion matrix of them would have 80 GB."""
    names = tuple(f"{number:070}" for number in range(MOST_CLASSES))
    check_classes(names)
    labels = torch.arange(MOST_CLASSES)
    found = metrics_of(answers_of(labels.tolist(), labels.flip(0).tolist()), names)
    body = found.model_dump_json(indent=1).encode()
    store = MemoryStore()
    store.put(report_key("run", "evaluation.json"), body)
    assert evaluation.read_metrics(store, "run") == found
    assert (len(found.classes), len(found.confused), len(found.mistakes)) == (MOST_CLASSES, 50, 10)


@pytest.mark.parametrize(
    "changed",
    [
        {"confusion": [[1, 2], [3]]},
        {"confusion": [[0] * 1000] * 1000},
        {"confused": [{"label": "a", "predicted": "b", "images": 1}] * 51},
    ],
)
def test_stored_metrics_of_which_no_page_could_be_made_are_measured_again(changed: dict[str, object]) -> None:
    store, found = MemoryStore(), metrics_of(answers_of([0, 1], [0, 0]), ("cat", "dog"))
    key = report_key("run", "evaluation.json")
    store.put(key, json.dumps(found.model_dump()).encode())
    assert evaluation.read_metrics(store, "run") == found
    store.put(key, json.dumps({**found.model_dump(), **changed}).encode())
    assert evaluation.read_metrics(store, "run") is None


@pytest.mark.parametrize(
    ("size", "classes", "on_a_gpu", "on_a_cpu"),
    [
        (32, 10, 1000, 250),
        (16, 2, 1000, 250),
        (96, 10, 111, 27),
        (512, 10, 3, 1),
        (32, 100_000, 335, 250),
        (32, 150_000, 223, 223),
    ],
)
def test_large_images_and_many_classes_are_predicted_in_smaller_batches(
    size: int, classes: int, on_a_gpu: int, on_a_cpu: int
) -> None:
    assert batches.images_at_a_time(size, classes, torch.device("cuda")) == on_a_gpu
    assert batches.images_at_a_time(size, classes, torch.device("cpu")) == on_a_cpu


def test_what_is_measured_in_batches_is_what_is_measured_at_once() -> None:
    dataset, config = made_up(64, 5, train=1, test=601), config_of()
    model = build_model("quick_cnn", 5, 64)
    assert batches.images_at_a_time(64, 5, torch.device("cpu")) < 601
    found = evaluation.answer_test_images(model, dataset, config)
    inputs = batches.to_input(dataset.test_images[:], *batches.normalizer(dataset, config))
    whole = evaluation.answers_to(evaluation.predict(model, inputs), dataset.test_labels.long())
    assert torch.equal(found.labels, whole.labels)
    assert torch.allclose(found.confidence, whole.confidence, atol=1e-5)
    assert torch.allclose(found.loss, whole.loss, atol=1e-4)
