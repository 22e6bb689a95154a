"""How good the stored weights are: read back from the store, verified, and never taken from memory."""

import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_accuracy

from models import build_model
from nightshift import batches, checkpoints, runs
from nightshift.datasets import open_dataset
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation
from nightshift.settings import TrainConfig
from nightshift.state import weights_sha256
from nightshift.training import pick_device
from nightshift.workspace import Workspace

_BATCH = 1000


def evaluate(workspace: Workspace, checkpoint: CheckpointRef, dataset_ref: DatasetRef) -> Evaluation:
    """Accuracy and mean cross-entropy of a checkpoint's model on all test images, in inference mode.

    Raises:
        LeaseLostError: another trainer has taken the run over since.
        CheckpointCorruptError: the stored payload is not what its record says.
        StorageError: it cannot be read.
    """
    with runs.attached(workspace.store, checkpoint, workspace.lease_seconds) as run:
        return _evaluate(workspace, run.record.train_config(), checkpoint, dataset_ref)


def _evaluate(
    workspace: Workspace, config: TrainConfig, checkpoint: CheckpointRef, dataset_ref: DatasetRef
) -> Evaluation:
    weights = checkpoints.read(workspace.store, checkpoint)["model"]
    dataset, device = open_dataset(workspace, dataset_ref), pick_device(config)
    model = build_model(config.model, len(dataset.classes))
    model.load_state_dict(weights)
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    scale, shift = (part.to(device) for part in batches.normalizer(dataset, config.normalization))
    with torch.inference_mode():
        logits = torch.cat(
            [
                model(batches.to_input(images.to(device), scale, shift)).cpu()
                for images in torch.split(dataset.test_images, _BATCH)
            ]
        )
    labels = dataset.test_labels.long()
    return Evaluation(
        accuracy=float(multiclass_accuracy(logits, labels, len(dataset.classes), average="micro")),
        loss=float(F.cross_entropy(logits, labels)),
        images=len(labels),
        weights_sha256=weights_sha256(weights),
    )
