"""Names that no other process will ever have, whether such a process is still alive, and how children end."""

import getpass
import multiprocessing
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Literal

from nightshift.text import plain


def identity(pid: int) -> str:
    """A process' boot id, pid namespace, pid and start time in ticks, space-separated; empty if it is not running."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    is_zombie = fields[0] == "Z"
    return "" if is_zombie else f"{boot} {namespace} {pid} {fields[19]}"


def new_writer_id() -> str:
    """A name to sign a write with: host, pid and random characters. No two calls anywhere return the same."""
    return f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"


def user_at_host() -> str:
    """Who runs this process, for people: USER@HOST, where USER is a number if it has no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user need not have a name
        user = str(os.getuid())
    return plain(f"{user}@{socket.gethostname()}")[:200]


def state_of(name: str) -> Literal["alive", "dead", "unknown"]:
    """Whether the process with this identity is alive; `unknown` on another machine or in another container."""
    ours, theirs = identity(os.getpid()).split(), name.split()
    if len(ours) != 4 or len(theirs) != 4 or ours[:2] != theirs[:2] or not theirs[2].isdecimal():
        return "unknown"
    return "alive" if identity(int(theirs[2])) == name else "dead"


def end_with_parent() -> None:
    """See to it that this child process does not outlive its parent: the pipes that its siblings hold would keep it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)
