"""How good the stored weights are: read back from the store, verified, and never taken from memory."""

import hashlib
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from nightshift.checkpoints.payload import check_weights, read_weights, weights_sha256
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import Dataset, in_parts, open_dataset
from nightshift.errors import ObjectNotFoundError, ObjectTooLargeError, StorageError
from nightshift.hardware import device_of, failures_explained, find_device
from nightshift.ids import Sha256
from nightshift.imports import imported_meanwhile
from nightshift.judging.near import MOST_NEAR, Near, embedding_of, near_images
from nightshift.networks import build_network
from nightshift.records.keys import report_key
from nightshift.records.lease import attached
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation
from nightshift.storage.documents import MIB
from nightshift.storage.store import Store
from nightshift.values import LARGEST_EVALUATION, MOST_CLASSES
from nightshift.workspace import Workspace

CALIBRATION_BINS = 15
MATRIX_CLASSES = 32
"""With up to this many classes, the whole confusion matrix is kept; with more, only the most confused pairs."""
_NEEDED_NEXT = "scipy.stats", "torch.export._trace", "matplotlib.figure"
"""What `measure`, the export and the report import: 4 s, much of which a core has left while the other predicts."""
_TOP = 5
_MISTAKES = 10
_PAIRS = 50
_MAX_PREDICTIONS = 256 * MIB


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class ClassMetrics(_Part):
    """One class against all others. Of a class without test images nothing is known."""

    name: str
    images: int
    precision: float | None
    """0 if no image was taken for it."""
    recall: float | None
    f1: float | None


class Confused(_Part):
    """How many test images of one class were taken for another."""

    label: str
    predicted: str
    images: int


class Bin(_Part):
    """The images whose highest probability falls into one bin, of several of equal width."""

    images: int
    confidence: float
    accuracy: float


class Mistake(_Part):
    """A misclassified test image, and the probability of the predicted class."""

    image: int
    label: str
    predicted: str
    probability: float


class Metrics(_Part):
    """Everything measured on the test images; stored as `reports/<run_id>/evaluation.json`."""

    checkpoint: Sha256
    """sha256 of the payload that was measured; with `tta` and `dataset_digest` it determines the rest."""
    tta: str
    dataset_digest: Sha256
    weights_sha256: Sha256
    predictions: str
    """Key of the stored predictions, one for each image."""
    predictions_sha256: Sha256
    images: int
    accuracy: float
    interval: tuple[float, float]
    """95 % interval of the accuracy, by Wilson (1927)."""
    top5: float
    loss: float
    """Mean cross-entropy, in nats."""
    calibration_error: float
    """Expected calibration error of Guo et al. (2017, arXiv 1706.04599), 15 bins: 0 if confidence equals accuracy."""
    reliability: list[Bin]
    classes: list[ClassMetrics] = Field(max_length=MOST_CLASSES)
    confusion: list[list[int]] = Field(max_length=MATRIX_CLASSES)
    """How many images of the row's class were classified as the column's. Empty if there are more than 32 classes."""
    confused: list[Confused] = Field([], max_length=_PAIRS)
    """The fifty pairs of classes that are confused most often. What an older nightshift has measured has none."""
    mistakes: list[Mistake] = Field(max_length=_MISTAKES)
    """The ten most confident mistakes."""
    near: list[Near] = Field([], max_length=MOST_NEAR)
    """Images to judge by that are nearly the same as ones to train on. An older nightshift has looked for none."""

    @model_validator(mode="after")
    def _check_confusion(self) -> Self:
        if self.confusion and {len(self.confusion)} != {len(self.classes), *map(len, self.confusion)}:
            raise ValueError("the confusion matrix is not one of these classes")
        return self


@dataclass(frozen=True)
class Answers:
    """What a model says of N images, in a few values an image, on the CPU."""

    labels: Tensor
    """What is right, int64 (N,), as `predicted`."""
    predicted: Tensor
    confidence: Tensor
    """The probability of the predicted class, float32 (N,)."""
    in_top5: Tensor
    """Whether the right class is among the five most probable, bool (N,)."""
    loss: Tensor
    """Cross-entropy, float32 (N,)."""


def evaluate(workspace: Workspace, checkpoint: CheckpointRef, dataset_ref: DatasetRef) -> Evaluation:
    """Measure a checkpoint's model on all test images, unless that was done before.

    Raises:
        LeaseLostError: another trainer has taken the run over since.
        CheckpointCorruptError: the stored payload is not what its record says.
        StorageError: it cannot be read.
    """
    with attached(workspace.store, checkpoint, workspace.lease_seconds) as run:
        key = report_key(run.run_id, "evaluation.json")
        metrics = read_metrics(workspace.store, run.run_id)
        config = run.record.train_config()
        decided_by = {
            "checkpoint": checkpoint.sha256,
            "tta": config.evaluation.tta,
            "dataset_digest": dataset_ref.digest,
        }
        if not metrics or metrics.model_dump(include=set(decided_by)) != decided_by:
            metrics = _evaluate(workspace, config, checkpoint, dataset_ref, decided_by)
            workspace.store.put(key, metrics.model_dump_json(indent=1).encode())
    return Evaluation(**metrics.model_dump(include={"accuracy", "loss", "images", "weights_sha256"}), key=key)


