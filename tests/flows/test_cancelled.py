"""A flow run that is cancelled ends in each of its processes, also in one that Prefect takes for dead."""

import threading
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.states import AwaitingRetry, Cancelled

import tasks
from nightshift.local.prefect import PrefectServer
from tasks import ended_when_cancelled


@pytest.mark.parametrize(
    ("state", "is_told"), [(Cancelled(), True), (AwaitingRetry(), False)], ids=["cancelled", "to be started again"]
)
def test_a_process_that_nobody_signals_ends_when_its_flow_run_is_cancelled(
    prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch, state: State[None], is_told: bool
) -> None:
    looks, told = threading.Semaphore(0), []
    ask = SyncPrefectClient.read_flow_run

    def seen(client: SyncPrefectClient, flow_run_id: UUID) -> object:
        looks.release()
        return ask(client, flow_run_id)

    @flow
    def lasting() -> None:
        try:
            with ended_when_cancelled(), get_client(sync_client=True) as client:
                client.set_flow_run_state(str(flow_run.get_id()), state, force=True)
                for _ in range(4):
                    assert looks.acquire(timeout=60)
        except TerminationSignal:
            told.append(True)

    monkeypatch.setattr(tasks, "_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(SyncPrefectClient, "read_flow_run", seen)
    login = prefect_server.environment["PREFECT_API_AUTH_STRING"]
    with temporary_settings({PREFECT_API_URL: prefect_server.api_url, PREFECT_API_AUTH_STRING: login}):
        lasting(return_state=True)
    assert told == [True] * is_told
