"""The formats a trained model is published in.

Full-module pickles are not among them: they run code when they are loaded and break when the code moves.
"""

import io
from collections.abc import Mapping

import torch
from safetensors.torch import save as save_safetensors
from torch import Tensor

from nightshift import checkpoints, registry, runs
from nightshift.batches import pixel_statistics
from nightshift.datasets import Dataset, open_dataset
from nightshift.records import Result
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation, ModelRef
from nightshift.runs import Run
from nightshift.workspace import Workspace


def weight_files(weights: Mapping[str, Tensor]) -> dict[str, bytes]:
    """A state_dict as `weights.pth` (for `torch.load(weights_only=True)`) and `weights.safetensors`."""
    plain = {key: tensor.contiguous() for key, tensor in weights.items()}
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return {"weights.pth": buffer.getvalue(), "weights.safetensors": save_safetensors(plain)}


def publish(
    workspace: Workspace, checkpoint: CheckpointRef, dataset_ref: DatasetRef, evaluation: Evaluation
) -> ModelRef:
    """Publish a run's evaluated checkpoint as a version of its model and mark the run finished.

    Raises:
        LeaseLostError: another trainer has taken the run over since.
        StorageError, CheckpointCorruptError: the weights cannot be read or stored.
    """
    with runs.attached(workspace.store, checkpoint, workspace.lease_seconds) as run:
        result = _publish(run, checkpoint, open_dataset(workspace, dataset_ref), evaluation)
        if run.record.status != "finished":
            run.end("finished", result=result)
    return ModelRef(
        name=dataset_ref.name,
        version=checkpoint.run_id,
        run_id=checkpoint.run_id,
        key=result.model,
        test_accuracy=result.test_accuracy,
        weights_sha256=result.weights_sha256,
    )


def _publish(run: Run, checkpoint: CheckpointRef, dataset: Dataset, evaluation: Evaluation) -> Result:
    store, record = run.store, run.record
    mean, std = pixel_statistics(dataset, record.config["normalization"])
    files = weight_files(checkpoints.read(store, checkpoint)["model"])
    card = {
        "run_id": record.run_id,
        "architecture": record.config["model"],
        "classes": dataset.classes,
        "input": "float32 (batch, 3, 32, 32), RGB, (pixel - mean) / std with pixel 0…255",
        "mean": mean,
        "std": std,
        "test_accuracy": evaluation.accuracy,
        "test_loss": evaluation.loss,
        "weights_sha256": evaluation.weights_sha256,
        "config": record.config,
        "dataset_digest": dataset.digest,
        "environment": record.environment,
        "trained_at": record.checkpoints[-1].written_at.isoformat(),
    }
    key = registry.publish(store, dataset.name, record.run_id, files, card)
    return Result(
        test_accuracy=evaluation.accuracy,
        test_loss=evaluation.loss,
        weights_sha256=evaluation.weights_sha256,
        model=key,
    )
