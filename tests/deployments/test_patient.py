"""A worker whose server is away: Prefect's loop around it would give up, and this one does not."""

import asyncio

import httpx
import pytest
from prefect.utilities.services import critical_service_loop

from deployments.patient import patient

REQUEST = httpx.Request("POST", "http://127.0.0.1/api")


class EnoughError(Exception):
    """What ends the loop."""


def asked_until(answers: list[Exception]) -> int:
    """How often Prefect's loop has asked when it ended; the answers are given one by one."""
    asked = 0

    async def request(worker: object) -> None:
        nonlocal asked
        asked += 1
        raise answers[asked - 1]

    async def loop() -> None:
        method = patient(request)
        await critical_service_loop(lambda: method(None), interval=0, backoff=1)  # type: ignore[arg-type, return-value]

    with pytest.raises(EnoughError):
        asyncio.run(loop())
    return asked


def status(code: int) -> httpx.HTTPStatusError:
    return httpx.HTTPStatusError(str(code), request=REQUEST, response=httpx.Response(code, request=REQUEST))


def test_a_worker_waits_for_a_server_that_fails_or_is_gone() -> None:
    away: list[Exception] = [status(500), status(503), httpx.ConnectError("refused"), httpx.ReadTimeout("late")]
    assert asked_until([*away * 10, EnoughError()]) == 41


def test_a_worker_that_is_refused_ends() -> None:
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        asked_until([status(500), status(401)])
