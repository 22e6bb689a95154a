"""The flow `recover`: find interrupted runs and start their deployments again."""

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Annotated, Any
from uuid import UUID

import httpx
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import AwaitingRetry
from pydantic import Field

from nightshift import progress
from nightshift.config.project import Project, load_project
from nightshift.config.recipes import named
from nightshift.errors import DeploymentNotFoundError
from nightshift.records import recovery
from nightshift.records.recovery import Found, InterruptedRun
from nightshift.records.run import RunRecord
from nightshift.settings import Settings
from nightshift.storage.store import Store
from nightshift.workspace import open_workspace
from tasks import state_type

WithinHours = Annotated[float, Field(ge=0, le=876_000)]
Deployments = Callable[[str], DeploymentResponse | None]
_OURS = re.compile(r"(train-cifar|retrain)/[^/%&<>?#.\\][^/%&<>?#\\]*")
_ENTRYPOINT = re.compile(r"(.*/)?flows[./](train_cifar(\.py)?[.:]train_cifar|retrain(\.py)?[.:]retrain)")
_ON_ITS_WAY = {StateType.SCHEDULED, StateType.PENDING}
_PREFECTS_TURN = timedelta(minutes=5)
"""How long a run whose flow run the server knows is left to the automations, which take two minutes."""
_AUTOMATIONS_TURN = timedelta(minutes=1)
"""How long a crashed flow run is left to the automation, which starts it again after 20 s."""
CANCELLED = {StateType.CANCELLING, StateType.CANCELLED}


@flow(name="recover", result_serializer="json")
def recover(within_hours: WithinHours = 24) -> dict[str, list[str]]:
    """Start the deployments of interrupted runs again, under the same run ids, and say which runs are live.

    Sweeps that have crashed are started again too.

    Args:
        within_hours: Look at runs that were written to within so many hours.
    """
    settings = Settings.load()
    with open_workspace(settings) as workspace:
        found = recovery.find(workspace.store, timedelta(hours=within_hours))
        started = start_deployed(workspace.store, found, settings)
    start_sweeps(timedelta(hours=within_hours))
    progress.current().say(f"started: {', '.join(started) or 'none'}; live: {', '.join(found.live) or 'none'}")
    return {"started": started, "live": found.live}


def is_being_cancelled() -> bool:
    """Whether the user has cancelled this flow run. The process gets the same signal when its machine goes down."""
    # If that is unknown, the run counts as interrupted, and recovery asks again.
    return state_type(UUID(flow_run.get_id())) in CANCELLED


def start_deployed(store: Store, found: Found, settings: Settings) -> list[str]:
    """Start again those interrupted runs that a deployment of ours had started. Returns their run ids."""
    started = []
    with get_client(sync_client=True) as client:
        deployments = _deployments(client)
        project = load_project(settings.project)
        due = recovery.claim_due(store, _to_start(store, client, found, deployments), settings.max_recoveries)
        for record in due:
            with recovery.apart(store, record.run_id, server_fails):
                _start(client, record, deployments, project)
                started.append(record.run_id)
    return started


def _start(client: SyncPrefectClient, record: RunRecord, deployments: Deployments, project: Project) -> None:
    assert record.origin.deployment is not None
    deployment = deployments(record.origin.deployment)
    if not deployment:
        raise DeploymentNotFoundError(
            f"there is no deployment {record.origin.deployment!r} any more. To go on without it: "
            f"nightshift resume {record.run_id}"
        )
    recipe, overrides = named(record.train_config(), project)
    client.create_flow_run_from_deployment(
        deployment.id,
        parameters={
            "recipe": recipe,
            "overrides": overrides,
            "run_id": record.run_id,
            "promote": record.origin.promote,
        },
        # By these the next recovery sees that the run is on its way, or was cancelled before it began.
        tags=["recovery", record.run_id],
        idempotency_key=f"{record.run_id}/{record.sequence}",
    )


