"""Secrets of the local servers: files that only the user can read, each made once."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def made_once(path: Path, make: Callable[[], str]) -> str:
    """The text of a file that only the user can read. Whoever needs it first makes it, and its folder.

    Of several processes that come at the same moment one makes it, and all have its text.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not path.exists():
        handle, draft = tempfile.mkstemp(dir=path.parent)  # 0600, whatever the umask is
        with open(handle, "w") as file:
            file.write(make())
        with suppress(FileExistsError):  # another process was first, and its text counts
            path.hardlink_to(draft)
        Path(draft).unlink()
    return path.read_text()
