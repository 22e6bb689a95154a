"""Which TCP ports processes have opened to others."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def listening(pid: int) -> dict[int, str]:
    """The kernel's address, in hexadecimal, of each TCP port on which a process listens; none if it has ended."""
    inodes, found = set(), {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                inodes.add(str(fd.readlink()))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                    address, port = fields[1].split(":")
                    found[int(port, 16)] = address
    return found


def tree(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from tree(int(child))
