"""When deployments start by themselves: as the project says, unless somebody has changed that on the server.

A variable on the server holds what was deployed last. A schedule that differs from it was changed on the server, in the
UI or by `prefect deployment schedule`, and is kept.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import DeploymentSchedule
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.variables import Variable
from pydantic import ValidationError

from deployments.planned import Deployments
from nightshift.errors import ConfigError
from nightshift.explain import problem_of

_VARIABLE = "nightshift_schedules"

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


def check_times(planned: Deployments, path: Path) -> None:
    """Raise ConfigError, which names the table of the project file, if a schedule is none.

    Args:
        path: the project file, for messages.
    """
    for deployment in planned.values():
        for schedule in deployment["schedules"]:
            _check(f"{path}: [deployments.{deployment['name']}]", schedule)


def keep_changed(client: SyncPrefectClient, planned: Deployments, shipped: Deployments) -> list[Kept]:
    """Put the server's schedules into `planned` where somebody has changed them there, and say where that is.

    Args:
        shipped: what was deployed where the server does not know: before there was a project file.
    """
    shipped_then = {name: deployment["schedules"] for name, deployment in shipped.items()}
    deployed, kept = {**shipped_then, **_deployed()}, []
    for name, deployment in planned.items():
        try:
            there = [_as_config(schedule) for schedule in client.read_deployment_by_name(name).schedules]
        except ObjectNotFound:
            continue
        if there not in (deployed.get(name, there), deployment["schedules"]):
            kept.append(Kept(name, there, deployment["schedules"]))
            deployment["schedules"] = there
    return kept


def remember(planned: Deployments, kept: Iterable[Kept]) -> None:
    """Note what is deployed, so that a change on the server is seen for one."""
    schedules = {name: deployment["schedules"] for name, deployment in planned.items()}
    # Those of other projects, and of tables that may come back, stay noted.
    noted = {**_deployed(), **schedules, **{entry.deployment: entry.planned for entry in kept}}
    Variable.set(_VARIABLE, noted, overwrite=True)


def _deployed() -> dict[str, Schedules]:
    noted: Any = Variable.get(_VARIABLE, default={})
    return dict(noted)


def _as_config(schedule: DeploymentSchedule) -> dict[str, Any]:
    """A schedule of the server in the words of a prefect.yaml, without what is as it is by default."""
    fields = schedule.schedule.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    others = {"slug": schedule.slug, "parameters": schedule.parameters}
    return {**fields, **{name: value for name, value in others.items() if value}, "active": schedule.active}


def _check(where: str, schedule: Mapping[str, Any]) -> None:
    try:
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"])
        raise ConfigError(f"{where} {field}: {problem_of(detail)} ({schedule.get(field)!r})") from None


def _text(schedules: Schedules) -> str:
    return " and ".join(map(_schedule_text, schedules)) or "none"


def _schedule_text(schedule: Mapping[str, Any]) -> str:
    when = schedule.get("cron") or schedule.get("rrule") or f"every {schedule.get('interval')} s"
    return f"{when} {schedule.get('timezone', 'UTC')}{'' if schedule['active'] else ' (paused)'}"
