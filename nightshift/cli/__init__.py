"""The command line. A command imports what is heavy when it needs it, after it has checked what the user asked for.

So `--help` is quick, and a mistake is reported within two seconds.
"""

from nightshift.cli.common import main, program

from nightshift.cli import train, data, submit, champion, models, stored, server  # isort: skip  # in the order of `--help`

__all__ = ["champion", "data", "main", "models", "program", "server", "stored", "submit", "train"]
