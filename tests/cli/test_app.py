"""What every command line has: a version, and completion in the shell."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).with_name("nightshift"))


def test_the_version_printed_is_that_of_the_installed_package() -> None:
    done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"nightshift {version('nightshift')}\n")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("nightshift tr", ["train"]),
        ("nightshift roll", ["rollback"]),
        ("nightshift train --set optimizer.lr", ["optimizer.lr="]),
    ]
    + [(f"nightshift {command} --recipe s", ["speedrun"]) for command in ("train", "submit", "sweep")],
)
def test_the_shell_completes_commands_recipes_and_fields(typed: str, completed: list[str]) -> None:
    environment = {"_NIGHTSHIFT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = subprocess.run([PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.stdout.split() == completed


@pytest.mark.parametrize(("arguments", "code", "printed"), [(["recipes", "--json"], 0, "quick"), (["show"], 2, "")])
def test_a_program_that_ends_at_once_has_its_exit_code_has_printed_all_and_has_cleared_up(
    tmp_path: Path, arguments: list[str], code: int, printed: str
) -> None:
    # Registered while the command runs, as by the libraries that it imports.
    program = f"""
import atexit, pathlib, sys
from nightshift.cli import common, program
run, sys.argv = common.app, ["nightshift", *{arguments!r}]
def app(**options):
    atexit.register(pathlib.Path({str(tmp_path / "left")!r}).touch)
    return run(**options)
common.app = app
program()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, printed in done.stdout) == (code, True), done.stderr
    assert (tmp_path / "left").exists()
    assert "Traceback" not in done.stderr


def test_the_traceback_of_a_bug_is_printed_and_the_exit_code_is_1() -> None:
    program = "from nightshift.cli import common, program; common.app = lambda **_: 1 / 0; program()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, "ZeroDivisionError" in done.stderr) == (1, True)
