"""A checkpoint's payload: what is stored, and how it is read back without trusting it."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from mmap import ACCESS_COPY, mmap
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from nightshift.checkpoints.archive import read_archive
from nightshift.errors import CheckpointCorruptError, ObjectNotFoundError, ObjectTooLargeError
from nightshift.explain import problem_of
from nightshift.records.curve import CurvePoint
from nightshift.records.run import Checkpoint
from nightshift.refs import CheckpointRef
from nightshift.storage.store import Store

Payload = dict[str, Any]


def _like(dtype: torch.dtype, *shape: int) -> AfterValidator:
    def check(tensor: Tensor) -> Tensor:
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(f"it is {described(tensor)} instead of {dtype} {shape}")
        return tensor

    return AfterValidator(check)


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class _Generators(_Part):
    numpy: Annotated[
        tuple[
            Literal["MT19937"],
            Annotated[Tensor, _like(torch.int64, 624)],
            Annotated[int, Field(ge=0, le=624)],  # numpy would read beyond its state
            Annotated[int, Field(ge=0, le=1)],
            float,
        ],
        BeforeValidator(lambda said: tuple(said) if isinstance(said, list) else said),
    ]
    torch: Tensor
    cuda: list[Tensor]


class _RankPart(_Part):
    epoch_loss: Annotated[Tensor, _like(torch.float64)]
    epoch_correct: Annotated[Tensor, _like(torch.int64)]
    rng: _Generators


class _Optimizer(_Part):
    state: dict[int, dict[str, Tensor | float | None]]
    precision: Literal["float32", "bfloat16"] = "bfloat16"


class _Contents(_Part):
    """What `TrainState.restore` reads, as far as it does not depend on the network."""

    model: dict[str, Tensor]
    average: dict[str, Tensor]
    optimizer: _Optimizer
    step: int
    epoch_images: Annotated[int, Field(ge=0)]
    curve: list[CurvePoint]
    ranks: Annotated[list[_RankPart], Field(min_length=1)]


def read_payload(
    store: Store, checkpoint: Checkpoint | CheckpointRef, check: Callable[[Payload], object] | None = None
) -> Payload:
    """A checkpoint's payload on the CPU, after its size and sha256 were checked, and what it says.

    Nothing stored can execute, or take more memory than its size says: only tensors and plain values are read.

    Args:
        check: called with the payload; raises CheckpointCorruptError if it is none of the network that is meant.

    Raises:
        CheckpointCorruptError: the object is missing, damaged, or not the payload of this step. The message is the
            reason; whoever asked names the checkpoint.
        StorageError: it cannot be read.
    """
    body = None
    with suppress(CheckpointCorruptError):  # it may only have been damaged on the way
        body = _verified_body(store, checkpoint)
    if body is None:
        body = _verified_body(store, checkpoint)
    try:
        payload: Payload = read_archive(body)
    except Exception as error:  # readers raise anything on bytes that nobody has written
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise CheckpointCorruptError(f"refused, because it is not plain tensors and values: {reason:.200}") from error
    try:
        step = _Contents.model_validate(payload).step
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise CheckpointCorruptError(f"{where:.200}: {problem_of(first)}") from error
    if step != checkpoint.step:
        raise CheckpointCorruptError(f"it is of step {step:,}, not of {checkpoint.step:,}")
    if check:
        check(payload)
    return payload


def read_weights(store: Store, checkpoint: Checkpoint | CheckpointRef) -> dict[str, Tensor]:
    """The state_dict that is tested and published: the moving average of the weights, if the run keeps one.

    Raises:
        CheckpointCorruptError, StorageError: as `read_payload`.
    """
    try:
        payload = read_payload(store, checkpoint)
    except CheckpointCorruptError as error:
        raise CheckpointCorruptError(
            f"{store.url(checkpoint.key)}: {error}. Resume the run: it goes on from the checkpoint before"
        ) from error
    weights: dict[str, Tensor] = payload["average"] or payload["model"]
    return weights


def check_weights(weights: Mapping[str, Tensor], network: nn.Module, where: str = "") -> None:
    """Raise CheckpointCorruptError, with the name of the first that differs, unless the network can have these weights.

    Its own names, shapes and dtypes decide. `where` is put before a name in a message.
    """
    expected = network.state_dict()
    for name in [*expected, *weights]:
        if name not in weights:
            raise CheckpointCorruptError(f"{where}{name} is missing")
        if name not in expected:
            raise CheckpointCorruptError(f"{where}{name:.80} is nothing that the network has")
        found, wanted = described(weights[name]), described(expected[name])
        if found != wanted:
            raise CheckpointCorruptError(f"{where}{name} is {found} instead of {wanted}")


def described(tensor: Tensor) -> str:
    """A tensor's dtype and shape, for messages."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _verified_body(store: Store, checkpoint: Checkpoint | CheckpointRef) -> bytes | mmap:
    try:
        body = _downloaded(store, checkpoint)
    except ObjectNotFoundError as error:
        raise CheckpointCorruptError("the object is missing") from error
    except ObjectTooLargeError as error:
        raise CheckpointCorruptError(f"it has more than {checkpoint.bytes} bytes") from error
    if len(body) != checkpoint.bytes:
        raise CheckpointCorruptError(f"it has {len(body)} bytes instead of {checkpoint.bytes}")
    if hashlib.sha256(body).hexdigest() != checkpoint.sha256:
        raise CheckpointCorruptError("its sha256 is not the recorded one")
    return body


def _downloaded(store: Store, checkpoint: Checkpoint | CheckpointRef) -> bytes | mmap:
    """The object as memory mapped from an unnamed file: the kernel can take its pages back at any time.

    Pages that are written to stay in memory. The whole object is in memory if the temporary folder has no room for two
    such files, or is itself memory (tmpfs).
    """
    try:
        if shutil.disk_usage(tempfile.gettempdir()).free > 2 * checkpoint.bytes:
            with tempfile.TemporaryFile() as file:
                store.download(checkpoint.key, file, max_bytes=checkpoint.bytes)
                file.flush()
                return mmap(file.fileno(), 0, access=ACCESS_COPY) if os.fstat(file.fileno()).st_size else b""
    except OSError:
        pass  # nothing can be written there
    return store.download_bytes(checkpoint.key, max_bytes=checkpoint.bytes)


def weights_sha256(state_dict: Mapping[str, Tensor]) -> str:
    """sha256, hexadecimal, over each key's UTF-8 bytes and its tensor's contiguous bytes, keys sorted."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        digest.update(key.encode())
        digest.update(state_dict[key].detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
