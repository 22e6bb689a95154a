"""Ports for servers of our own.

They lie below those that the kernel gives to whoever connects to something (on Linux from 32,768 on). A connection of
another process could otherwise take the port of a server that is about to start, or to be started again, and keep it.
"""

import secrets
import socket
from contextlib import closing

_FIRST, _COUNT = 12_000, 10_000


def any_port() -> int:
    """One of 12,000 to 21,999, whoever listens there. 10,000 more is below the kernel's too."""
    return _FIRST + secrets.randbelow(_COUNT)


def is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1."""
    with closing(socket.socket()) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
