"""The formats a trained model is given away in. Each is read back and compared on real images before anyone gets it.

Full-module pickles (`torch.save(model)`) are not among them: they run code when they are loaded, and break when
the code moves, as the tutorial warns of too.
"""

import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from models import build_model
from nightshift import batches, checkpoints, evaluation, gate, registry, runs
from nightshift.datasets import Dataset, open_dataset
from nightshift.errors import ConfigError, ExportError
from nightshift.records import RunRecord
from nightshift.refs import CheckpointRef, DatasetRef, Evaluation, ModelRef
from nightshift.settings import TrainConfig
from nightshift.workspace import Workspace

_IMAGES = 256
"""So many test images are compared on."""
_TOLERANCE = 1e-5
"""By which probabilities may differ where other kernels do the arithmetic."""
PUBLISHED = {"weights.pth": "state_dict", "weights.safetensors": "safetensors", "model.pt2": "pt2"}


@dataclass(frozen=True)
class Format:
    """How a model becomes a file, and what the file makes of images.

    `run` takes the file's bytes, a freshly built network and normalized images (batch, 3, 32, 32); it returns
    logits (batch, classes).
    """

    write: Callable[[nn.Module, Tensor], bytes]
    run: Callable[[bytes, nn.Module, Tensor], Tensor]
    exact: bool


def export(model: nn.Module, fresh: nn.Module, inputs: Tensor, name: str) -> bytes:
    """The model in one of FORMATS, after what was written was read back and compared.

    Args:
        model: on the CPU, in inference mode.
        fresh: the same architecture with any weights; those formats that hold only weights are read into it.
        inputs: normalized images, float32 (batch, 3, 32, 32).

    Raises:
        ConfigError: there is no such format, or what it needs is not installed.
        ExportError: it cannot be written, or the file does not do what the model does.
    """
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}. The formats are: {', '.join(FORMATS)}")
    kind = FORMATS[name]
    with torch.inference_mode():
        expected = model(inputs)
    try:
        with _quiet():
            body = kind.write(model, inputs)
            found = kind.run(body, fresh.eval(), inputs)
    except ImportError as error:
        raise ConfigError(
            f"the format {name} needs a package that is not here ({error.name}): install nightshift[onnx]"
        ) from error
    except Exception as error:  # whatever the exporter stumbles on in somebody's network
        raise ExportError(f"the model cannot be exported as {name}: {type(error).__name__}: {error}") from error
    difference = float((found.softmax(1) - expected.softmax(1)).abs().max())
    if not (torch.equal(found, expected) if kind.exact else difference <= _TOLERANCE):
        raise ExportError(
            f"the model read back from {name} is another one: on {len(inputs)} test images its probabilities differ by "
            f"up to {difference:.1e}. Nothing was written; the checkpoint is untouched"
        )
    return body


def export_run(workspace: Workspace, record: RunRecord, name: str) -> bytes:
    """The model of a run's newest checkpoint in one of FORMATS.

    Raises:
        ConfigError: there is no such format, what it needs is not installed, or the run has no checkpoint yet.
        ExportError, CheckpointCorruptError, StorageError: as `export` and `checkpoints.read`.
    """
    if not record.checkpoints:
        raise ConfigError(f"run {record.run_id} has no checkpoint yet: there is nothing to export")
    weights = checkpoints.read_weights(workspace.store, record.checkpoints[-1])
    return _exporter(weights, record.train_config(), open_dataset(workspace, record.dataset))(name)


def publish(
    workspace: Workspace, checkpoint: CheckpointRef, dataset_ref: DatasetRef, evaluated: Evaluation
) -> ModelRef:
    """Publish a run's evaluated checkpoint as a version of its model, unless it is published.

    Raises:
        LeaseLostError: another trainer has taken the run over since.
        ConfigError: a version of this name is published, with other weights.
        ExportError: a file does not do what the model does; nothing is published.
        StorageError, CheckpointCorruptError: the weights cannot be read or stored.
    """
    name, version = dataset_ref.name, checkpoint.run_id
    key = registry.version_key(name, version)
    with runs.attached(workspace.store, checkpoint, workspace.lease_seconds) as run:
        if not workspace.store.head(key + "card.json"):
            _publish(workspace, run.record, checkpoint, open_dataset(workspace, dataset_ref))
    card = registry.read_card(workspace.store, name, version)
    if card["weights_sha256"] != evaluated.weights_sha256:
        raise ConfigError(
            f"{key} is published with other weights, by an earlier run of the same name. "
            "What is published never changes: train under another run id"
        )
    return ModelRef(
        name=name,
        version=version,
        run_id=version,
        key=key,
        test_accuracy=card["test_accuracy"],
        weights_sha256=card["weights_sha256"],
    )


