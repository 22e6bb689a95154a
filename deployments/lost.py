"""Flow runs that nobody runs any more are started again: trainings as soon as their lease has run out.

Prefect takes a flow run for lost when three heartbeats are missing, and starts it again after another 20 s. Its lease
tells sooner: who trains renews it every 20 s, and it lasts for a minute (NIGHTSHIFT_LEASE_SECONDS). But it also runs
out while the store is away, and a heartbeat may be late on a busy server. Only where both are missing is nobody there.

A flow run that a worker has taken up and that has not begun has neither. If its worker told its runs to stop just
then, or died, it would wait for the quarter of an hour after which any such flow run is ended.

Each worker looks after the runs of its pool. If two of them find the same, the lease lets only one train.
"""

import asyncio
import functools
import logging
import math
import os
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
    WorkPoolFilterType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.states import AwaitingRetry, Crashed

from nightshift.errors import ConfigError, RunNotFoundError
from nightshift.local.supervisor import running_facts
from nightshift.processes import identity, new_writer_id, state_of
from nightshift.records.lease import status_of
from nightshift.records.run import read_record
from nightshift.settings import Settings
from nightshift.workspace import open_workspace

HEARTBEAT = "prefect.flow-run.heartbeat"
_TRAININGS = ["train-cifar", "retrain"]
_SILENCE = timedelta(seconds=45)
"""How old the newest heartbeat is of a run that is asked about: one comes every 30 s, and is stored up to 5 s later.
What has been taken up begins sooner, too."""
_CLOCKS_DIFFER = timedelta(seconds=5)
_PROCESS = ", process "
_LOOK_SECONDS, _PAUSE_SECONDS = 5, 60
_AT_ONCE = 50
"""How many events Prefect tells at a time."""
_log = logging.getLogger("prefect.workers")


def starting_the_lost_again(poll: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
    """A worker's method that it calls every 2 s; beside it, lost runs are looked for."""
    looking: asyncio.Task[None] | None = None
    next_look = -math.inf

    async def look(worker: Any) -> None:
        nonlocal next_look
        try:
            await start_the_lost_again(worker.client, worker._work_pool_name)
            next_look = time.monotonic() + _LOOK_SECONDS
        except Exception as error:  # of Prefect's server, of the store or of settings: none ends a worker
            next_look = time.monotonic() + _PAUSE_SECONDS
            _log.warning("whether runs are lost is left to the automations for a minute: %s", error)

    @functools.wraps(poll)
    async def run(worker: Any) -> Any:
        nonlocal looking
        if (not looking or looking.done()) and time.monotonic() > next_look:
            looking = asyncio.create_task(look(worker))
        return await poll(worker)

    return run


def taken_up() -> str:
    """What a worker says of a flow run that it makes Pending. It tells which process it is; no other says the same."""
    return f"Taken up by {new_writer_id()}{_PROCESS}{identity(os.getpid())}"


async def start_the_lost_again(client: PrefectClient, pool: str) -> None:
    """Start those flow runs of a pool again that nobody runs: what has not begun, and trainings that are Running."""
    for flow_run in await _not_begun(client, pool):
        await _start_again(client, flow_run, "It has not begun, and the worker that had taken it up is gone.")
    for flow_run in await _silent(client, pool):
        if await asyncio.to_thread(_is_lost, flow_run):
            await _start_again(client, flow_run, "Neither heartbeat nor lease: the machine or the process is gone.")


async def runs_of(
    client: PrefectClient,
    pool: str,
    *states: StateType,
    flows: FlowFilter | None = None,
    kind: WorkPoolFilterType | None = None,
) -> list[FlowRun]:
    """The flow runs of a pool in one of these states: of all flows or some; none if the pool is of another kind."""
    return await client.read_flow_runs(
        flow_filter=flows,
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[*states]))),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]), type=kind),
    )


async def _start_again(client: PrefectClient, flow_run: FlowRun, reason: str) -> None:
    now = await client.read_flow_run(flow_run.id)
    if now.state_id == flow_run.state_id:
        _log.warning("%s is lost, and is started again", flow_run.name)
        again: State[Any] = AwaitingRetry(message="Lost. It begins, or goes on from its newest checkpoint.")
        for state in (Crashed(message=reason), again):
            await client.set_flow_run_state(flow_run.id, state, force=True)


async def _not_begun(client: PrefectClient, pool: str) -> list[FlowRun]:
    """The flow runs that a worker on this machine had taken up before it ended, and whose processes have ended too.

    One that lives would be Running by now. In a pool of another type, such as of pods, it may wait for a machine.
    """
    before = datetime.now(UTC) - _SILENCE
    return [
        run
        for run in await runs_of(client, pool, StateType.PENDING, kind=WorkPoolFilterType(any_=["process"]))
        if run.state
        and run.state.timestamp < before
        and state_of((run.state.message or "").partition(_PROCESS)[2]) == "dead"
    ]


async def _silent(client: PrefectClient, pool: str) -> list[FlowRun]:
    """The trainings of a pool without a heartbeat lately."""
    since = datetime.now(UTC) - _SILENCE
    running = await runs_of(client, pool, StateType.RUNNING, flows=FlowFilter(name=FlowFilterName(any_=_TRAININGS)))
    silent = {f"prefect.flow-run.{run.id}": run for run in running if run.state and run.state.timestamp < since}
    asked = list(silent)
    for first in range(0, len(asked), _AT_ONCE):
        newest = EventFilter(
            # A heartbeat has the time of its machine, whose clock may be ahead of ours.
            occurred=EventOccurredFilter(since=since, until=since + timedelta(days=1)),
            event=EventNameFilter(name=[HEARTBEAT]),
            resource=EventResourceFilter(id=asked[first : first + _AT_ONCE], distinct=True),
        )
        for event in (await client.read_events(newest, limit=_AT_ONCE)).events:
            silent.pop(event.resource.id, None)
    return list(silent.values())


def _is_lost(flow_run: FlowRun) -> bool:
    """Whether this start of a flow run has held the lease of its run and has let it run out."""
    run_id, _, _ = flow_run.name.partition(" ")
    settings = Settings.load()
    if settings.s3.embedded and not running_facts(settings.home / "s3"):
        return False  # and no server is started for this
    with open_workspace(settings) as workspace:
        try:
            record, _ = read_record(workspace.store, run_id)
        except (RunNotFoundError, ConfigError):  # it has not come so far, or somebody has given it another name
            return False
        if record.origin.flow_run_id != str(flow_run.id) or not record.attempts or not flow_run.state:
            return False
        # One that has not begun yet waits for the lease of the one before, or fetches images.
        has_begun = record.attempts[-1].held_at + _CLOCKS_DIFFER > flow_run.state.timestamp
        return has_begun and status_of(record, workspace.store.now()) == "lost"
