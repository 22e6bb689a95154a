"""A worker waits for a server that is away, and starts again what has died on it, but not over and over."""

import asyncio
import sys
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, State, StateType
from prefect.exceptions import Abort, ObjectNotFound
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Pending
from prefect.utilities.engine import propose_state
from prefect.utilities.services import critical_service_loop

import deployments.patient
from deployments.patient import end_the_stuck, ending_the_stuck, forking, patient, starting_again, taking_up
from deployments.warm import Forks
from nightshift.local.prefect import PrefectServer

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


class Server:
    """What a worker asks about a flow run of the flow `name`, whose process has ended in `state`."""

    def __init__(self, state: State, name: str) -> None:
        self.state, self.name, self.again = state, name, list[State]()

    async def read_flow_run(self, flow_run_id: object) -> object:
        return SimpleNamespace(state=self.state, flow_id=None)

    async def read_flow(self, flow_id: object) -> object:
        return SimpleNamespace(name=self.name)

    async def set_flow_run_state(self, flow_run_id: object, state: State, force: bool) -> None:
        self.again.append(state)


def started_again(state: State, exit_codes: list[int], name: str = "train-cifar") -> list[bool]:
    """The starts of a flow run whose processes end one after the other with these codes: whether each was at once."""
    server, flow_run = Server(state, name), SimpleNamespace(id=uuid4(), name="a run")
    codes = iter(exit_codes)

    async def submit(worker: object, flow_run: object) -> object:
        return SimpleNamespace(status_code=next(codes))

    async def run_all() -> None:
        run = starting_again(submit)
        for _ in exit_codes:
            await run(SimpleNamespace(client=server), flow_run)

    asyncio.run(run_all())
    now = datetime.now(UTC)
    return [
        bool(again.state_details.scheduled_time and again.state_details.scheduled_time <= now) for again in server.again
    ]


def test_a_run_whose_process_died_is_started_again_at_once_and_one_that_soon_dies_again_after_a_pause() -> None:
    assert started_again(Crashed(), [-9]) == [True]
    assert started_again(Crashed(), [-9, -9, 1]) == [True, False, False]


@pytest.mark.parametrize(
    ("state", "exit_code", "name"),
    [
        (Completed(), 0, "train-cifar"),
        (Completed(), -9, "train-cifar"),
        (Cancelled(), -9, "train-cifar"),
        (Crashed(), -9, "gc"),
    ],
)
def test_a_run_that_has_ended_or_was_cancelled_or_does_not_go_on_is_not_started_again(
    state: State, exit_code: int, name: str
) -> None:
    assert started_again(state, [exit_code], name) == []


def test_a_run_that_cannot_be_forked_starts_in_a_new_python(tmp_path: Path) -> None:
    class Dead(Forks):
        def __init__(self) -> None:
            self.environment = {}

        def start(self, *_: object) -> BaseProcess:
            raise EOFError("the fork server has ended")

    async def run(command: list[str], **options: object) -> object:
        return command, options["cwd"]

    engine = [sys.executable, "-m", "prefect.engine"]
    started = forking(run, Dead())(engine, task_status=None, task_status_handler=None, env={}, cwd=str(tmp_path))
    assert asyncio.run(started) == (engine, str(tmp_path))  # type: ignore[arg-type]


def test_a_worker_whose_look_for_the_stuck_fails_goes_on() -> None:
    class Gone:
        async def read_flow_runs(self, **filters: object) -> object:
            raise ObjectNotFound(status(404))

    async def sync(worker: object) -> None:
        pass

    asyncio.run(ending_the_stuck(sync)(SimpleNamespace(client=Gone(), _work_pool_name="pool")))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(("told_to_stop", "end"), [(False, StateType.CRASHED), (True, StateType.CANCELLED)])
def test_a_flow_run_that_nobody_works_on_does_not_hold_its_deployments_slot_for_ever(
    prefect_server: PrefectServer, home: Path, monkeypatch: pytest.MonkeyPatch, told_to_stop: bool, end: StateType
) -> None:
    monkeypatch.setattr(deployments.patient, "_STUCK", timedelta(0))
    name = f"stuck-{uuid4()}"

    async def taken_up(client: PrefectClient, deployment: UUID) -> tuple[UUID, StateType]:
        flow_run = await client.create_flow_run_from_deployment(deployment)
        answer: Any = await client.set_flow_run_state(flow_run.id, Pending())
        return flow_run.id, answer.state.type

    async def scenario() -> list[StateType | None]:
        async with PrefectClient(prefect_server.api_url, auth_string=prefect_server.login) as client:
            await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
            deployment = await client.create_deployment(
                await client.create_flow_from_name("recover"),
                name,
                work_pool_name=name,
                concurrency_limit=1,
                concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
            )
            stuck, first = await taken_up(client, deployment)
            state = (await client.read_flow_run(stuck)).state
            assert state
            lease = state.state_details.deployment_concurrency_lease_id
            # Prefect does so on a full disk, and then cannot give the slot back.
            (home / "prefect" / "concurrency_leases" / f"{lease}.json").unlink()
            _, second = await taken_up(client, deployment)
            if told_to_stop:
                await client.set_flow_run_state(stuck, Cancelling())
            await end_the_stuck(client, name)
            ended = (await client.read_flow_run(stuck)).state_type
            _, third = await taken_up(client, deployment)
            return [first, second, ended, third]

    assert asyncio.run(scenario()) == [StateType.PENDING, StateType.CANCELLED, end, StateType.PENDING]


@pytest.mark.slow
def test_of_two_workers_that_take_up_a_flow_run_and_get_no_answer_the_one_that_has_it_runs_it(
    prefect_server: PrefectServer,
) -> None:
    async def unanswered(client: PrefectClient, state: State[Any], flow_run_id: UUID) -> State[Any]:
        await propose_state(client, state, flow_run_id=flow_run_id)
        raise httpx.ReadTimeout("late")

    async def scenario() -> bool:
        async with PrefectClient(prefect_server.api_url, auth_string=prefect_server.login) as client:
            flow = await client.create_flow_from_name("recover")
            deployment = await client.create_deployment(flow, f"unanswered-{uuid4()}")
            flow_run = await client.create_flow_run_from_deployment(deployment)
            taken = await taking_up(unanswered)(client, Pending(), flow_run_id=flow_run.id)
            with pytest.raises(Abort):
                await taking_up(propose_state)(client, Pending(), flow_run_id=flow_run.id)
            return taken.is_pending()

    assert asyncio.run(scenario())
