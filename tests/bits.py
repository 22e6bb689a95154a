"""Whether two states are the same to the last bit."""

import hashlib
from typing import Any

from torch import Tensor

from nightshift.checkpoints.payload import weights_sha256


def state_sha256(value: Any) -> str:
    """sha256 over every bit of a payload; the pickle's own bytes also depend on which strings are one object."""
    if isinstance(value, Tensor):
        value = [str(value.dtype), list(value.shape), weights_sha256({"": value})]
    if isinstance(value, dict):
        value = {key: state_sha256(part) for key, part in value.items()}
    elif isinstance(value, list | tuple):
        value = [state_sha256(part) if isinstance(part, dict | list | tuple | Tensor) else part for part in value]
    return hashlib.sha256(repr(value).encode()).hexdigest()
