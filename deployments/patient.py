"""Workers of Prefect's that wait for a server that is away, and start again at once what dies on them.

Prefect's own worker ends after a minute or two without an answer, and kills the trainings that it has started. If a
process dies, it only reports that the flow run has crashed. An automation starts the flow run again if nobody else has
within 20 s, and the worker looks for work only every 10 s.

It also starts several processes for a flow run, one after the other, each of which imports Prefect: one looks after the
others, one fetches the flow's code, and one runs the flow. When that one has died, another imports the flow to see
whether it has hooks. Our flows are installed and have no hooks, so they need only one process. It can be forked from a
process that has already imported what they need (`warm`).

A flow run that nobody works on holds its deployment's only slot until somebody ends it: no other starts. That was seen
after a disk had been full (docs/decisions/0007-recovery.md).
"""

import functools
import logging
import math
import os
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

os.environ.setdefault("PREFECT_WORKER_QUERY_SECONDS", "2")

import anyio
import httpx
from prefect import Flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.exceptions import Abort, PrefectException
from prefect.runner import _starter_engine
from prefect.states import AwaitingRetry, Cancelled, Crashed
from prefect.utilities.engine import propose_state
from prefect.utilities.processutils import command_to_string, run_process
from prefect.workers import base, process
from prefect.workers.base import BaseWorker
from prefect.workers.process import ProcessJobConfiguration

from deployments import warm
from deployments.lost import runs_of, starting_the_lost_again, taken_up

LASTING = ("train-cifar", "retrain", "sweep")
"""The flows that go on where they stopped."""
_OURS = (*LASTING, "gc", "predict", "recover")
_ENGINE = [sys.executable, "-m", "prefect.engine"]
_PAUSE = timedelta(minutes=1)
"""A process that dies again within this time waits this long, so that one that cannot start is not retried nonstop."""
_STUCK = timedelta(minutes=15)
"""After which a flow run is given up that was taken up and does not begin, or that does not end when it is cancelled:
as long as the automation waits for it."""
_LONGEST = {"recover": timedelta(hours=1), "gc": timedelta(days=1)}
"""After which a flow run that has begun is given up. The others may train for days; automations look after those."""
_LOOK_SECONDS = 60
_log = logging.getLogger("prefect.workers")


