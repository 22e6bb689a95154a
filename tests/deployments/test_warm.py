"""A run of a warm worker is forked, and nobody notices; what would not be the same in a new Python gets one."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.forkserver import ForkServer
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from deployments import warm
from deployments.warm import Forks
from tests.conftest import eventually

PROGRAM = """
import atexit, gc, json, os, pathlib, signal, sys

atexit.register(pathlib.Path("at-exit").touch)
imported = {"torch", "prefect.flow_engine"} <= set(sys.modules)
of_its_own = len(gc.get_objects())  # the others are the server's, which are not searched for garbage
import numpy
found = {"imported": imported, "argv": len(sys.argv), "name": __name__, "directory": os.getcwd(), "path": sys.path[0]}
found["few_objects"] = of_its_own < 10_000
drawn = numpy.random.random()
pathlib.Path("found.json").write_text(json.dumps({**found, "environment": dict(os.environ), "drawn": drawn}))
if os.environ.get("NIGHTSHIFT_WAITS"):
    signal.pause()
sys.exit(3)
"""


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    """With a server of its own. That of the other tests has not imported Prefect."""
    server = ForkServer()
    with pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ):
        for name in ("set_forkserver_preload", "ensure_running", "connect_to_new_process", "get_inherited_fds"):
            patch.setattr(forkserver, name, getattr(server, name))
        yield Forks()
        server._stop()  # type: ignore[attr-defined]


@pytest.fixture
def begin(forks: Forks, tmp_path: Path) -> Callable[..., tuple[BaseProcess, Path]]:
    """Start the program in a directory of its own, and wait until it has said what it found."""

    def start(name: str = "run", **changed: str) -> tuple[BaseProcess, Path]:
        directory = tmp_path / name
        directory.mkdir(exist_ok=True)
        (directory / "program.py").write_text(PROGRAM)
        process = forks.start("program", {**forks.environment, **changed}, directory)
        eventually((directory / "found.json").exists)
        return process, directory

    return start


def found(directory: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((directory / "found.json").read_text())
    return read


def test_a_run_has_its_own_environment_directory_and_exit_code_and_nothing_left_to_import(
    begin: Callable[..., tuple[BaseProcess, Path]], forks: Forks
) -> None:
    process, directory = begin(NIGHTSHIFT_S3__PREFIX="its-own")
    process.join()
    assert process.exitcode == 3
    assert (directory / "at-exit").exists()
    told = found(directory)
    assert told.pop("drawn") != found(begin("another")[1])["drawn"]
    assert told == {
        **{
            "imported": True,
            "few_objects": True,
            "argv": 1,
            "name": "__main__",
            "directory": str(directory),
            "path": str(directory),
        },
        "environment": {**forks.environment, "NIGHTSHIFT_S3__PREFIX": "its-own"},
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_run_as_it_ends_any_process(
    begin: Callable[..., tuple[BaseProcess, Path]], number: signal.Signals
) -> None:
    process, _ = begin(NIGHTSHIFT_WAITS="1")
    assert process.pid
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == -number


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OMP_NUM_THREADS", "7"),
        ("PREFECT_TASKS_REFRESH_CACHE", "true"),
        ("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "ERROR"),
    ],
)
def test_an_environment_that_imports_may_read_gets_a_new_python(
    begin: Callable[..., tuple[BaseProcess, Path]], name: str, value: str
) -> None:
    process, directory = begin(**{name: value})
    process.join()
    assert process.exitcode == 3
    told = found(directory)
    assert (told["imported"], told["environment"][name]) == (False, value)


def test_prefects_settings_may_be_spelled_out(begin: Callable[..., tuple[BaseProcess, Path]], forks: Forks) -> None:
    assert "PREFECT_FLOWS_DEFAULT_RETRIES" not in forks.environment
    assert found(begin(PREFECT_FLOWS_DEFAULT_RETRIES="0")[1])["imported"]


def test_settings_of_prefects_in_a_file_get_a_new_python(
    begin: Callable[..., tuple[BaseProcess, Path]], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "prefect.toml").write_text("[tasks]\nrefresh_cache = true\n")
    assert not found(begin()[1])["imported"]


def test_a_server_with_a_thread_more_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "_THREADS", 0)
    assert "a thread more" in str(warm._reason_for_a_new_python())


def test_code_that_was_replaced_gets_a_new_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.touch()
    monkeypatch.setattr(warm, "_IMPORTED", {str(module): warm._version(str(module))})
    assert str(module) not in str(warm._reason_for_a_new_python())
    module.write_text("upgraded = True")
    assert f"{module} is another file" in str(warm._reason_for_a_new_python())
    module.unlink()
    assert f"{module} is another file" in str(warm._reason_for_a_new_python())
