"""`nightshift …` as a process of its own, which a test starts, watches and kills."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forked


@dataclass
class Finished:
    """How a command ended."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """`nightshift …` with a process, a working directory, an environment and an output of its own.

    It is forked with its imports done, so what libraries read of the environment when they are loaded has no effect.
    """

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str], cwd: Path) -> None:
        (out, their_out), (err, their_err) = Pipe(duplex=False), Pipe(duplex=False)
        self.process = forked().Process(
            target=_run, args=(arguments, {**os.environ, **environment}, cwd, their_out, their_err)
        )
        self.process.start()
        their_out.close()
        their_err.close()
        self._out, self._err = _Output(out), _Output(err)

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def wait_for_line(self, text: str) -> None:
        """Wait until a line with `text` is on standard error, after those waited for before."""
        if not self._err.wait_for(text):
            pytest.fail(f"ended without printing {text!r}, but {self._err.text!r}")

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def finish(self, timeout: float = 600) -> Finished:
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"not ended after {timeout} s: {self._err.text}"
        return Finished(self.process.exitcode, self._out.until_its_end(), self._err.until_its_end())

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_installed(arguments: tuple[str, ...], environment: Mapping[str, str], cwd: Path) -> Finished:
    """The program as a user starts it, which imports all it needs."""
    program = Path(sys.executable).with_name("nightshift")
    done = subprocess.run(
        [program, *arguments],
        env={**os.environ, **environment},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


class _Output:
    """What a process prints, read while it does so."""

    def __init__(self, connection: Connection) -> None:
        self._lines: list[str] = []
        self._seen = 0
        self._is_open = True
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, args=(connection,), daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        return "".join(self._lines)

    def wait_for(self, text: str) -> bool:
        with self._changed:
            while True:
                while self._seen < len(self._lines):
                    self._seen += 1
                    if text in self._lines[self._seen - 1]:
                        return True
                if not self._is_open:
                    return False
                self._changed.wait()

    def until_its_end(self) -> str:
        self._reader.join(timeout=60)
        return self.text

    def _read(self, connection: Connection) -> None:
        with open(connection.fileno(), closefd=False) as stream:
            for line in stream:
                self._note(line)
        connection.close()
        self._note(None)

    def _note(self, line: str | None) -> None:
        with self._changed:
            if line is None:
                self._is_open = False
            else:
                self._lines.append(line)
            self._changed.notify_all()


def _run(
    arguments: tuple[str, ...], environment: Mapping[str, str], cwd: Path, out: Connection, err: Connection
) -> None:
    """In the forked process: become what the program would be, and run it."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    with open(os.devnull) as nothing:
        for number, file in enumerate((nothing.fileno(), out.fileno(), err.fileno())):
            os.dup2(file, number)
    out.close()
    err.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = ["nightshift", *arguments]
    from nightshift.cli import main

    try:
        main()
    finally:  # what Python does at the end of a program, and multiprocessing does not
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