def read_metrics(store: Store, run_id: str) -> Metrics | None:
    """The stored metrics of a run, or None if there are none."""
    try:
        return Metrics.model_validate_json(store.get(report_key(run_id, "evaluation.json"), LARGEST_EVALUATION)[0])
    except (ObjectNotFoundError, ObjectTooLargeError, ValueError):  # damaged metrics are measured again
        return None


def read_predictions(store: Store, metrics: Metrics) -> bytes:
    """The stored predictions, as they are published under the name `answers.PREDICTIONS`.

    Raises:
        StorageError: it cannot be read, or is not what was stored.
    """
    body = store.get(metrics.predictions, _MAX_PREDICTIONS)[0]
    if hashlib.sha256(body).hexdigest() != metrics.predictions_sha256:
        raise StorageError(f"{store.url(metrics.predictions)} is damaged: delete it, and start the run again")
    return body


def predictions_file(answers: Answers, dataset: Dataset) -> bytes:
    """What the model predicts of each test image, and what is right: safetensors, as `answers.PREDICTIONS` says."""
    dtype = torch.uint8 if len(dataset.classes) <= 256 else torch.int32
    tensors = {"predicted": answers.predicted.to(dtype), "labels": answers.labels.to(dtype)}
    if dataset.test_content is not None:
        tensors["content"] = dataset.test_content
    return save_safetensors(tensors)


def load_model(
    config: TrainConfig,
    weights: dict[str, Tensor],
    classes: int,
    device: torch.device | None = None,
    image_size: int = 32,
) -> nn.Module:
    """The trained network, ready to predict: batch norm uses what it has learned, dropout drops nothing.

    Raises:
        ConfigError: as `build_network`.
        CheckpointCorruptError: the weights are none of this network's.
    """
    model = build_network(config.model.name, classes, image_size)
    check_weights(weights, model)
    model.load_state_dict(weights)
    return model.to(device or torch.device("cpu"), memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


@torch.inference_mode()
def predict(model: nn.Module, inputs: Tensor, tta: str = "off") -> Tensor:
    """Logits (batch, classes), float32 on the CPU, of normalized images (batch, 3, side, side).

    With tta "flip", they are the mean over the image and its mirror image. With "crops", that mean counts half. The
    other half is the same mean over two copies of the image, shifted by a pixel to the upper left and to the lower
    right (Jordan, arXiv 2404.00498).
    """
    model.eval()
    device = device_of(model)
    inputs = inputs.to(device, memory_format=torch.channels_last)
    logits: Tensor = model(inputs) if tta == "off" else _mirrored_mean(model, inputs)
    if tta == "crops":
        padded, size = F.pad(inputs, (1, 1, 1, 1), "reflect"), inputs.shape[-1]
        crops = (padded[:, :, at : at + size, at : at + size] for at in (0, 2))
        logits = (logits + sum(_mirrored_mean(model, crop) for crop in crops) / 2) / 2
    return logits.float().cpu()


def _mirrored_mean(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs) + model(inputs.flip(3))) / 2  # type: ignore[no-any-return]


def answers_to(logits: Tensor, labels: Tensor) -> Answers:
    """What logits (N, classes), float32, say of images with these labels (N,), int64."""
    confidence, predicted = logits.softmax(1).max(1)
    best = logits.topk(min(_TOP, logits.shape[1]), 1).indices
    return Answers(
        labels=labels,
        predicted=predicted,
        confidence=confidence,
        in_top5=(best == labels[:, None]).any(1),
        loss=F.cross_entropy(logits, labels, reduction="none"),
    )


def measure(answers: Answers, classes: tuple[str, ...]) -> dict[str, Any]:
    """The fields of `Metrics` that follow from what a model says of the test images."""
    from scipy.stats import binned_statistic, binomtest  # here, because it takes more than a second to import

    labels, predicted, confidence = answers.labels, answers.predicted, answers.confidence
    count, correct = len(classes), predicted == labels
    share = binomtest(int(correct.sum()), len(labels))
    sums, _, _ = binned_statistic(
        confidence.double().numpy(),
        torch.stack([torch.ones_like(confidence), confidence, correct]).double().numpy(),
        statistic="sum",
        bins=CALIBRATION_BINS,
        range=(0, 1),
    )
    bins = [
        Bin(images=int(images), confidence=certain / images, accuracy=right / images)
        for images, certain, right in sums.T
        if images
    ]
    wrong = (~correct).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:_MISTAKES]
    return {
        "images": len(labels),
        "accuracy": share.statistic,  # in double precision: the gate compares it with a threshold
        "interval": tuple(share.proportion_ci(0.95, method="wilson")),
        "top5": float(answers.in_top5.double().mean()),
        "loss": float(answers.loss.double().mean()),
        "calibration_error": sum(bin.images * abs(bin.accuracy - bin.confidence) for bin in bins) / len(labels),
        "reliability": bins,
        "classes": _of_each_class(labels, predicted, classes),
        "confusion": _counted_pairs(labels, predicted, count).tolist() if count <= MATRIX_CLASSES else [],
        "confused": _most_confused(labels[wrong], predicted[wrong], classes),
        "mistakes": [
            Mistake(
                image=image,
                label=classes[labels[image]],
                predicted=classes[predicted[image]],
                probability=float(confidence[image]),
            )
            for image in worst.tolist()
        ],
    }


