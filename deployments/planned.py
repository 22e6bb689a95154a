"""The deployments that a project has: those of nightshift, on its schedules, and those of the flow retrain it names.

Nothing in here imports Prefect, so a mistake in the project file is reported at once.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zoneinfo import available_timezones

import yaml

from nightshift.config.project import DeploymentConfig, Project
from nightshift.data.names import check_flow, checked_config
from nightshift.errors import ConfigError
from nightshift.explain import near_miss
from nightshift.ids import DATASET

_FILE = Path(__file__).with_name("prefect.yaml")

Deployments = dict[str, dict[str, Any]]
"""As in a prefect.yaml, by FLOW/DEPLOYMENT."""


def planned(project: Project, path: Path) -> Deployments:
    """The deployments of prefect.yaml, as the project wants them, and the project's own.

    Args:
        path: the project file, for messages.

    Raises:
        ConfigError: a table of the project names a deployment, a recipe, a data set or a time that cannot be.
    """
    shipped = shipped_deployments()
    ours = {deployment["name"] for deployment in shipped}
    deployments = [_rescheduled(deployment, project.deployments.get(deployment["name"])) for deployment in shipped]
    for name, config in project.deployments.items():
        try:
            _check_zone(config.timezone)
            if name in ours:
                _check_ours(name, config, shipped)
            else:
                deployments.append(_retrain(name, config, project, shipped))
        except ConfigError as error:
            raise ConfigError(f"{path}: [deployments.{name}] {error}") from None
    return by_name(deployments)


def shipped_deployments() -> list[dict[str, Any]]:
    """The deployments of prefect.yaml as they are."""
    deployments: list[dict[str, Any]] = yaml.safe_load(_FILE.read_text())["deployments"]
    return [_rescheduled(deployment, None) for deployment in deployments]


def by_name(deployments: Iterable[dict[str, Any]]) -> Deployments:
    # The flows are named after their functions.
    return {
        f"{deployment['entrypoint'].rpartition('.')[2].replace('_', '-')}/{deployment['name']}": deployment
        for deployment in deployments
    }


def _rescheduled(deployment: dict[str, Any], config: DeploymentConfig | None) -> dict[str, Any]:
    own = config.model_dump(include={"cron", "timezone"}, exclude_none=True) if config else {}
    schedules = [{**schedule, **own, "active": True} for schedule in deployment.get("schedules", ())]
    return {**deployment, "schedules": schedules}


def _check_zone(name: str | None) -> None:
    if name is not None and name not in (known := available_timezones()):
        raise ConfigError(f"timezone: there is no time zone {name!r}.{near_miss(name, known)}")


def _check_ours(name: str, config: DeploymentConfig, shipped: list[dict[str, Any]]) -> None:
    if mistaken := sorted(config.model_fields_set - {"cron", "timezone"}):
        raise ConfigError(
            f"{mistaken[0]}: {name} is nightshift's own, and only its cron and its timezone can be set. Give a "
            "deployment of your own another name"
        )
    if name not in (known := _scheduled(shipped)):
        raise ConfigError(f"is nightshift's own and starts by hand only. Those with a schedule are: {', '.join(known)}")


def _retrain(name: str, config: DeploymentConfig, project: Project, shipped: list[dict[str, Any]]) -> dict[str, Any]:
    """The deployment retrain/NAME: the nightly one of nightshift, with the flow and the recipe of the team's own."""
    if not config.recipe:
        known = _scheduled(shipped)
        raise ConfigError(
            f"recipe: is missing, and makes a deployment of your own.{near_miss(name, known)} Those of nightshift "
            f"whose schedule can be set are: {', '.join(known)}"
        )
    if config.timezone and not config.cron:
        raise ConfigError("timezone: there is no cron that it is for")
    if not re.fullmatch(DATASET, name):
        raise ConfigError("is not a valid name: use up to 63 letters, digits, '_' and '-', a letter or a digit first")
    try:
        check_flow("retrain", checked_config(config.recipe, project=project), project)
    except ConfigError as error:
        raise ConfigError(f"recipe {config.recipe!r}: {error}") from None
    nightly = next(deployment for deployment in shipped if deployment["name"] == "nightly")
    schedule = {"cron": config.cron, "timezone": config.timezone or "UTC", "active": True}
    return {
        **nightly,
        "name": name,
        "description": f"Trains the recipe {config.recipe} on the images that there are, if anything has changed.",
        "entrypoint": "flows.retrain.retrain",
        "parameters": {"recipe": config.recipe, "run_id": f"{name}-{{date}}", "promote": config.promote},
        "schedules": [schedule] if config.cron else [],
    }


def _scheduled(shipped: list[dict[str, Any]]) -> list[str]:
    return sorted(deployment["name"] for deployment in shipped if deployment["schedules"])
