"""The formats in which a model is exported. Each file is read back and compared on real images before anyone gets it.

Full-module pickles (`torch.save(model)`) are not among them: they run code when they are loaded, and break when
the code moves. The tutorial warns of that too.
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

from nightshift.errors import ConfigError, ExportError
from nightshift.networks import exported_program

_TOLERANCE = 1e-5
"""How much probabilities may differ where other kernels do the arithmetic."""
_FEW = 16
"""On how many images at most a file is compared from which the same kernels have to compute the same bits."""


@dataclass(frozen=True)
class Format:
    """How a model is written to a file, and how the file is run on images.

    `run` takes the file's bytes, a freshly built network and normalized images (batch, 3, side, side); it returns
    logits (batch, classes).
    """

    write: Callable[[nn.Module, Tensor], bytes]
    run: Callable[[bytes, nn.Module, Tensor], Tensor]
    exact: bool


def export(model: nn.Module, fresh: nn.Module, inputs: Tensor, name: str) -> bytes:
    """The model in one of FORMATS: written, read back and compared.

    Args:
        model: on the CPU, in inference mode.
        fresh: the same architecture with any weights. Formats that hold only weights are read into it.
        inputs: normalized images, float32 (batch, 3, side, side), two or more.

    Raises:
        ConfigError: there is no such format, or what it needs is not installed.
        ExportError: it cannot be written, or the file does not predict what the model predicts.
    """
    if name not in FORMATS:
        raise ConfigError(f"there is no format {name!r}. The formats are: {', '.join(FORMATS)}")
    kind = FORMATS[name]
    if kind.exact:
        inputs = inputs[:_FEW]
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


def _run_network(network: nn.Module, weights: dict[str, Tensor], inputs: Tensor) -> Tensor:
    network.load_state_dict(weights)
    with torch.inference_mode():
        return network(inputs)  # type: ignore[no-any-return]


def _plain(model: nn.Module) -> dict[str, Tensor]:
    # Copies, because safetensors refuses two names for one tensor, as networks with tied weights have.
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in model.state_dict().items()}


def _write_state_dict(model: nn.Module, inputs: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(_plain(model), buffer)
    return buffer.getvalue()


def _write_pt2(model: nn.Module, inputs: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(exported_program(model, inputs), buffer)
    return buffer.getvalue()


def _run_pt2(body: bytes, fresh: nn.Module, inputs: Tensor) -> Tensor:
    program = torch.export.load(io.BytesIO(body)).module()
    with torch.inference_mode():
        program(inputs[:1])  # another batch size, which must be dynamic
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
    """Silence the exporters, which log a lot for their own developers."""
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
