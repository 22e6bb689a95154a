"""DOC."""

import os
import secrets
import threading
from contextlib import suppress
from contextvars import copy_context
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener
from typing import Literal, Self

from nightshift import progress
from nightshift.progress import LogProgress, StepReport

Order = Literal["stop", "restart"]
_SAVING_SECONDS = 20
"""So long ranks that are well may take to save before they are stopped."""


class _Lines:
    """Where the launcher hears of its ranks and gives them orders: a line to each, which breaks when either dies."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self._listener = Listener(family="AF_UNIX", authkey=self.key)
        self.address = str(self._listener.address)
        self._orders: set[Order] = set()
        self._lines: list[Connection] = []
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        threading.Thread(target=copy_context().run, args=(self._accept,), name="ranks", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    @property
    def are_there(self) -> bool:
        return bool(self._lines)

    def order(self, what: Order) -> None:
        """Tell every rank, also those to come."""
        with self._changed:
            self._orders.add(what)
            for line in self._lines:
                with suppress(OSError):  # of a rank that died just then
                    line.send(what)

    def withdraw(self, what: Order) -> None:
        self._orders.discard(what)

    def wait_until_all_left(self) -> None:
        """Or until they have had time enough to save."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines, _SAVING_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                line = self._listener.accept()
            except (EOFError, AuthenticationError):
                continue  # of a rank that died just then
            except OSError:
                return  # closed
            threading.Thread(target=copy_context().run, args=(self._listen, line), name="rank", daemon=True).start()

    def _listen(self, line: Connection) -> None:
        with self._changed, suppress(OSError):
            self._lines.append(line)
            for order in self._orders:
                line.send(order)
        try:
            while True:
                what, message = line.recv()
                getattr(progress.current(), what)(*message)
        except (OSError, EOFError):
            pass  # the rank has left
        finally:
            with self._changed:
                self._lines.remove(line)
                self._changed.notify_all()


class _Line(LogProgress):
    """A rank's end of the line: its progress goes to the launcher, whose orders come."""

    def __init__(self, address: str, key: bytes, is_quiet: bool) -> None:
        """`is_quiet`: report only what went wrong; the others tell the same."""
        self.orders: set[Order] = set()
        self._line = Client(address, authkey=key)
        self._is_quiet, self._has_left = is_quiet, False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._has_left = True
        self._line.close()

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        self._tell("trained", report, epoch_ended)

    def say(self, message: str) -> None:
        self._tell("say", message)

    def warn(self, message: str) -> None:
        self._tell("warn", message, aloud=True)

    def _tell(self, what: str, *message: object, aloud: bool = False) -> None:
        if aloud or not self._is_quiet:
            with self._lock, suppress(OSError):  # of a launcher that died just then
                self._line.send((what, message))

    def _listen(self) -> None:
        try:
            while True:
                self.orders.add(self._line.recv())
        except (OSError, EOFError):
            if not self._has_left:
                os._exit(1)  # the launcher is dead: nobody would stop this process, or start it again
