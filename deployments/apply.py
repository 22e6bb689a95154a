"""Make a Prefect server match this directory; doing it again changes nothing."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from uuid import UUID

import yaml
from prefect.automations import AutomationCore
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.exceptions import ObjectNotFound
from pydantic import TypeAdapter

from deployments.client import connected
from deployments.planned import Deployments, by_name, shipped_deployments
from deployments.schedules import Kept, check_times, keep_changed, remember
from nightshift.errors import ConfigError, PrefectServerError

_HERE = Path(__file__).parent
_RETRAIN = FlowFilter(name=FlowFilterName(any_=["retrain"]))


@dataclass(frozen=True)
class Deployed:
    """What a server has after it was made to match."""

    deployments: list[str]
    """As FLOW/DEPLOYMENT."""
    kept: list[Kept]
    """Those among them that keep the server's schedule."""
    others: list[str]
    """Deployments of the flow retrain that the project does not have: no longer, or never."""

    @property
    def remarks(self) -> list[str]:
        """What somebody may want to do about it, in sentences."""
        return [
            *map(str, self.kept),
            *(
                f"{name} is on the server and not in the project file, and is left as it is. If nobody needs it any "
                f"more: prefect deployment delete {name}"
                for name in self.others
            ),
        ]


def apply(deployments: Deployments, path: Path, notify: str | None, replace_schedules: bool = False) -> Deployed:
    """Make or update the work pools that the deployments name, the deployments, and the automations.

    Args:
        path: the project file, for messages.
        notify: the notification block, as TYPE/NAME, that reports failed, lost and rejected runs; None: none does.
        replace_schedules: also those that somebody has changed on the server.

    Raises:
        ConfigError: there is no such block on the server, or a schedule is none.
        PrefectServerError: the server does not answer, or refuses one of them.
    """
    check_times(deployments, path)
    with connected() as client:
        kept = [] if replace_schedules else keep_changed(client, deployments, by_name(shipped_deployments()))
        for pool in {deployment["work_pool"]["name"] for deployment in deployments.values()}:
            template = json.loads((_HERE / "work-pools" / f"{pool}.json").read_text())
            kind = pool.partition("-")[2]
            client.create_work_pool(WorkPoolCreate(name=pool, type=kind, base_job_template=template), overwrite=True)
        _deploy({**_read("prefect.yaml"), "deployments": list(deployments.values())})
        remember(deployments, kept)
        _automate(client, notify)
        there = [f"retrain/{found.name}" for found in client.read_deployments(flow_filter=_RETRAIN)]
    return Deployed(sorted(deployments), kept, sorted(set(there) - deployments.keys()))


def _deploy(project_file: dict[str, Any]) -> None:
    with NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(project_file, file)
        file.flush()
        command = [sys.executable, "-m", "prefect", "deploy", "--all", "--prefect-file", file.name]
        done = subprocess.run(command, cwd=_HERE.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise PrefectServerError(f"`prefect deploy` has failed:\n{done.stdout}{done.stderr}")


def _automate(client: SyncPrefectClient, notify: str | None) -> None:
    planned, notifications = _read("automations.yaml")["automations"], _read("notifications.yaml")["automations"]
    if notify:
        block_id = _block_id(client, notify)
        for notification in notifications:
            notification["actions"] = [{**action, "block_document_id": block_id} for action in notification["actions"]]
        planned += notifications
    else:
        for notification in notifications:
            for stored in client.read_automations_by_name(notification["name"]):
                client.delete_automation(stored.id)
    for automation in TypeAdapter(list[AutomationCore]).validate_python(planned):
        _upsert(client, automation)


def _block_id(client: SyncPrefectClient, notify: str) -> UUID:
    kind, _, name = notify.partition("/")
    try:
        return client.read_block_document_by_name(name, kind).id
    except ObjectNotFound:
        raise ConfigError(
            f"NIGHTSHIFT_NOTIFY={notify}: the server has no such block. Make it in the UI (Blocks, for example Slack "
            "Webhook), and name it TYPE/NAME, such as slack-webhook/nightshift"
        ) from None


def _upsert(client: SyncPrefectClient, automation: AutomationCore) -> None:
    stored = client.read_automations_by_name(automation.name)
    if not stored:
        client.create_automation(automation)
    elif stored[0].model_dump(exclude={"id"}) != automation.model_dump():
        # Only then: an update forgets the events seen so far, so a run that goes missing just now would stay lost.
        client.update_automation(stored[0].id, automation)


def _read(name: str) -> Any:
    return yaml.safe_load((_HERE / name).read_text())