def _publish(workspace: Workspace, record: RunRecord, checkpoint: CheckpointRef, dataset: Dataset) -> None:
    store, config = workspace.store, record.train_config()
    metrics = evaluation.read_metrics(store, record.run_id)
    assert metrics is not None
    weights = checkpoints.read_weights(store, checkpoint)
    exported = _exporter(weights, config, dataset)
    files = {file_name: exported(kind) for file_name, kind in PUBLISHED.items()}
    files[gate.PREDICTIONS] = evaluation.read_predictions(store, metrics)
    mean, std = batches.pixel_statistics(dataset, config.normalization)
    card = {
        "run_id": record.run_id,
        "architecture": config.model,
        "classes": dataset.classes,
        "input": "float32 (batch, 3, 32, 32), RGB, (pixel - mean) / std with pixel 0…255",
        "output": "logits, float32 (batch, classes)",
        "mean": mean,
        "std": std,
        "tta": config.tta,
        "test_accuracy": metrics.accuracy,
        "test_loss": metrics.loss,
        "weights_sha256": metrics.weights_sha256,
        "config": record.config,
        "dataset_digest": dataset.digest,
        "environment": record.environment,
        "trained_at": record.checkpoints[-1].written_at.isoformat(),
    }
    registry.publish(store, dataset.name, record.run_id, files, card)


def _exporter(weights: dict[str, Tensor], config: TrainConfig, dataset: Dataset) -> Callable[[str], bytes]:
    """`export` of these weights, compared on the first test images."""
    model = evaluation.load_model(config, weights, len(dataset.classes))
    fresh = build_model(config.model, len(dataset.classes)).to(memory_format=torch.channels_last)
    inputs = batches.to_input(dataset.test_images[:_IMAGES], *batches.normalizer(dataset, config.normalization))
    return lambda name: export(model, fresh, inputs, name)


def _run_network(network: nn.Module, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    network.load_state_dict(weights)
    with torch.inference_mode():
        return network(inputs)  # type: ignore[no-any-return]


def _plain(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.contiguous() for key, tensor in model.state_dict().items()}


def _write_state_dict(model: nn.Module, inputs: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(_plain(model), buffer)
    return buffer.getvalue()


def _write_pt2(model: nn.Module, inputs: Tensor) -> bytes:
    buffer = io.BytesIO()
    program = torch.export.export(model, (inputs,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _run_pt2(body: bytes, fresh: nn.Module, inputs: Tensor) -> Tensor:
    program = torch.export.load(io.BytesIO(body)).module()
    with torch.inference_mode():
        program(inputs[:1])  # another batch size: it has to be dynamic
        return program(inputs)  # type: ignore[no-any-return]


def _write_onnx(model: nn.Module, inputs: Tensor) -> bytes:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        importlib.import_module(package)  # the exporter does not say which one it lacks
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            (inputs,),
            path,
            dynamo=True,
            verbose=False,
            external_data=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
        return path.read_bytes()


def _run_onnx(body: bytes, fresh: nn.Module, inputs: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(body, providers=["CPUExecutionProvider"])
    session.run(None, {"images": inputs[:1].numpy()})
    return torch.from_numpy(session.run(None, {"images": inputs.contiguous().numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters tell their own developers a lot."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.export", "torch.onnx", "onnxscript"))}
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)


FORMATS = {
    "state_dict": Format(
        _write_state_dict,
        lambda body, fresh, inputs: _run_network(fresh, torch.load(io.BytesIO(body), weights_only=True), inputs),
        exact=True,
    ),
    "safetensors": Format(
        lambda model, inputs: save_safetensors(_plain(model)),
        lambda body, fresh, inputs: _run_network(fresh, load_safetensors(body), inputs),
        exact=True,
    ),
    "pt2": Format(_write_pt2, _run_pt2, exact=False),
    "onnx": Format(_write_onnx, _run_onnx, exact=False),
}
