"""Commands and a Prefect server that is busy: SQLite is locked now and then, and the server answers 503."""

from collections.abc import Callable

import pytest

from nightshift.local.prefect import PrefectServer
from tests.commands import Finished
from tests.faults.proxy import Answer, Forward, Request, refuse, running


@pytest.mark.slow
def test_a_command_outlasts_a_server_that_refuses_a_request_three_times(
    nightshift: Callable[..., Finished], prefect_server: PrefectServer
) -> None:
    refused: list[Request] = []

    def busy(request: Request, forward: Forward) -> Answer:
        if "/deployments/" not in request.target or len(refused) == 3:
            return forward(request)
        refused.append(request)
        return refuse(503, "Service Unavailable")(request, forward)

    with running(prefect_server.api_url) as proxy:
        proxy.plan("other", busy, times=1000)
        url = f"{proxy.endpoint_url}/api"
        done = nightshift("submit", "nowhere", PREFECT_API_URL=url, PREFECT_API_AUTH_STRING=prefect_server.login)
    assert len(refused) == 3
    assert "nowhere" in done.err
    assert "503" not in done.err
