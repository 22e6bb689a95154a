"""From an evaluated checkpoint to a published version, and to files for others."""

from collections.abc import Callable

import torch
from torch import Tensor

from models import build_model
from nightshift.checkpoints.payload import read_weights
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.errors import ConfigError
from nightshift.judging import evaluation, gate
from nightshift.publishing.export import export
from nightshift.records.lease import attached
from nightshift.records.run import RunRecord
from nightshift.records.versions import ModelCard, card_key, publish_version, read_card
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation, ModelRef
from nightshift.workspace import Workspace

_IMAGES = 256
"""How many test images an exported file is compared on; fewer if they are large, and two at least."""
PUBLISHED = {"weights.pth": "state_dict", "weights.safetensors": "safetensors", "model.pt2": "pt2"}


def export_run(workspace: Workspace, record: RunRecord, name: str) -> bytes:
    """The model of a run's newest checkpoint in one of FORMATS.

    Raises:
        ConfigError: there is no such format, what it needs is not installed, or the run has no checkpoint yet.
        ExportError, CheckpointCorruptError, StorageError: as `export` and `read_payload`.
    """
    if not record.checkpoints:
        raise ConfigError(f"run {record.run_id} has no checkpoint yet: there is nothing to export")
    weights = read_weights(workspace.store, record.checkpoints[-1])
    return _exporter(weights, record.train_config(), open_dataset(workspace, record.dataset))(name)


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


def _publish(workspace: Workspace, record: RunRecord, checkpoint: CheckpointRef, dataset: Dataset) -> None:
    store, config = workspace.store, record.train_config()
    metrics = evaluation.read_metrics(store, record.run_id)
    assert metrics is not None
    weights = read_weights(store, checkpoint)
    exported = _exporter(weights, config, dataset)
    files = {file_name: exported(kind) for file_name, kind in PUBLISHED.items()}
    files[gate.PREDICTIONS] = evaluation.read_predictions(store, metrics)
    mean, std = batches.pixel_statistics(dataset, config.data.normalization)
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
        test_accuracy=metrics.accuracy,
        test_loss=metrics.loss,
        weights_sha256=metrics.weights_sha256,
        config=record.config,
        dataset_digest=dataset.digest,
        environment=record.environment,
        trained_at=record.checkpoints[-1].written_at,
    )
    publish_version(store, card, files)


def _exporter(weights: dict[str, Tensor], config: TrainConfig, dataset: Dataset) -> Callable[[str], bytes]:
    """`export` for these weights. Files are compared on the first test images."""
    classes, size = len(dataset.classes), dataset.image_size
    model = evaluation.load_model(config, weights, classes, image_size=size)
    fresh = build_model(config.model.name, classes, size).to(memory_format=torch.channels_last)
    count = max(2, min(_IMAGES, evaluation.images_at_a_time(size, classes)))
    images = dataset.test_images[:count]
    if len(images) == 1:
        images = torch.cat([images, images])  # an exporter takes a batch of one for a batch that is always one
    inputs = batches.to_input(images, *batches.normalizer(dataset, config.data.normalization))
    return lambda name: export(model, fresh, inputs, name)
