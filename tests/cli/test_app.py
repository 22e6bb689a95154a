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