def _deployments(client: SyncPrefectClient) -> Deployments:
    """A function that reads a deployment by its name; None if there is none. It raises DeploymentNotFoundError if it is
    not one of ours.

    So nothing else that is deployed on the server is started, whatever a record says.
    """

    @cache
    def read(name: str) -> DeploymentResponse | None:
        deployment = None
        if _OURS.fullmatch(name):
            try:
                deployment = client.read_deployment_by_name(name)
            except ObjectNotFound:
                return None
        if not deployment or not _ENTRYPOINT.fullmatch(deployment.entrypoint or ""):
            raise DeploymentNotFoundError(
                f"{name!r}, which its record names, is no deployment of nightshift's training"
            )
        return deployment

    return read


def server_fails(error: BaseException) -> bool:
    """Whether it is the Prefect server that fails, whichever run is asked for."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.is_server_error
    return isinstance(error, httpx.TransportError)


def start_sweeps(within: timedelta) -> None:
    """Start again the sweeps that have crashed within this time. They have no run record, but Prefect knows them."""
    crashed = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED]))
    with get_client(sync_client=True) as client:
        for sweep in client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["sweep"])), flow_run_filter=FlowRunFilter(state=crashed)
        ):
            if sweep.state and datetime.now(UTC) < sweep.state.timestamp + within:
                start_again_if_lost(client, sweep)


def start_again_if_lost(client: SyncPrefectClient, flow_run: FlowRun) -> None:
    """Start a crashed flow run again if the automation did not: on SQLite, events are lost now and then."""
    assert flow_run.state
    if flow_run.state_type == StateType.CRASHED and datetime.now(UTC) > flow_run.state.timestamp + _AUTOMATIONS_TURN:
        again: State[Any] = AwaitingRetry(message="Crashed. It goes on where it stopped.")
        client.set_flow_run_state(flow_run.id, again, force=True)
        progress.current().say(f"{flow_run.name} had crashed and is started again")


def _to_start(
    store: Store, client: SyncPrefectClient, found: Found, deployments: Deployments
) -> Iterator[InterruptedRun]:
    """The interrupted runs with a deployment of ours that are neither on their way already nor cancelled."""
    for run in found.interrupted:
        is_to_start = False
        with recovery.apart(store, run.record.run_id, server_fails):
            is_to_start = _is_to_start(store, client, run.record, deployments)
        if is_to_start:
            yield run


def _is_to_start(store: Store, client: SyncPrefectClient, record: RunRecord, deployments: Deployments) -> bool:
    if not record.origin.deployment:
        return False
    deployments(record.origin.deployment)
    newest = newest_flow_run(client, record.run_id, record.origin.flow_run_id)
    # All states, not only the last: a flow run that is being cancelled ends Crashed, because a signal stopped it.
    states = {state.type for state in client.read_flow_run_states(newest.id)} if newest else set()
    if states & CANCELLED:
        progress.current().say(f"run {record.run_id} was cancelled on the server and is left alone")
        recovery.close(store, record.run_id, "cancelled")
        return False
    until = record.updated_at + _PREFECTS_TURN
    if newest and store.now() < until:
        progress.current().say(f"run {record.run_id} is left to Prefect's automations until {until:%H:%M:%S} UTC")
        return False
    if newest and newest.state_type in _ON_ITS_WAY:
        progress.current().say(f"run {record.run_id} is left to {newest.name}, which waits for a worker")
        return False
    return True


def newest_flow_run(client: SyncPrefectClient, run_id: str, flow_run_id: str | None) -> FlowRun | None:
    """The newest flow run of a run: the one with this id, or the newest that a recovery has started."""
    flow_runs = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=["recovery", run_id])),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=1,
    )
    if flow_run_id:
        with suppress(ObjectNotFound):  # it belongs to another server, or to one that has lost its database
            flow_runs.append(client.read_flow_run(UUID(flow_run_id)))
    return max(flow_runs, key=lambda flow_run: str(flow_run.created), default=None)
