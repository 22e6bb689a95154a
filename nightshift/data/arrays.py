"""Arrays in a safetensors file."""

import os
import re
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file


def write_arrays(path: str, arrays: dict[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; raises OSError if it cannot be written, as Python's own files do."""
    try:
        save_file(arrays, path, metadata=dict(metadata) if metadata else None)
    except SafetensorError as error:
        if not (found := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), path) from error
