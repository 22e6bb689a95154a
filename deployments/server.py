"""Prefect's command line, whose server tries for a while what it would give up at once.

    python -m deployments.server server start

The server hands events on to its automations, and these write to its database. SQLite refuses a write now and then, the
more often the slower the machine is. Prefect tries an event four times, within a tenth of a second, and drops it. Then
nobody is told of a run that has failed, or a run is started again that is running. So here an event is tried for half a
minute, with longer and longer pauses.

Nor is it silent for the minute for which Prefect lets SQLite wait. A cursor whose statement has failed stays open:
SQLAlchemy closes only one whose statement has succeeded. Later Python's garbage collector finds it, in the thread of
whoever makes an object, and resets its statement, for which SQLite waits until the cursor's connection is idle. If the
connection waits for the database, a request holds that, and its thread is the one that collects, each waits for the
other. So here a cursor is closed when its statement fails, in the thread of its connection.
"""

import asyncio
import functools
import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any

import aiosqlite
from prefect.server.utilities.messaging.memory import MemoryMessage, Subscription

_TRIES = 8
_FIRST_PAUSE_SECONDS = 0.1


def patient(retry: Callable[[Any, MemoryMessage], Awaitable[None]]) -> Callable[[Any, MemoryMessage], Awaitable[None]]:
    """A method of a subscription that puts a message back to be tried again, after a pause."""

    @functools.wraps(retry)
    async def pause_and_retry(subscription: Subscription, message: MemoryMessage) -> None:
        subscription.max_retries = _TRIES
        await asyncio.sleep(_FIRST_PAUSE_SECONDS * 2**message.retry_count)
        await retry(subscription, message)

    return pause_and_retry


def closing(execute: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The method of a cursor that has its connection's thread do something; if that fails, the cursor is closed."""

    @functools.wraps(execute)
    async def execute_or_close(cursor: aiosqlite.Cursor, do: Callable[..., Any], *args: Any, **options: Any) -> Any:
        def do_or_close() -> Any:
            try:
                return do(*args, **options)
            except sqlite3.Error:
                cursor._cursor.close()
                raise

        return await execute(cursor, do_or_close)

    return execute_or_close


def be_patient() -> None:
    setattr(Subscription, "retry", patient(Subscription.retry))  # noqa: B010 - for mypy a method is no variable
    setattr(aiosqlite.Cursor, "_execute", closing(aiosqlite.Cursor._execute))  # noqa: B010


if __name__ == "__main__":
    from prefect.cli import app

    be_patient()
    app()
