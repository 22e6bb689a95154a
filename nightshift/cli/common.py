"""What the commands share: the application, its options, its errors as sentences, and how results are printed."""

import atexit
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nightshift import __version__
from nightshift.errors import DISK_IS_FULL, ConfigError, DiskError, Interrupted, NightshiftError
from nightshift.text import as_json

if TYPE_CHECKING:
    from deployments.planned import Deployments
    from nightshift.cli.screen import Screen
    from nightshift.settings import Settings
    from nightshift.workspace import Workspace

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)

LONGEST_HOURS = 876_000
"""A hundred years: what was so long ago still has a date."""

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Name = Annotated[str, typer.Option("--name", help="Name of the model, which is its data set's.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show Prefect's log and all warnings.")]


def _valid_run_id(text: str) -> str:
    from nightshift.ids import parse_run_id

    return parse_run_id(text)


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="The run's id.", callback=_valid_run_id)]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"nightshift {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Retrain image classifiers every night, and survive the night."""


def program() -> None:
    """`main` in a process of its own, which ends without delay."""
    codes: list[int] = []
    atexit.register(_leave, codes)  # who is registered first is called last
    try:
        main()
    except SystemExit as end:
        codes.append(int(end.code or 0))
        raise


def _leave(codes: list[int]) -> None:
    """End this process now. Python would first search all that torch and Prefect have made for cycles, for 1.5 s."""
    if codes:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads any more, or it is closed
                stream.flush()
        os._exit(codes[0])


def main() -> None:
    """Run the command line; every error becomes a sentence and an exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a terminal without UTF-8 is no reason to fail
    try:
        sys.exit(app(standalone_mode=False))
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, typer.Abort):
            sys.exit(1)
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # click's own usage errors
            error.show()
            sys.exit(error.exit_code)
        _end_with(error)


def _end_with(error: BaseException) -> NoReturn:
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("stopped at once; what was last committed stands")
    if isinstance(error, OSError) and (error.filename or error.errno in DISK_IS_FULL):
        what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
        where = f" ({error.filename})" if error.filename else ""
        error = DiskError(f"{what}{where}: make room or mend it, or set NIGHTSHIFT_HOME to another place")
    if not isinstance(error, NightshiftError):
        raise error
    if "--json" in sys.argv:
        print(as_json({"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}))
    print_error(error)
    sys.exit(error.exit_code)


def print_error(error: NightshiftError) -> None:
    """On standard error: what kind of ending it is, and the message."""
    from nightshift.cli.screen import styled

    colour, word = ("yellow", "Interrupted") if isinstance(error, Interrupted) else ("red", "Error")
    screen = error_console()
    first, *others = str(error).split("\n")
    screen.print(styled(f"{word}:", colour), first, soft_wrap=not screen.is_terminal)
    for line in others:
        screen.print(line, soft_wrap=not screen.is_terminal)


@contextmanager
def configured_workspace(to_make_room: bool = False) -> Iterator["Workspace"]:
    """The workspace that the environment's settings describe."""
    from nightshift.settings import Settings
    from nightshift.workspace import open_workspace

    with open_workspace(Settings.load(), to_make_room) as workspace:
        yield workspace


def use_server(patient: bool = False) -> None:
    """Choose the Prefect server, which Prefect reads from the environment when it is imported.

    Args:
        patient: wait as long as Prefect does, six minutes and more, for a server that does not answer.

    Raises:
        ConfigError: the user has chosen none, and none runs on this machine.
        PrefectServerError: it asks for a login, and ours is not it.
        DiskError: it is our own, and its disk is full.
    """
    from nightshift.local.prefect import check_room
    from nightshift.settings import Settings

    if not use_server_if_any():
        raise ConfigError(
            "no Prefect server: set PREFECT_API_URL to yours, or start one on this machine with `nightshift up`"
        )
    check_room(Settings.load().home, os.environ["PREFECT_API_URL"])
    if not patient:
        os.environ.setdefault("PREFECT_API_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("PREFECT_CLIENT_MAX_RETRIES", "4")  # half a minute of 503, while its SQLite is locked


def use_server_if_any() -> bool:
    """As `use_server`, but there may be none. Returns whether there is one."""
    from nightshift.local.prefect import check_login, chosen_server
    from nightshift.settings import Settings

    server = chosen_server(Settings.load().home)
    if not server:
        return False
    check_login(server)
    os.environ.update(server.environment)
    return True


def planned_deployments(settings: "Settings") -> "Deployments":
    """What is to be deployed; a mistake in the project file is reported before anything is started or asked."""
    from deployments.planned import planned
    from nightshift.config.project import load_project

    return planned(load_project(settings.project), settings.project)


def console() -> "Screen":
    from nightshift.cli.screen import Screen

    return Screen(width=None if sys.stdout.isatty() else 160)


def error_console() -> "Screen":
    from nightshift.cli.screen import Screen

    return Screen(stderr=True)


def print_json(value: Any) -> None:
    print(as_json(value, indent=1))
