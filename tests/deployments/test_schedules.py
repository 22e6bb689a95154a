"""What is deployed, and when it starts: the project decides, as far as it says something that can be."""

from pathlib import Path
from typing import Any

import pytest

from deployments.planned import planned, shipped_deployments
from deployments.schedules import check_times
from nightshift.config.project import DatasetConfig, DeploymentConfig, Project, RecipeConfig
from nightshift.errors import ConfigError

FILE = Path("nightshift.toml")


def project(name: str = "nightly", **deployment: Any) -> Project:
    return Project(
        datasets={"parts": DatasetConfig(source="s3://factory/parts/")},
        recipes={
            "parts": RecipeConfig.model_validate({"dataset": "parts"}),
            "lost": RecipeConfig.model_validate({"dataset": "elsewhere"}),
        },
        deployments={name: DeploymentConfig(**deployment)},
    )


def test_what_the_project_leaves_out_is_as_it_is_shipped() -> None:
    made, shipped = planned(project(timezone="Europe/Berlin"), FILE), planned(Project(), FILE)
    assert made["train-cifar/nightly"]["schedules"] == [
        {"cron": "0 2 * * *", "timezone": "Europe/Berlin", "active": True}
    ]
    assert made["recover/every-5-minutes"] == shipped["recover/every-5-minutes"]
    assert made["train-cifar/adhoc"]["schedules"] == []
    assert list(shipped.values()) == shipped_deployments()


def test_a_recipe_of_the_team_becomes_a_deployment_that_runs_where_and_as_the_nightly_one_does() -> None:
    made = planned(project("bolts", recipe="parts", cron="0 3 * * *", timezone="Asia/Tokyo"), FILE)
    ours, nightly = made["retrain/bolts"], made["train-cifar/nightly"]
    assert ours["entrypoint"] == "flows.retrain.retrain"
    assert ours["parameters"] == {"recipe": "parts", "run_id": "bolts-{date}", "promote": True}
    assert ours["schedules"] == [{"cron": "0 3 * * *", "timezone": "Asia/Tokyo", "active": True}]
    assert {name: ours[name] for name in ("work_pool", "concurrency_limit")} == {
        name: nightly[name] for name in ("work_pool", "concurrency_limit")
    }


def test_a_recipe_without_a_time_is_deployed_to_be_started_by_hand() -> None:
    made = planned(project("bolts", recipe="parts", promote=False), FILE)["retrain/bolts"]
    assert made["schedules"] == []
    assert made["parameters"]["promote"] is False


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (project("nightyl"), r"\[deployments.nightyl\] recipe: is missing.* Did you mean nightly\?"),
        (
            project("adhoc", cron="0 2 * * *"),
            r"\[deployments.adhoc\] is .*a schedule are: daily, every-5-minutes, nightly",
        ),
        (project("nightly", recipe="parts"), r"\[deployments.nightly\] recipe: nightly is nightshift's own"),
        (project("nightly", promote=False), r"\[deployments.nightly\] promote: nightly is nightshift's own"),
        (project("bolts", recipe="prats"), r"\[deployments.bolts\] recipe 'prats': .*Did you mean parts\?"),
        (project("bolts", recipe="quick"), r"\[deployments.bolts\] recipe 'quick': cifar10 is nightshift's own"),
        (project("bolts", recipe="parts", timezone="Asia/Tokyo"), r"\[deployments.bolts\] timezone: there is no cron"),
        (
            project(timezone="Europe/Brelin"),
            r"\[deployments.nightly\] timezone: there is no time zone 'Europe/Brelin'. Did you mean Europe/Berlin\?",
        ),
        (project("a/b", recipe="parts"), r"\[deployments.a/b\] is not a valid name"),
        (project("bolts", recipe="lost"), r"\[deployments.bolts\] recipe 'lost': there is no data set 'elsewhere'"),
    ],
)
def test_a_deployment_that_cannot_be_is_refused_by_file_table_and_field(chosen: Project, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{FILE}: {told}"):
        planned(chosen, FILE)


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (project(cron="at two"), r"\[deployments.nightly\] cron: .*'at two'"),
        (project("bolts", recipe="parts", cron="0 0 0"), r"\[deployments.bolts\] cron: .*'0 0 0'"),
    ],
)
def test_a_time_that_cannot_be_is_refused_by_file_and_name(chosen: Project, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{FILE}: {told}"):
        check_times(planned(chosen, FILE), FILE)
