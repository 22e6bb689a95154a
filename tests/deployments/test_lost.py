"""A worker starts a training again whose machine is gone, when its lease has run out and no heartbeat comes.

And a flow run that has not begun, of a worker that is gone.
"""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.filters import EventFilter, EventOccurredFilter, EventResourceFilter
from prefect.states import Pending, Running

import deployments.lost
from deployments.lost import HEARTBEAT, start_the_lost_again, starting_the_lost_again, taken_up
from nightshift.local.prefect import PrefectServer
from nightshift.records.lease import acquire
from nightshift.records.run import Origin
from nightshift.workspace import Workspace
from tests.conftest import PATIENCE_SECONDS
from tests.records.test_lease import spec
from tests.stores import wait_until

Step = Callable[["Training"], Awaitable[None]]


class Later(datetime):
    """An hour from now: what has just begun is old by then."""

    @classmethod
    def now(cls, tz: Any = None) -> Self:
        return super().now(tz) + timedelta(hours=1)


class Training:
    """A flow run of `train-cifar` in a pool of its own, and what happens to it."""

    def __init__(self, client: PrefectClient, workspace: Workspace) -> None:
        self._client, self._workspace, self._id = client, workspace, uuid4()
        self._run_id = self._pool = f"lost-{uuid4()}"

    async def begin(self, pool_type: str) -> None:
        await self._client.create_work_pool(WorkPoolCreate(name=self._pool, type=pool_type))
        flow = await self._client.create_flow_from_name("train-cifar")
        deployment = await self._client.create_deployment(flow, self._pool, work_pool_name=self._pool)
        name = f"{self._run_id} (quick)"
        self._id = (await self._client.create_flow_run_from_deployment(deployment, name=name)).id

    async def run(self) -> None:
        await self._client.set_flow_run_state(self._id, Running())

    async def be_taken_up(self, message: str) -> None:
        await self._client.set_flow_run_state(self._id, Pending(message=message))

    async def hold(self, flow_run_id: str = "", seconds: float = 1) -> None:
        """Take the lease, and let it run out unless it lasts a minute."""
        wanted = replace(spec(self._run_id), origin=Origin(flow_run_id=flow_run_id or str(self._id)))
        lease = acquire(self._workspace.store, wanted, seconds).record.lease
        if seconds < 60:
            await asyncio.to_thread(wait_until, self._workspace.store, lease.expires_at)

    async def beat(self) -> None:
        """Send a heartbeat, as of 10 s before `Later`, and wait until the server knows it."""
        resource = f"prefect.flow-run.{self._id}"
        now = datetime.now(UTC)
        sent = {
            "occurred": str(now + timedelta(hours=1, seconds=-10)),
            "event": HEARTBEAT,
            "resource": {"prefect.resource.id": resource},
            "id": str(uuid4()),
        }
        (await self._client._client.post("/events", json=[sent])).raise_for_status()
        occurred = EventOccurredFilter(since=now, until=now + timedelta(hours=2))
        wanted = EventFilter(occurred=occurred, resource=EventResourceFilter(id=[resource]))
        async with asyncio.timeout(PATIENCE_SECONDS):
            while HEARTBEAT not in {event.event for event in (await self._client.read_events(wanted, limit=50)).events}:
                await asyncio.sleep(0.2)

    async def states(self) -> list[str | None]:
        await start_the_lost_again(self._client, self._pool)
        return [state.name for state in await self._client.read_flow_run_states(self._id)]


@pytest.fixture
def states(
    prefect_server: PrefectServer, workspace: Workspace, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[str | None]]:
    """The states that a flow run has had when these steps are done and its worker has looked for lost runs."""
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(workspace.home))
    monkeypatch.setenv("NIGHTSHIFT_S3__PREFIX", prefix)
    monkeypatch.setattr(deployments.lost, "datetime", Later)

    async def scenario(steps: tuple[Step, ...], pool_type: str) -> list[str | None]:
        async with PrefectClient(prefect_server.api_url, auth_string=prefect_server.login) as client:
            training = Training(client, workspace)
            await training.begin(pool_type)
            for step in steps:
                await step(training)
            return await training.states()

    return lambda *steps, pool_type="process": asyncio.run(scenario(steps, pool_type))