def _of_each_class(labels: Tensor, predicted: Tensor, classes: tuple[str, ...]) -> list[ClassMetrics]:
    count = len(classes)
    right = torch.bincount(labels[labels == predicted], minlength=count).tolist()
    images = torch.bincount(labels, minlength=count).tolist()
    taken_for_it = torch.bincount(predicted, minlength=count).tolist()
    return [
        ClassMetrics(
            name=name,
            images=images[number],
            precision=right[number] / max(taken_for_it[number], 1) if images[number] else None,
            recall=right[number] / images[number] if images[number] else None,
            f1=2 * right[number] / (images[number] + taken_for_it[number]) if images[number] else None,
        )
        for number, name in enumerate(classes)
    ]


def _counted_pairs(labels: Tensor, predicted: Tensor, count: int) -> Tensor:
    """The confusion matrix, int64 (classes, classes)."""
    return torch.bincount(labels * count + predicted, minlength=count**2).view(count, count)


def _most_confused(labels: Tensor, predicted: Tensor, classes: tuple[str, ...]) -> list[Confused]:
    count = len(classes)
    pairs, images = torch.unique(labels * count + predicted, return_counts=True)
    most = images.argsort(descending=True, stable=True)[:_PAIRS]
    return [
        Confused(label=classes[pair // count], predicted=classes[pair % count], images=times)
        for pair, times in zip(pairs[most].tolist(), images[most].tolist(), strict=True)
    ]


def _evaluate(
    workspace: Workspace,
    config: TrainConfig,
    checkpoint: CheckpointRef,
    dataset_ref: DatasetRef,
    decided_by: dict[str, Any],
) -> Metrics:
    weights = read_weights(workspace.store, checkpoint)
    dataset = open_dataset(workspace, dataset_ref)
    device = find_device(config.hardware.device)
    with failures_explained(device):
        model = load_model(config, weights, len(dataset.classes), device, dataset.image_size)
        with imported_meanwhile(*_NEEDED_NEXT):
            answers = answer_test_images(model, dataset, config)
        near = _near(model, dataset, config)
    body = predictions_file(answers, dataset)
    key = report_key(checkpoint.run_id, "predictions.safetensors")
    workspace.store.put(key, body)
    return Metrics(
        **decided_by,
        weights_sha256=weights_sha256(weights),
        predictions=key,
        predictions_sha256=hashlib.sha256(body).hexdigest(),
        **measure(answers, dataset.classes),
        near=near,
    )


def answer_test_images(model: nn.Module, dataset: Dataset, config: TrainConfig) -> Answers:
    """What a model says of all test images, predicted as the config says."""
    scale, shift = batches.normalizer(dataset, config)
    size = batches.images_at_a_time(dataset.image_size, len(dataset.classes), device_of(model))
    # Allocated before the images: small tensors that stay, allocated among large ones, would keep their memory in use.
    count = len(dataset.test_labels)
    answers = Answers(
        labels=dataset.test_labels.long(),
        predicted=torch.empty(count, dtype=torch.int64),
        confidence=torch.empty(count),
        in_top5=torch.empty(count, dtype=torch.bool),
        loss=torch.empty(count),
    )
    for numbers, images in in_parts(dataset.test_images, size):
        logits = predict(model, batches.to_input(images, scale, shift), config.evaluation.tta)
        part = answers_to(logits, answers.labels[numbers])
        for field in fields(Answers):
            getattr(answers, field.name)[numbers] = getattr(part, field.name)
    return answers


def _near(model: nn.Module, dataset: Dataset, config: TrainConfig) -> list[Near]:
    if not dataset.near:
        return []
    scale, shift = batches.normalizer(dataset, config)
    size = batches.images_at_a_time(dataset.image_size, len(dataset.classes), device_of(model))
    embed = embedding_of(model, config.model.name, len(dataset.classes), dataset.image_size)

    def embed_all(images: Tensor) -> Tensor:
        return torch.cat([embed(batches.to_input(part, scale, shift)) for part in torch.split(images, size)])

    return near_images(dataset, embed_all)
