"""Whoever watches a run goes on watching while the Prefect server is away or fails, and stops where it refuses."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.schemas.objects import State
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Completed, Running

from deployments import submit
from deployments.submit import Submitted, watch

SUBMITTED = Submitted(uuid4(), "a run", None, "run")
REQUEST = httpx.Request("POST", "http://127.0.0.1/api/flow_runs/filter")


def answer(code: int) -> PrefectHTTPStatusError:
    return PrefectHTTPStatusError(str(code), request=REQUEST, response=httpx.Response(code, request=REQUEST))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is seen of a run when the server gives these answers, one after the other."""

    @contextmanager
    def connected() -> Iterator[None]:
        yield

    def seen(*answers: State[Any] | Exception) -> list[str | None]:
        coming = iter(answers)

        def ask(*_: object) -> object:
            said = next(coming)
            if isinstance(said, Exception):
                raise said
            return SimpleNamespace(state=said)

        monkeypatch.setattr(submit, "connected", connected)
        monkeypatch.setattr(submit, "newest_flow_run", ask)
        monkeypatch.setattr(submit, "_POLL_SECONDS", 0)
        monkeypatch.setattr(submit._PATIENT, "wait", lambda _: 0)
        return [state.name for state in watch(SUBMITTED)]

    return seen


def test_a_server_that_is_away_or_fails_is_waited_for(watched: Any) -> None:
    away = [httpx.ConnectError("refused"), answer(503), answer(500), httpx.ReadTimeout("late")]
    assert watched(*away, Running(), *away * 3, Completed()) == ["Running", "Completed"]


def test_a_server_that_refuses_is_not(watched: Any) -> None:
    with pytest.raises(PrefectHTTPStatusError, match="401"):
        watched(Running(), answer(503), answer(401), Completed())
