"""How good the stored weights are: read back from the store, verified, and never taken from memory."""

import hashlib
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn import functional as F

from models import build_model
from nightshift.checkpoints.payload import check_weights, read_weights, weights_sha256
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.errors import ConfigError, ObjectNotFoundError, ObjectTooLargeError, StorageError
from nightshift.hardware import failures_explained, find_device
from nightshift.ids import Sha256
from nightshift.records.keys import report_key
from nightshift.records.lease import attached
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation
from nightshift.storage.documents import MIB
from nightshift.storage.store import Store
from nightshift.workspace import Workspace

BATCH = 1000
CALIBRATION_BINS = 15
_MISTAKES = 10


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class ClassMetrics(_Part):
    """One class against all others."""

    name: str
    images: int
    precision: float
    recall: float
    f1: float


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
    classes: list[ClassMetrics]
    confusion: list[list[int]]
    """How many images of the row's class were classified as the column's."""
    mistakes: list[Mistake]
    """The ten most confident mistakes."""


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
        return Metrics.model_validate_json(store.get(report_key(run_id, "evaluation.json"), 16 * MIB)[0])
    except (ObjectNotFoundError, ObjectTooLargeError, ValueError):  # damaged metrics are measured again
        return None


def read_predictions(store: Store, metrics: Metrics) -> bytes:
    """The stored predictions, as they are published under the name `gate.PREDICTIONS`.

    Raises:
        StorageError: it cannot be read, or is not what was stored.
    """
    body = store.get(metrics.predictions)[0]
    if hashlib.sha256(body).hexdigest() != metrics.predictions_sha256:
        raise StorageError(f"{store.url(metrics.predictions)} is damaged: delete it, and start the run again")
    return body


def load_model(
    config: TrainConfig, weights: dict[str, Tensor], classes: int, device: torch.device | None = None
) -> nn.Module:
    """The trained network, ready to predict: batch norm uses what it has learned, dropout drops nothing.

    Raises:
        ConfigError: there is no such network here.
        CheckpointCorruptError: the weights are none of this network's.
    """
    try:
        model = build_model(config.model.name, classes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    check_weights(weights, model)
    model.load_state_dict(weights)
    return model.to(device or torch.device("cpu"), memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]


@torch.inference_mode()
def predict(model: nn.Module, inputs: Tensor, tta: str = "off") -> Tensor:
    """Logits (batch, classes), float32 on the CPU, of normalized images (batch, 3, 32, 32).

    With tta "flip" they are the mean over the image and its mirror image. With "crops" they are half that mean, plus
    half the same mean over the image shifted by a pixel, both to the upper left and to the lower right (Jordan, arXiv
    2404.00498).
    """
    model.eval()
    device = next(model.parameters()).device
    inputs = inputs.to(device, memory_format=torch.channels_last)
    logits: Tensor = model(inputs) if tta == "off" else _mirrored_mean(model, inputs)
    if tta == "crops":
        padded, size = F.pad(inputs, (1, 1, 1, 1), "reflect"), inputs.shape[-1]
        crops = (padded[:, :, at : at + size, at : at + size] for at in (0, 2))
        logits = (logits + sum(_mirrored_mean(model, crop) for crop in crops) / 2) / 2
    return logits.float().cpu()


def _mirrored_mean(model: nn.Module, inputs: Tensor) -> Tensor:
    return (model(inputs) + model(inputs.flip(3))) / 2  # type: ignore[no-any-return]


def measure(logits: Tensor, labels: Tensor, classes: tuple[str, ...]) -> dict[str, Any]:
    """The fields of `Metrics` that follow from logits (N, classes), float32, and labels (N,), int64."""
    # Here, because they take more than a second to import.
    from scipy.stats import binned_statistic, binomtest
    from torchmetrics.functional import classification as tm

    count, probabilities = len(classes), logits.softmax(1)
    confidence, predicted = probabilities.max(1)
    correct = predicted == labels
    share = binomtest(int(correct.sum()), len(labels))
    per_class = {
        name: function(predicted, labels, count, average="none")
        for name, function in (
            ("precision", tm.multiclass_precision),
            ("recall", tm.multiclass_recall),
            ("f1", tm.multiclass_f1_score),
        )
    }
    sums, _, _ = binned_statistic(
        confidence.double().numpy(),
        torch.stack([torch.ones_like(confidence), confidence, correct]).double().numpy(),
        statistic="sum",
        bins=CALIBRATION_BINS,
        range=(0, 1),
    )
    wrong = (~correct).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True, stable=True)][:_MISTAKES]
    return {
        "images": len(labels),
        "accuracy": share.statistic,  # in double precision: the gate compares it with a threshold
        "interval": tuple(share.proportion_ci(0.95, method="wilson")),
        "top5": float(tm.multiclass_accuracy(probabilities, labels, count, average="micro", top_k=min(5, count))),
        "loss": float(F.cross_entropy(logits, labels)),
        "calibration_error": float(
            tm.multiclass_calibration_error(probabilities, labels, count, n_bins=CALIBRATION_BINS)
        ),
        "reliability": [
            Bin(images=int(images), confidence=certain / images, accuracy=right / images)
            for images, certain, right in sums.T
            if images
        ],
        "classes": [
            ClassMetrics(
                name=name,
                images=int((labels == number).sum()),
                **{metric: float(values[number]) for metric, values in per_class.items()},
            )
            for number, name in enumerate(classes)
        ],
        "confusion": tm.multiclass_confusion_matrix(predicted, labels, count).tolist(),
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
        logits = predict_test_images(load_model(config, weights, len(dataset.classes), device), dataset, config)
    labels = dataset.test_labels
    body = save_safetensors({"predicted": logits.argmax(1).to(torch.uint8), "labels": labels.clone()})
    key = report_key(checkpoint.run_id, "predictions.safetensors")
    workspace.store.put(key, body)
    return Metrics(
        **decided_by,
        weights_sha256=weights_sha256(weights),
        predictions=key,
        predictions_sha256=hashlib.sha256(body).hexdigest(),
        **measure(logits, labels.long(), dataset.classes),
    )


def predict_test_images(model: nn.Module, dataset: Dataset, config: TrainConfig) -> Tensor:
    """Logits (N, classes), float32, of all test images, predicted as the config says."""
    scale, shift = batches.normalizer(dataset, config.data.normalization)
    return torch.cat(
        [
            predict(model, batches.to_input(images, scale, shift), config.evaluation.tta)
            for images in torch.split(dataset.test_images, BATCH)
        ]
    )