def by_a_worker_that_is_gone() -> str:
    """What it has said when it took a flow run up."""
    code = "from deployments.lost import taken_up; print(taken_up(), end='')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_a_run_whose_lease_has_run_out_without_a_heartbeat_is_started_again(
    states: Callable[..., list[str | None]],
) -> None:
    assert states(Training.run, Training.hold) == ["Scheduled", "Running", "Crashed", "AwaitingRetry"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param((Training.run, Training.hold, Training.beat), id="it sends heartbeats, so the store is away"),
        pytest.param((Training.run, lambda training: training.hold(seconds=60)), id="its lease lives"),
        pytest.param((Training.run, lambda training: training.hold(str(UUID(int=1)))), id="another flow run trains it"),
        pytest.param((Training.run,), id="it has no record yet"),
    ],
)
def test_a_run_that_may_live_is_left_alone(states: Callable[..., list[str | None]], steps: tuple[Step, ...]) -> None:
    assert states(*steps) == ["Scheduled", "Running"]


@pytest.mark.slow
def test_a_run_that_has_not_begun_when_its_worker_ended_is_started_again(
    states: Callable[..., list[str | None]],
) -> None:
    message = by_a_worker_that_is_gone()
    assert states(lambda training: training.be_taken_up(message)) == [
        "Scheduled",
        "Pending",
        "Crashed",
        "AwaitingRetry",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("message", "pool_type"),
    [
        pytest.param(taken_up, "process", id="its worker lives"),
        pytest.param(
            lambda: taken_up().replace("process ", "process another-boot-"), "process", id="on another machine"
        ),
        pytest.param(lambda: "Taken up by vm/1/c0ffee", "process", id="of a worker of yesterday"),
        pytest.param(by_a_worker_that_is_gone, "kubernetes", id="its pod waits for a node"),
    ],
)
def test_a_run_that_may_begin_is_left_alone(
    states: Callable[..., list[str | None]], message: Callable[[], str], pool_type: str
) -> None:
    said = message()
    assert states(lambda training: training.be_taken_up(said), pool_type=pool_type) == ["Scheduled", "Pending"]


@pytest.mark.slow
def test_a_run_whose_process_has_just_been_started_is_left_alone(
    states: Callable[..., list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.lost, "datetime", datetime)
    message = by_a_worker_that_is_gone()
    assert states(lambda training: training.be_taken_up(message)) == ["Scheduled", "Pending"]


@pytest.mark.slow
def test_a_worker_without_the_store_starts_none_to_look_for_lost_runs(
    states: Callable[..., list[str | None]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path))
    assert states(Training.run, Training.hold) == ["Scheduled", "Running"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_start_that_does_not_hold_the_lease_yet_is_not_blamed_for_the_one_before(
    states: Callable[..., list[str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.lost, "_CLOCKS_DIFFER", timedelta(0))
    assert states(Training.hold, Training.run) == ["Scheduled", "Running"]


def test_a_worker_takes_up_runs_though_its_look_for_lost_ones_fails() -> None:
    class Away:
        asked = 0

        async def read_flow_runs(self, **filters: object) -> object:
            self.asked += 1
            raise httpx.ConnectError("refused")

    client = Away()

    async def poll(worker: object) -> str:
        await asyncio.sleep(0)
        return "taken up"

    async def polls() -> list[str]:
        method = starting_the_lost_again(poll)
        return [await method(SimpleNamespace(client=client, _work_pool_name="pool")) for _ in range(3)]

    assert asyncio.run(polls()) == ["taken up"] * 3
    assert client.asked == 1  # and then after a minute
