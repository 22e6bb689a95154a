"""Files that are whole or not there; how much room a disk has, and the sentence for when there is too little."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from typing import IO

_NOTHING_BYTES = 1_000_000
_LITTLE_SHARE = 0.01
"""SeaweedFS takes no new data while less of its disk is free. It looks once a minute."""


class Room(IntEnum):
    """What can be written."""

    NONE = 0
    LITTLE = 1
    """Something, but the embedded S3 server takes no new data."""
    ENOUGH = 2


@contextmanager
def complete_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def free_bytes(directory: Path) -> int:
    """The free bytes of a directory's disk, without those reserved for root, even if root asks.

    SeaweedFS counts the same way. Raises OSError if the disk cannot be queried.
    """
    found = os.statvfs(directory)
    return found.f_frsize * found.f_bavail


def room(directory: Path, margin: float = 1.0) -> Room:
    """How much room a directory's disk has. A margin of 1.1 raises each limit by a tenth."""
    found, free = os.statvfs(directory), free_bytes(directory)
    if (found.f_frsize * found.f_bfree if os.geteuid() == 0 else free) < margin * _NOTHING_BYTES:
        return Room.NONE
    is_little = free < margin * _LITTLE_SHARE * found.f_frsize * found.f_blocks
    return Room.LITTLE if is_little else Room.ENOUGH


def is_full(directory: Path) -> bool:
    """Whether the embedded S3 server would take no new data there, or nothing at all could be written."""
    return room(directory) < Room.ENOUGH


def explains_failure(directory: Path) -> bool:
    """Whether an operation that has just failed there may have failed for lack of room.

    The server's view may be a minute old. The margin allows for a tenth more room freed since.
    """
    return room(directory, margin=1.1) < Room.ENOUGH


def disk_is_full(directory: Path) -> str:
    """The sentence: how much is free, where, and what to do."""
    found = os.statvfs(directory)
    free, total = free_bytes(directory) / 1e6, found.f_frsize * found.f_blocks / 1e6
    return (
        f"the disk is full: {free:,.1f} of {total:,.0f} MB are free for {directory}, and the local store needs 1 %. "
        "Make room there, or delete what interrupted runs have left with `nightshift gc`, which works all the same. "
        "Then everything goes on by itself"
    )
