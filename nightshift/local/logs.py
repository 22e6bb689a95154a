"""The logs of local servers: appended to, and cut before they fill a disk."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

SERVER_LOG = "server.log"
"""What a server prints. Whatever is cut off stands in server.log.1."""
SUPERVISOR_LOG = "supervisor.log"
"""When a server was started, and how it ended."""
_LONGEST_BYTES = 10_000_000


def keep_short(log: Path) -> None:
    """Once a log is long, move its content to the file `.1` beside it, which is overwritten.

    A process that has opened the log for appending goes on writing to it. A line written meanwhile may be lost.
    """
    with suppress(OSError):  # there is no log yet, or no room for two
        if log.stat().st_size > _LONGEST_BYTES:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else "(no log)"
