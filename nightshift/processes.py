"""Names for processes that no other process will ever bear, and whether the named one still lives."""

import os
import secrets
import socket
from pathlib import Path
from typing import Literal


def identity(pid: int) -> str:
    """This boot of this machine, this pid namespace, the pid, its start time in ticks; empty if it does not run."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    is_zombie = fields[0] == "Z"
    return "" if is_zombie else f"{boot} {namespace} {pid} {fields[19]}"


def signature() -> str:
    """Host, pid and random characters, for people to read; no two calls anywhere return the same."""
    return f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"


def state_of(name: str) -> Literal["alive", "dead", "unknown"]:
    """Whether the process with this identity lives; `unknown` for one of another machine or container."""
    ours, theirs = identity(os.getpid()).split(), name.split()
    if len(ours) != 4 or len(theirs) != 4 or ours[:2] != theirs[:2]:
        return "unknown"
    return "alive" if identity(int(theirs[2])) == name else "dead"
