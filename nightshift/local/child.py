"""A server's process as its supervisor sees it: started, and started again whenever it has died."""

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from nightshift import processes
from nightshift.disk import Room, is_full, room
from nightshift.local.logs import SERVER_LOG
from nightshift.local.secrets import written

FAILING = "failing"
"""The file that is there while a server dies as soon as it is started."""
_FEW_DEATHS = 5
"""How often in a row a server may die within _STABLE_SECONDS before it is said that it does not start."""
_STABLE_SECONDS = 60.0
_LONGEST_PAUSE = 10.0
_STOP_SECONDS = 5.0


class Child:
    """The process of a server. It does not run before `tend` is called, which has to be done again and again."""

    def __init__(self, directory: Path, command: Sequence[str], mended_by_room: bool) -> None:
        """`mended_by_room`: as for `supervisor.Server`."""
        self._directory, self._command, self._mended_by_room = directory, command, mended_by_room
        self._process: subprocess.Popen[bytes] | None = None
        self._started = self._due = 0.0
        self._deaths = 0
        self._was_stable = False
        self._room = Room.ENOUGH

    @property
    def is_hopeless(self) -> bool:
        """Whether it never ran for long, for a reason that will not pass by itself, unlike a full disk."""
        return self._is_failing and not self._was_stable

    @property
    def _is_failing(self) -> bool:
        return self._deaths > _FEW_DEATHS and not is_full(self._directory)

    def tend(self) -> None:
        """Start it if it does not run: at once after its first death, and after growing pauses if it dies again."""
        now = time.monotonic()
        if self._process and self._process.poll() is not None:
            self._has_died(f"it has ended with exit status {self._process.returncode}")
        elif self._process and now - self._started > _STABLE_SECONDS:
            self._was_stable, self._deaths = True, 0
        if self._is_mended_by_a_start():
            _note("the disk has room again: it is started anew")
            self.stop(_STOP_SECONDS)
            self._due = 0.0
        if not self._process and now >= self._due:
            try:
                self._start()
            except OSError as error:  # no room, or no such program: it may be there later
                self._has_died(f"it could not be started: {error}")
        with suppress(OSError):
            if self._is_failing:
                (self._directory / FAILING).touch()
            elif not self._deaths:
                (self._directory / FAILING).unlink(missing_ok=True)

    def stop(self, stop_seconds: float) -> None:
        """End it, within so many seconds by a SIGTERM, else by a SIGKILL."""
        if self._process:
            self._process.terminate()
            try:
                self._process.wait(stop_seconds)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process = None

    def _start(self) -> None:
        with open(self._directory / SERVER_LOG, "a") as log:
            # In its own directory, so that its sockets have short names: a path of more than 107 bytes is refused.
            process = subprocess.Popen(
                self._command, cwd=self._directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        try:
            written(self._directory / "server.pid", processes.identity(process.pid))
        except OSError:  # nobody would find it if its supervisor were killed
            process.kill()
            process.wait()
            raise
        self._process, self._started = process, time.monotonic()
        _note(f"started as process {process.pid}")

    def _has_died(self, how: str) -> None:
        _note(how)
        self._process = None
        self._deaths += 1
        pause = 0 if self._deaths == 1 else min(0.1 * 2**self._deaths, _LONGEST_PAUSE)
        self._due = time.monotonic() + pause

    def _is_mended_by_a_start(self) -> bool:
        """Whether the disk was full and no longer is, and the server does not find that out by itself."""
        if self._mended_by_room:
            return False
        self._room = min(self._room, room(self._directory))
        better = room(self._directory, margin=1.1)
        was_full, self._room = better > self._room, max(better, self._room)
        return was_full


def _note(what: str) -> None:
    """In the supervisor's log."""
    with suppress(OSError):
        print(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC  {what}", file=sys.stderr, flush=True)
