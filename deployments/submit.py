"""A run on the Prefect server by its short name, watched until it has really ended."""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowFilter,
    FlowFilterName,
)
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import ArtifactSort
from prefect.utilities.urls import url_for
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_fixed

from deployments.client import connected
from flows.nights import start_in_zone
from flows.recover import newest_flow_run, server_fails
from nightshift import progress
from nightshift.config.project import Project
from nightshift.data.names import check_flow, checked_config
from nightshift.errors import DeploymentNotFoundError
from nightshift.ids import durable_run_id
from nightshift.sweeps.stored import plan

_POLL_SECONDS = 2.0
_PLAN = ("recipe", "space", "overrides", "trials", "seed", "startup_trials", "warmup_epochs")
_THE_END = {StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED}


def _warn(attempt: RetryCallState) -> None:
    if attempt.attempt_number == 1 and attempt.outcome:
        why = attempt.outcome.exception()
        progress.current().warn(f"the Prefect server does not answer ({why}); the run goes on without it")


_PATIENT = Retrying(retry=retry_if_exception(server_fails), wait=wait_fixed(_POLL_SECONDS), before_sleep=_warn)
"""Calls that wait for a server which is away or answers 5xx."""


@dataclass(frozen=True)
class Submitted:
    flow_run_id: UUID
    name: str
    url: str | None
    """Its page in the UI."""
    run_id: str | None
    """The id of the run or the sweep that it starts; None for other flows."""


def submit(name: str, parameters: Mapping[str, Any], project: Project) -> Submitted:
    """Start a deployment.

    Args:
        name: FLOW/DEPLOYMENT; or only FLOW: then its deployment `nightly`, or its only one; or, of retrain/DEPLOYMENT,
            only DEPLOYMENT.
        parameters: replace the deployment's own.
        project: what it trains is checked against; the deployment's own recipe is the worker's to check.

    Raises:
        ConfigError: the parameters are not a valid config or sweep.
        DeploymentNotFoundError: there is none of this name, or the flow has several.
        PrefectServerError: the server does not answer, or refuses.
    """
    with connected() as client:
        flow, deployment = _find(client, name)
        chosen = {**deployment.parameters, **parameters}
        is_sweep = "space" in chosen
        wanted, label = (chosen.get("sweep_id"), "sweep") if is_sweep else (chosen.get("run_id"), deployment.name)
        if is_sweep:
            plan(
                durable_run_id(wanted, label, datetime.now(UTC), ""),
                **{name: chosen[name] for name in _PLAN if name in chosen},
                project=project,
            )
        elif "recipe" in chosen and parameters.keys() & {"recipe", "overrides"}:
            config = checked_config(chosen["recipe"], chosen.get("overrides"), project=project)
            check_flow(flow, config, project)
        flow_run = client.create_flow_run_from_deployment(deployment.id, parameters=chosen)
        run_id = None
        if "recipe" in chosen:
            run_id = durable_run_id(wanted, label, start_in_zone(client, flow_run), str(flow_run.id))
        return Submitted(flow_run.id, flow_run.name, url_for(flow_run), run_id)


def watch(submitted: Submitted) -> Iterator[State[Any]]:
    """Each new state of a run until it is completed, failed or cancelled, whichever flow run carries it on.

    A crash is not the end: an automation runs the same flow run again, or the recovery flow starts another.
    """
    seen = None
    with connected() as client:
        while True:
            flow_run = _PATIENT(newest_flow_run, client, submitted.run_id or "", str(submitted.flow_run_id))
            assert flow_run is not None
            assert flow_run.state is not None
            if flow_run.state.id != seen:
                seen = flow_run.state.id
                yield flow_run.state
            if flow_run.state.type in _THE_END:
                return
            time.sleep(_POLL_SECONDS)


def read_table(submitted: Submitted, key: str) -> list[dict[str, Any]]:
    """The rows of the newest table artifact that a flow run has made under this key; empty if there is none."""
    with connected() as client:
        found = _PATIENT(
            client.read_artifacts,
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[submitted.flow_run_id]), key=ArtifactFilterKey(any_=[key])
            ),
            sort=ArtifactSort.CREATED_DESC,
            limit=1,
        )
    return json.loads(str(found[0].data)) if found else []


def _find(client: SyncPrefectClient, name: str) -> tuple[str, DeploymentResponse]:
    """A deployment, and the name of its flow."""
    flow, _, deployment = name.partition("/")
    known = _deployments_of(client, flow)
    if not (known or deployment):  # no flow, so perhaps one of the team's own
        flow, deployment = "retrain", flow
        known = _deployments_of(client, flow)
    if not deployment:
        deployment = next(iter(known)) if len(known) == 1 else "nightly"
    if deployment in known:
        return flow, known[deployment]
    there = f" There are {', '.join(f'{flow}/{other}' for other in sorted(known))}." if known else ""
    raise DeploymentNotFoundError(
        f"there is no deployment {name!r}.{there} `nightshift deploy` makes those of nightshift and of nightshift.toml"
    )


def _deployments_of(client: SyncPrefectClient, flow: str) -> dict[str, DeploymentResponse]:
    found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])))
    return {deployment.name: deployment for deployment in found}
