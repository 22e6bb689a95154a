"""Bring a Prefect server to what this directory says; doing it again changes nothing."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from pydantic import TypeAdapter

from deployments.client import connected
from nightshift.errors import PrefectServerError

_HERE = Path(__file__).parent


def apply() -> list[str]:
    """Make or update the work pools that the deployments name, the deployments, and the automations.

    Returns:
        The deployments, as FLOW/DEPLOYMENT.

    Raises:
        PrefectServerError: the server does not answer, or refuses one of them.
    """
    planned = _read("prefect.yaml")["deployments"]
    with connected() as client:
        for pool in {deployment["work_pool"]["name"] for deployment in planned}:
            template = json.loads((_HERE / "work-pools" / f"{pool}.json").read_text())
            kind = pool.removeprefix("gpu-")
            client.create_work_pool(WorkPoolCreate(name=pool, type=kind, base_job_template=template), overwrite=True)
        _deploy()
        for automation in TypeAdapter(list[AutomationCore]).validate_python(_read("automations.yaml")["automations"]):
            _upsert(client, automation)
        names = DeploymentFilterName(any_=[deployment["name"] for deployment in planned])
        made = client.read_deployments(deployment_filter=DeploymentFilter(name=names))
        return sorted(f"{client.read_flow(deployment.flow_id).name}/{deployment.name}" for deployment in made)


def _deploy() -> None:
    command = [sys.executable, "-m", "prefect", "deploy", "--all", "--prefect-file", str(_HERE / "prefect.yaml")]
    done = subprocess.run(command, cwd=_HERE.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise PrefectServerError(f"`prefect deploy` has failed:\n{done.stdout}{done.stderr}")


def _upsert(client: SyncPrefectClient, automation: AutomationCore) -> None:
    stored = client.read_automations_by_name(automation.name)
    if stored:
        client.update_automation(stored[0].id, automation)
    else:
        client.create_automation(automation)


def _read(name: str) -> Any:
    return yaml.safe_load((_HERE / name).read_text())
