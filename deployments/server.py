"""Prefect's command line, whose server tries for a while what it would give up at once.

    python -m deployments.server server start

The server hands events on to its automations, and these write to its database. SQLite refuses a write now and then, the
more often the slower the machine is. Prefect tries an event four times, within a tenth of a second, and drops it. Then
nobody is told of a run that has failed, or a run is started again that is running. So here an event is tried for half a
minute, with longer and longer pauses.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

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


def be_patient() -> None:
    setattr(Subscription, "retry", patient(Subscription.retry))  # noqa: B010 - for mypy a method is no variable


if __name__ == "__main__":
    from prefect.cli import app

    be_patient()
    app()
