"""Arrays on a disk that has no room for them."""

import errno
import multiprocessing
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError

from nightshift.data.arrays import write_arrays


def _write_with_little_room(path: str) -> int:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        write_arrays(path, {"images": np.zeros(10_000, np.uint8)})
    except OSError as error:
        return error.errno or 0
    return 0


def test_a_disk_without_room_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_write_with_little_room, (str(tmp_path / "arrays"),)) == errno.EFBIG


def test_what_is_no_error_of_the_disk_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(SafetensorError):
        write_arrays(str(tmp_path / "arrays"), {"images": np.zeros(3, np.complex256)})
