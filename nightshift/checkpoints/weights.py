"""Weights that others have trained, in files of others. Reading them runs no code.

In the store lies only what `read_weights` reads, which believes no byte. A file that only torch itself can read is
written anew before it is stored.
"""

import io
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from nightshift.checkpoints.archive import read_archive
from nightshift.errors import ConfigError
from nightshift.records.versions import ModelCard, load_bounded, read_tensors
from nightshift.storage.store import Store

PUBLISHED_WEIGHTS = "weights.safetensors"
"""The file of a version that has its state_dict."""
_WRAPPERS = ("state_dict", "model_state_dict", "model", "state_dict_ema", "model_ema")
"""Under which a file may have its weights, beside what else was saved of a training."""


def read_weights(body: bytes) -> dict[str, Tensor]:
    """The tensors of a file by name, in its order: one of safetensors, or one that `torch.save` has written.

    Raises:
        ConfigError: it holds no weights. The message is a phrase about the file.
        Exception: of any other kind, if it is neither.
    """
    return _tensors(load_bounded(body, load_safetensors) if _is_safetensors(body) else read_archive(body))


def published_weights(store: Store, card: ModelCard) -> dict[str, Tensor]:
    """The state_dict of a published version, whose sha256 was found right.

    Raises:
        DocumentDamagedError: it is not what was published.
        StorageError: it cannot be read.
    """
    return read_tensors(store, card, PUBLISHED_WEIGHTS, load_safetensors)


def importable(body: bytes) -> bytes:
    """The file, or another with the same tensors, such that `read_weights` can read it.

    Raises:
        ConfigError: it holds no weights. The message is a phrase about the file.
    """
    try:
        read_weights(body)
    except ConfigError:
        raise
    except Exception:  # what torch has written before 2020, or with more than plain values
        return written(_tensors(_loaded(body)))
    return body


def written(weights: dict[str, Tensor]) -> bytes:
    """A file of these tensors, in their order."""
    body = io.BytesIO()
    torch.save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}, body)
    return body.getvalue()


def _loaded(body: bytes) -> Any:
    try:
        return torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except Exception as error:  # it raises anything on bytes that nobody has written
        raise ConfigError("is neither a file of safetensors nor one of torch that holds weights only") from error


def _tensors(found: Any) -> dict[str, Tensor]:
    for wrapper in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError("holds no weights: they are tensors, each under a name")
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}


def _is_safetensors(body: bytes) -> bool:
    return body[8:9] == b"{"
