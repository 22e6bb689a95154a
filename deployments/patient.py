"""Prefect's command line, whose workers wait for a server that is away.

    python -m deployments.patient worker start --pool POOL

Prefect's own worker ends after a minute or two without an answer, and kills the trainings that it has started.
"""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
from prefect.cli import app
from prefect.workers.base import BaseWorker

_log = logging.getLogger("prefect.workers")


def patient(request: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """A method of a worker that brings nothing, and says so once, while the server does not answer or answers 5xx."""
    is_away = False

    @functools.wraps(request)
    async def ask(worker: Any) -> Any:
        nonlocal is_away
        try:
            answer = await request(worker)
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            if isinstance(error, httpx.HTTPStatusError) and not error.response.is_server_error:
                raise
            if not is_away:
                _log.warning("the Prefect server is waited for: %s", error or type(error).__name__)
            is_away = True
            return []
        is_away = False
        return answer

    return ask


if __name__ == "__main__":
    for name in ("get_and_submit_flow_runs", "sync_with_backend"):
        setattr(BaseWorker, name, patient(getattr(BaseWorker, name)))
    app()
