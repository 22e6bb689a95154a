"""The command line. Everything heavy is imported by the command that needs it, so that `--help` is quick."""

from nightshift.cli.common import main

from nightshift.cli import train, models, stored, server  # isort: skip  # in the order of `--help`

__all__ = ["main", "models", "server", "stored", "train"]
