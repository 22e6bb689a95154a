"""When deployments start by themselves: as the project says, unless somebody has changed that on the server.

What was deployed last stands in a variable of the server. A schedule that is no longer that was changed there, in the
UI or by `prefect deployment schedule`, and is kept.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.variables import Variable
from pydantic import ValidationError

from nightshift.config.project import DeploymentConfig, Project
from nightshift.errors import ConfigError
from nightshift.explain import near_miss, problem_of

_DEPLOYED = "nightshift_schedules"

Schedules = list[dict[str, Any]]
"""As in a prefect.yaml: each with `cron`, `timezone` and `active`."""


@dataclass(frozen=True)
class Kept:
    """A deployment whose schedules are not those of the project, because somebody has changed them on the server."""

    deployment: str
    schedules: Schedules
    planned: Schedules

    def __str__(self) -> str:
        return (
            f"{self.deployment} keeps the schedule that somebody gave it on the server: {_text(self.schedules)}. To "
            f"replace it by {_text(self.planned)}: nightshift deploy --replace-schedules"
        )


def scheduled(shipped: Iterable[dict[str, Any]], project: Project) -> dict[str, dict[str, Any]]:
    """The deployments of a prefect.yaml by FLOW/DEPLOYMENT, on the schedules of the project.

    Raises:
        ConfigError: the project names a deployment that has no schedule, or a schedule that is none.
    """
    shipped = list(shipped)
    known = {deployment["name"] for deployment in shipped if deployment.get("schedules")}
    for name in project.deployments.keys() - known:
        raise ConfigError(
            f"[deployments.{name}]: no deployment of this name has a schedule.{near_miss(name, known)} "
            f"Those that have one: {', '.join(sorted(known))}"
        )
    planned = {}
    for deployment in shipped:
        # The flows are named after their functions.
        flow = deployment["entrypoint"].rpartition(".")[2].replace("_", "-")
        own = project.deployments.get(deployment["name"], DeploymentConfig()).model_dump(exclude_none=True)
        schedules = [{**schedule, **own, "active": True} for schedule in deployment.get("schedules", ())]
        planned[f"{flow}/{deployment['name']}"] = {**deployment, "schedules": schedules}
        _check(deployment["name"], schedules)
    return planned


def keep_changed(
    client: SyncPrefectClient, planned: Mapping[str, dict[str, Any]], shipped: Mapping[str, dict[str, Any]]
) -> list[Kept]:
    """Put the server's schedules into `planned` where somebody has changed them there, and say where that is.

    Args:
        shipped: what was deployed where the server does not know: before there was a project file.
    """
    deployed: Any = Variable.get(_DEPLOYED, default={})
    kept = []
    for name, deployment in planned.items():
        try:
            there = [_as_config(schedule) for schedule in client.read_deployment_by_name(name).schedules]
        except ObjectNotFound:
            continue
        if there not in (deployed.get(name, shipped[name]["schedules"]), deployment["schedules"]):
            kept.append(Kept(name, there, deployment["schedules"]))
            deployment["schedules"] = there
    return kept


def remember(planned: Mapping[str, dict[str, Any]], kept: Iterable[Kept]) -> None:
    """Note what is deployed, so that a change on the server is seen for one."""
    schedules = {name: deployment["schedules"] for name, deployment in planned.items()}
    Variable.set(_DEPLOYED, {**schedules, **{entry.deployment: entry.planned for entry in kept}}, overwrite=True)


def _as_config(schedule: DeploymentSchedule) -> dict[str, Any]:
    """A schedule of the server in the words of a prefect.yaml, without what is as it is by default."""
    fields = schedule.schedule.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    others = {"slug": schedule.slug, "parameters": schedule.parameters}
    return {**fields, **{name: value for name, value in others.items() if value}, "active": schedule.active}


def _check(name: str, schedules: Schedules) -> None:
    for schedule in schedules:
        try:
            CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
        except ValidationError as error:
            detail = error.errors()[0]
            field = ".".join(str(part) for part in detail["loc"])
            raise ConfigError(f"[deployments.{name}] {field}: {problem_of(detail)} ({schedule.get(field)!r})") from None


def _text(schedules: Schedules) -> str:
    return " and ".join(map(_schedule_text, schedules)) or "none"


def _schedule_text(schedule: Mapping[str, Any]) -> str:
    when = schedule.get("cron") or schedule.get("rrule") or f"every {schedule.get('interval')} s"
    return f"{when} {schedule.get('timezone', 'UTC')}{'' if schedule['active'] else ' (paused)'}"
