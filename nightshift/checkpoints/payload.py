"""A checkpoint's payload: what is stored, and how it is read back without trusting it."""

import hashlib
import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nightshift.errors import CheckpointCorruptError, ObjectNotFoundError
from nightshift.records.run import Checkpoint
from nightshift.refs import CheckpointRef
from nightshift.storage.store import Store

Payload = dict[str, Any]


def read_payload(store: Store, checkpoint: Checkpoint | CheckpointRef) -> Payload:
    """A checkpoint's payload on the CPU, after its size and sha256 were checked.

    Nothing stored can execute: only tensors and plain values are accepted.

    Raises:
        CheckpointCorruptError: the object is missing, damaged, or not such a payload.
        StorageError: it cannot be read.
    """
    try:
        body = _verified_body(store, checkpoint)
    except CheckpointCorruptError:
        body = _verified_body(store, checkpoint)  # once more: it may only have been damaged on the way
    try:
        payload: Payload = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointCorruptError(
            f"refused, because it is not plain tensors and values: {str(error).splitlines()[0]}"
        ) from error
    return payload


def read_weights(store: Store, checkpoint: Checkpoint | CheckpointRef) -> dict[str, Tensor]:
    """The state_dict that is tested and published: the moving average of the weights, if the run keeps one.

    Raises:
        CheckpointCorruptError, StorageError: as `read_payload`.
    """
    payload = read_payload(store, checkpoint)
    weights: dict[str, Tensor] = payload["average"] or payload["model"]
    return weights


def _verified_body(store: Store, checkpoint: Checkpoint | CheckpointRef) -> bytes:
    try:
        body = store.download_bytes(checkpoint.key)
    except ObjectNotFoundError as error:
        raise CheckpointCorruptError("the object is missing") from error
    if len(body) != checkpoint.bytes:
        raise CheckpointCorruptError(f"it has {len(body)} bytes instead of {checkpoint.bytes}")
    if hashlib.sha256(body).hexdigest() != checkpoint.sha256:
        raise CheckpointCorruptError("its sha256 is not the recorded one")
    return body


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """sha256, hexadecimal, over each key's UTF-8 bytes and its tensor's contiguous bytes, keys sorted."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        digest.update(key.encode())
        digest.update(state_dict[key].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
