"""What processes have opened to others: TCP ports, and sockets in the file system."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

GRPC_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""How a gRPC client begins; a server that takes it answers with its settings."""
_ACCEPTS = "00010000"  # the kernel's __SO_ACCEPTCON


def listening(pid: int) -> dict[int, str]:
    """The kernel's address, in hexadecimal, of each TCP port on which a process listens; none if it has ended."""
    found = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        inodes = _inodes(pid)
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    address, port = fields[1].split(":")
                    found[int(port, 16)] = address
    return found


def unix_sockets(pid: int) -> list[Path]:
    """The sockets in the file system on which a process listens; none if it has ended."""
    with suppress(FileNotFoundError, ProcessLookupError):
        inodes, here = _inodes(pid), Path(f"/proc/{pid}/cwd").readlink()
        lines = [line.split() for line in Path(f"/proc/{pid}/net/unix").read_text().splitlines()[1:]]
        named = [line for line in lines if line[3] == _ACCEPTS and len(line) > 7]
        return [here / line[7] for line in named if f"socket:[{line[6]}]" in inodes]
    return []


def _inodes(pid: int) -> set[str]:
    """What the open files of a process are, such as `socket:[123]`."""
    found = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(fd.readlink()))
    return found


def tree(pid: int) -> Iterator[int]:
    """A process and all below it; what ends meanwhile is left out."""
    yield pid
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from tree(int(child))
