"""The channel between a launcher and its ranks: progress goes one way, orders go the other."""

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
"""How long healthy ranks may take to save before they are stopped."""


class LauncherChannel:
    """The launcher's end: a connection to each rank, which breaks when either dies."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(32)
        self._listener = Listener(family="AF_UNIX", authkey=self.key)
        self.address = str(self._listener.address)
        self._orders: set[Order] = set()
        self._connections: list[Connection] = []
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        threading.Thread(target=copy_context().run, args=(self._accept,), name="ranks", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    @property
    def has_ranks(self) -> bool:
        return bool(self._connections)

    def order(self, what: Order) -> None:
        """Give an order to every rank, including ranks that connect later."""
        with self._changed:
            if what in self._orders:
                return
            self._orders.add(what)
            for connection in self._connections:
                with suppress(OSError):  # the rank has just died
                    connection.send(what)

    def withdraw(self, what: Order) -> None:
        with self._changed:
            self._orders.discard(what)

    def wait_until_all_left(self) -> None:
        """Wait until all ranks have left, or have had enough time to save."""
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, _SAVING_SECONDS)

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except (EOFError, AuthenticationError):
                continue  # the rank has just died
            except OSError:
                return  # closed
            threading.Thread(
                target=copy_context().run, args=(self._listen, connection), name="rank", daemon=True
            ).start()

    def _listen(self, connection: Connection) -> None:
        with self._changed, suppress(OSError):
            self._connections.append(connection)
            for order in self._orders:
                connection.send(order)
        try:
            while True:
                what, message = connection.recv()
                getattr(progress.current(), what)(*message)
        except (OSError, EOFError):
            pass  # the rank has left
        finally:
            with self._changed:
                self._connections.remove(connection)
                self._changed.notify_all()


class RankChannel(LogProgress):
    """A rank's end: it sends progress to the launcher, and receives the launcher's orders."""

    def __init__(self, address: str, key: bytes, is_quiet: bool) -> None:
        """`is_quiet`: send warnings only, because another rank reports the same progress."""
        self.orders: set[Order] = set()
        self._connection = Client(address, authkey=key)
        self._is_quiet, self._has_left = is_quiet, False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._listen, name="orders", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._has_left = True
        self._connection.close()

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        self._report("trained", report, epoch_ended)

    def say(self, message: str) -> None:
        self._report("say", message)

    def warn(self, message: str) -> None:
        self._report("warn", message, aloud=True)

    def _report(self, what: str, *message: object, aloud: bool = False) -> None:
        if aloud or not self._is_quiet:
            with self._lock, suppress(OSError):  # the launcher has just died
                self._connection.send((what, message))

    def _listen(self) -> None:
        try:
            while True:
                self.orders.add(self._connection.recv())
        except (OSError, EOFError):
            if not self._has_left:
                os._exit(1)  # the launcher is dead: nobody would stop this process, or start it again
