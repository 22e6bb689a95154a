"""When deployments start: the project decides, as far as it says something that can be."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.schedules import scheduled
from nightshift.config.project import DeploymentConfig, Project
from nightshift.errors import ConfigError

SHIPPED: list[dict[str, Any]] = yaml.safe_load(Path("deployments/prefect.yaml").read_text())["deployments"]


def project(**nightly: str) -> Project:
    return Project(deployments={"nightly": DeploymentConfig(**nightly)})


def test_what_the_project_leaves_out_is_as_it_is_shipped() -> None:
    planned = scheduled(SHIPPED, project(timezone="Europe/Berlin"))
    assert planned["train-cifar/nightly"]["schedules"] == [
        {"cron": "0 2 * * *", "timezone": "Europe/Berlin", "active": True}
    ]
    assert planned["recover/every-5-minutes"] == scheduled(SHIPPED, Project())["recover/every-5-minutes"]
    assert planned["train-cifar/adhoc"]["schedules"] == []


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (project(cron="at two"), r"\[deployments.nightly\] cron: .*'at two'"),
        (project(timezone="Europe/Atlantis"), r"\[deployments.nightly\] timezone: .*'Europe/Atlantis'"),
        (Project(deployments={"nightyl": DeploymentConfig()}), "Did you mean nightly?"),
        (Project(deployments={"adhoc": DeploymentConfig()}), "Those that have one: every-5-minutes, nightly"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_name(chosen: Project, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        scheduled(SHIPPED, chosen)