def patient(request: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """A worker's method that returns nothing, with one warning, while the server does not answer or answers 5xx."""
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


def taking_up(propose: Callable[..., Awaitable[State[Any]]]) -> Callable[..., Awaitable[State[Any]]]:
    """A function that proposes a state. Whether a flow run is Pending is asked if the answer was lost.

    It would stay Pending else, and no worker would run it. The message tells our Pending from another worker's.
    """

    @functools.wraps(propose)
    async def run(client: PrefectClient, state: State[Any], *, flow_run_id: UUID) -> State[Any]:
        if not state.is_pending():
            return await propose(client, state, flow_run_id=flow_run_id)
        state.message = taken_up()
        try:
            return await propose(client, state, flow_run_id=flow_run_id)
        except (httpx.HTTPError, Abort):  # Abort, where the client itself has asked once more
            found = (await client.read_flow_run(flow_run_id)).state
            if not found or found.message != state.message:
                raise
            return found

    return run


def starting_again(submit: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """A worker's method that runs a flow run to the end of its process. If the process dies, it runs again at once."""
    again: dict[UUID, float] = {}

    @functools.wraps(submit)
    async def run(worker: Any, flow_run: FlowRun, *arguments: Any, **options: Any) -> Any:
        result = await submit(worker, flow_run, *arguments, **options)
        if getattr(result, "status_code", 0):
            is_first = time.monotonic() > again.get(flow_run.id, -math.inf) + _PAUSE.total_seconds()
            again[flow_run.id] = time.monotonic()
            try:
                await _start_again(worker, flow_run.id, timedelta(0) if is_first else _PAUSE)
            except httpx.HTTPError as error:
                _log.warning("the crashed flow run %s is left to the automations: %s", flow_run.name, error)
        return result

    return run


async def _start_again(worker: Any, flow_run_id: UUID, pause: timedelta) -> None:
    found = await worker.client.read_flow_run(flow_run_id)
    # Not if somebody has cancelled it, or if it came to a result of its own.
    if found.state and found.state.is_crashed() and (await worker.client.read_flow(found.flow_id)).name in LASTING:
        message = "Its process died. It goes on where it stopped." + (" It did so before, and waits." if pause else "")
        state: State[Any] = AwaitingRetry(scheduled_time=datetime.now(UTC) + pause, message=message)
        await worker.client.set_flow_run_state(flow_run_id, state, force=True)


def ending_the_stuck(sync: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """A worker's method that it calls every half a minute; it also ends what nobody in the worker's pool works on."""
    looked = -math.inf

    @functools.wraps(sync)
    async def run(worker: Any) -> None:
        nonlocal looked
        await sync(worker)
        if time.monotonic() > looked + _LOOK_SECONDS:
            looked = time.monotonic()
            try:
                await end_the_stuck(worker.client, worker._work_pool_name)
            except (PrefectException, httpx.HTTPError) as error:  # such as that one was deleted meanwhile
                _log.warning("whether flow runs are stuck is not known: %s", error)

    return run


async def end_the_stuck(client: PrefectClient, pool: str) -> None:
    """Let the flow runs of a pool be over that have been under way for longer than they can be."""
    for flow_run in await runs_of(client, pool, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING):
        assert flow_run.state
        longest: timedelta | None = _STUCK
        if flow_run.state.is_running():
            longest = _LONGEST.get((await client.read_flow(flow_run.flow_id)).name)
        if longest is not None and datetime.now(UTC) > flow_run.state.timestamp + longest:
            message = f"{flow_run.state.name} for more than {longest}. Nobody works on it."
            _log.warning("%s was %s", flow_run.name, message)
            over: State[Any] = (Cancelled if flow_run.state.is_cancelling() else Crashed)(message=message)
            await client.set_flow_run_state(flow_run.id, over)


def at_once(prepare: Callable[..., None]) -> Callable[..., None]:
    """A job's method that makes it ready for a flow run. The process of one of our flows is Prefect's engine itself."""

    @functools.wraps(prepare)
    def ready(job: ProcessJobConfiguration, flow_run: FlowRun, *arguments: Any, **options: Any) -> None:
        flow = options.get("flow")
        if job.command is None and flow and flow.name in _OURS:
            job.command = command_to_string(_ENGINE)
        prepare(job, flow_run, *arguments, **options)

    return ready


async def _without_hooks(flow_run: FlowRun) -> Flow[..., Any]:
    """Instead of the flow, whose import takes the worker seconds and half a gigabyte."""
    return Flow(lambda: None, name="hooks")


def forking(run: Callable[..., Awaitable[Any]], forks: warm.Forks) -> Callable[..., Awaitable[Any]]:
    """A function that runs a command to its end. If that is Prefect's engine, it is forked."""

    @functools.wraps(run)
    async def run_forked(command: list[str], *, task_status: Any, task_status_handler: Any, **options: Any) -> Any:
        forked = None
        if command == _ENGINE:
            try:
                forked = forks.start(_ENGINE[-1], options["env"], Path(options["cwd"]))
            except (OSError, EOFError) as error:
                _log.warning("a flow run starts in a new Python, as none could be forked: %s", error)
        if not forked:
            return await run(command, task_status=task_status, task_status_handler=task_status_handler, **options)
        task_status.started(task_status_handler(forked))
        await anyio.wait_readable(forked.sentinel)
        forked.join()
        return forked

    return run_forked


def be_patient() -> None:
    name = "sync_with_backend"
    setattr(BaseWorker, name, ending_the_stuck(getattr(BaseWorker, name)))
    name = "get_and_submit_flow_runs"
    setattr(BaseWorker, name, starting_the_lost_again(getattr(BaseWorker, name)))
    for name in ("get_and_submit_flow_runs", "sync_with_backend"):
        setattr(BaseWorker, name, patient(getattr(BaseWorker, name)))
    setattr(base, "propose_state", taking_up(propose_state))  # noqa: B010 - as below
    name = "_submit_run_and_capture_errors"
    setattr(BaseWorker, name, starting_again(getattr(BaseWorker, name)))
    name = "prepare_for_flow_run"
    setattr(ProcessJobConfiguration, name, at_once(getattr(ProcessJobConfiguration, name)))
    setattr(process, "load_flow_from_flow_run", _without_hooks)  # noqa: B010 - mypy does not see that it is there


def be_warm() -> None:
    setattr(_starter_engine, "run_process", forking(run_process, warm.Forks()))  # noqa: B010 - as above
