"""From an evaluated checkpoint to a published version, and to files for others."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from nightshift import progress
from nightshift.checkpoints.payload import read_weights, weights_sha256
from nightshift.checkpoints.weights import PUBLISHED_WEIGHTS
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import Dataset, few, open_dataset
from nightshift.errors import (
    CheckpointCorruptError,
    ConfigError,
    StorageDeniedError,
    StorageError,
    StorageUnreachableError,
)
from nightshift.hardware import device_of
from nightshift.judging import evaluation
from nightshift.judging.answers import PREDICTIONS
from nightshift.networks import build_network
from nightshift.publishing.export import export
from nightshift.records.lease import attached
from nightshift.records.run import RunRecord
from nightshift.records.serving import FOR_TRITON
from nightshift.records.versions import ModelCard, card_key, load_bounded, publish_version, read_card, version_key
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation, ModelRef
from nightshift.storage.store import Store
from nightshift.workspace import Workspace

_IMAGES = 256
"""How many test images an exported file is compared on; fewer if they are large, and two at least."""
PUBLISHED = {"weights.pth": "state_dict", PUBLISHED_WEIGHTS: "safetensors", "model.pt2": "pt2"}


@dataclass(frozen=True)
class Measured:
    """Weights, and how good they are on the test images: accuracy from 0 to 1, mean cross-entropy in nats."""

    accuracy: float
    loss: float
    weights_sha256: str


def export_run(workspace: Workspace, record: RunRecord, name: str) -> bytes:
    """The model that a run has published, or would publish now, in one of FORMATS.

    The published weights are used if the run has no others left.

    Raises:
        ConfigError: there is no such format, what it needs is not installed, or the run has no checkpoint yet.
        ExportError, CheckpointCorruptError, StorageError: as `export` and `weights_of`.
    """
    if not record.chosen:
        raise ConfigError(f"run {record.run_id} has no checkpoint yet: there is nothing to export")
    weights = weights_of(workspace.store, record)
    return _exporter(weights, record.train_config(), open_dataset(workspace, record.dataset))(name)


def weights_of(store: Store, record: RunRecord) -> dict[str, Tensor]:
    """The weights that a run ends with: those of the checkpoint that is published.

    If that checkpoint is damaged or gone and the run is finished, they are the published weights, once their
    `weights_sha256` has matched the record's. A warning names what is missing.

    Raises:
        CheckpointCorruptError: neither can be used; the message names both.
        StorageError: they cannot be read.
    """
    assert record.chosen
    try:
        return read_weights(store, record.chosen)
    except (StorageUnreachableError, StorageDeniedError):
        raise
    except (CheckpointCorruptError, StorageError) as error:
        if not record.result:
            raise
        why = str(error)
    key = version_key(record.dataset.name, record.run_id) + PUBLISHED_WEIGHTS
    try:
        # A checkpoint holds more than the weights: no such file is larger.
        body = store.download_bytes(key, max_bytes=record.chosen.bytes)
        weights = load_bounded(body, load_safetensors)
        if weights_sha256(weights) != record.result.weights_sha256:
            raise ValueError("they are not the weights that the run has ended with")
    except (StorageUnreachableError, StorageDeniedError):
        raise
    except Exception as error:  # as `read_tensors`: whoever can write to the bucket can write anything
        raise CheckpointCorruptError(
            f"the weights of run {record.run_id} are gone: neither of these can be used.\n{why}\n"
            f"{store.url(key)}: {error}"
        ) from error
    progress.current().warn(f"the published weights are used, as the checkpoint cannot be: {why}")
    return weights


def publish_model(
    workspace: Workspace, checkpoint: CheckpointRef, dataset_ref: DatasetRef, evaluated: Evaluation
) -> ModelRef:
    """Publish a run's evaluated checkpoint as a version of its model, unless it is published already.

    Raises:
        LeaseLostError: another trainer has taken the run over since.
        ConfigError: a version of this name is published with other weights.
        ExportError: a file does not predict what the model predicts; nothing is published.
        StorageError, CheckpointCorruptError: the weights cannot be read or stored.
    """
    name, version = dataset_ref.name, checkpoint.run_id
    with attached(workspace.store, checkpoint, workspace.lease_seconds) as run:
        if not workspace.store.head(card_key(name, version)):
            _publish(workspace, run.record, checkpoint, open_dataset(workspace, dataset_ref))
    card = read_card(workspace.store, name, version)
    if card.weights_sha256 != evaluated.weights_sha256:
        raise ConfigError(
            f"{card.ref().key} is published with other weights, by an earlier run of the same name. "
            "What is published never changes: train under another run id"
        )
    return card.ref()


def contents_of(
    record: RunRecord, weights: dict[str, Tensor], measured: Measured, predictions: bytes, dataset: Dataset
) -> tuple[ModelCard, dict[str, bytes]]:
    """What is published of a run: the card, which lists no files yet, and the files by name.

    Raises:
        ExportError: a file does not predict what the model predicts.
    """
    config, chosen = record.train_config(), record.chosen
    assert chosen
    exported = _exporter(weights, config, dataset)
    wanted = PUBLISHED | ({FOR_TRITON: "onnx"} if config.publish.triton else {})
    files = {file_name: exported(kind) for file_name, kind in wanted.items()}
    files[PREDICTIONS] = predictions
    mean, std = batches.pixel_statistics(dataset, config)
    card = ModelCard(
        name=dataset.name,
        version=record.run_id,
        run_id=record.run_id,
        architecture=config.model.name,
        classes=dataset.classes,
        image_size=dataset.image_size,
        resize=dataset.resize,
        input=f"float32 (batch, 3, {dataset.image_size}, {dataset.image_size}), RGB, "
        "(pixel - mean) / std with pixel 0…255",
        output="logits, float32 (batch, classes)",
        mean=mean,
        std=std,
        tta=config.evaluation.tta,
        test_accuracy=measured.accuracy,
        test_loss=measured.loss,
        weights_sha256=measured.weights_sha256,
        config=record.config,
        dataset_digest=dataset.digest,
        environment=record.environment,
        trained_at=chosen.written_at,
        parent=record.parent,
    )
    return card, files


def _publish(workspace: Workspace, record: RunRecord, checkpoint: CheckpointRef, dataset: Dataset) -> None:
    store = workspace.store
    metrics = evaluation.read_metrics(store, record.run_id)
    assert metrics is not None
    measured = Measured(metrics.accuracy, metrics.loss, metrics.weights_sha256)
    predictions = evaluation.read_predictions(store, metrics)
    publish_version(store, *contents_of(record, read_weights(store, checkpoint), measured, predictions, dataset))


def _exporter(weights: dict[str, Tensor], config: TrainConfig, dataset: Dataset) -> Callable[[str], bytes]:
    """`export` for these weights. Files are compared on the first test images."""
    classes, size = len(dataset.classes), dataset.image_size
    model = evaluation.load_model(config, weights, classes, image_size=size)
    fresh = build_network(config.model.name, classes, size).to(memory_format=torch.channels_last)
    count = max(2, min(_IMAGES, batches.images_at_a_time(size, classes, device_of(model))))
    images = few(dataset.test_images, count)
    if len(images) == 1:
        images = torch.cat([images, images])  # an exporter takes a batch of one for a batch that is always one
    inputs = batches.to_input(images, *batches.normalizer(dataset, config))
    return lambda name: export(model, fresh, inputs, name)
