"""The flow `retrain` on a server: a recipe of the project file, from `nightshift up` to a night with nothing new."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from nightshift.local.prefect import PrefectServer
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import newest_records, read_record
from nightshift.storage.s3 import S3
from tests.commands import Finished
from tests.conftest import eventually
from tests.deployments.server.conftest import Nightshift, worker_of
from tests.own_images import CLASSES, DATASET, DEPLOYMENT, transitions_of, write_images

pytestmark = pytest.mark.soak  # a server, a worker and deployments of its own take minutes


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the project file. The workers' is another."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "nightshift.toml").write_text(DATASET + DEPLOYMENT)
    write_images(folder, range(150))
    return folder


@pytest.fixture(scope="module")
def store(stack: dict[str, Any], laptop: Path, prefix: str) -> Iterator[S3]:
    with embedded_s3(laptop, prefix) as store:
        yield store


@pytest.fixture(scope="module")
def first(nightshift: Nightshift, stack: dict[str, Any]) -> Finished:
    """The first night, started by hand under the name of its day."""
    return nightshift("submit", "parts", "--watch", "--json")


def test_the_deployment_of_a_recipe_trains_on_the_images_beside_the_project_file(
    first: Finished, stack: dict[str, Any], store: S3, ask: Callable[..., Any]
) -> None:
    assert (first.exit_code, first.json["state"]) == (0, "Completed"), first.err
    (record,) = newest_records(store)
    assert record.run_id == first.json["run_id"]
    assert record.run_id.startswith("parts-20")
    assert (record.status, record.dataset.name, record.origin.deployment) == ("finished", "parts", "retrain/parts")
    assert transitions_of(store) == [record.run_id]
    (schedule,) = ask("deployments/name/retrain/parts")["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("0 3 * * *", "Europe/Berlin")
    assert "retrain/parts" in stack["deployments"]


def test_a_night_without_anything_new_is_completed_and_says_that_it_trains_nothing(
    first: Finished, nightshift: Nightshift, store: S3
) -> None:
    night = nightshift("submit", "retrain/parts", "--run-id=idle", "--watch")
    assert night.exit_code == 0, night.err
    assert f"idle trains nothing: all is as it was for {first.json['run_id']}" in " ".join(night.out.split())
    assert len(list(newest_records(store))) == 1


def test_images_that_break_a_rule_end_the_night_before_training_and_the_champion_stays(
    first: Finished, nightshift: Nightshift, store: S3, directory: Path
) -> None:
    shutil.rmtree(directory / "images" / CLASSES[0])
    night = nightshift("submit", "parts", "--run-id=broken", "--watch")
    said = " ".join(night.out.split())
    assert night.exit_code == 1
    assert "Failed" in said
    assert "tonight's images of parts are not trained on" in said
    assert f"{CLASSES[0]}" in said
    assert 'gone_class = "warn"' in said
    assert transitions_of(store) == [record.run_id for record in newest_records(store)] == [first.json["run_id"]]


def test_a_sweep_trains_its_trials_on_one_snapshot_and_compares_them_on_its_validation_images(
    first: Finished, nightshift: Nightshift, store: S3
) -> None:
    """The newest snapshot is not fit to train on, as the test before has seen."""
    sweep = nightshift(
        "sweep", "--over=seed=1,2", "--recipe=parts", "--sweep-id=own", "--no-promote", "--watch", "--json"
    )
    assert (sweep.exit_code, sweep.json.get("state")) == (0, "Completed"), sweep.out + sweep.err
    trials = [read_record(store, run_id)[0] for run_id in ("own-01", "own-02")]
    assert [(trial.status, trial.dataset.digest) for trial in trials] == [
        ("finished", read_record(store, first.json["run_id"])[0].dataset.digest)
    ] * 2
    seen = [trial.curve[-1].validation_accuracy for trial in trials]
    assert [line["validation accuracy"] for line in sweep.json["trials"]] == seen
    assert None not in seen
    best = max(trials, key=lambda trial: trial.curve[-1].validation_accuracy or 0)
    assert f"{best.run_id} is the best of 2 trials" in sweep.err


def test_submit_says_which_deployments_of_the_team_there_are(nightshift: Nightshift, stack: dict[str, Any]) -> None:
    done = nightshift("submit", "prats")
    assert (done.exit_code, "There are retrain/parts" in done.err) == (2, True), done.err


def _succeeds(request: Callable[[], httpx.Response]) -> bool:
    return request().is_success


@pytest.fixture(scope="module")
def later(
    first: Finished, nightshift: Nightshift, its_server: PrefectServer, ask: Callable[..., Any], directory: Path
) -> Finished:
    """`nightshift up` with a project file without the table, on a server whose automations are those of yesterday."""
    for automation in ask("automations/filter", limit=100):
        related = automation["trigger"].get("match_related", {})
        if "retrain" in related.get("prefect.resource.name", []):
            related["prefect.resource.name"].remove("retrain")
            login = (its_server.login or "").split(":", 1)
            changed = {name: automation[name] for name in ("name", "description", "enabled", "trigger", "actions")}
            url = f"{its_server.api_url}/automations/{automation['id']}"
            put = partial(httpx.put, url, json=changed, auth=(login[0], login[1]), timeout=30)
            # While its SQLite is locked, the server answers 503. Prefect's own client asks again too.
            eventually(partial(_succeeds, put))
    (directory / "other.toml").write_text(DATASET)
    (directory / ".env").write_text("NIGHTSHIFT_PROJECT=other.toml")
    return nightshift("up")


def test_a_deployment_that_is_taken_out_of_the_file_stays_and_is_named(
    later: Finished, ask: Callable[..., Any]
) -> None:
    assert later.exit_code == 0, later.err
    assert "retrain/parts is on the server and not in the project file" in later.out
    assert "prefect deployment delete retrain/parts" in later.out
    assert ask("deployments/name/retrain/parts")


def test_automations_of_yesterday_watch_over_retrain_from_then_on(later: Finished, ask: Callable[..., Any]) -> None:
    flows = [
        automation["trigger"]["match_related"]["prefect.resource.name"]
        for automation in ask("automations/filter", limit=100)
        if automation["trigger"].get("match_related")
    ]
    assert len(flows) == 5
    assert all({"train-cifar", "retrain"} <= set(names) for names in flows)


def test_workers_go_on_with_the_project_file_that_up_was_last_typed_with(
    later: Finished, laptop: Path, directory: Path
) -> None:
    wrapper, _ = worker_of(laptop)
    environment = Path(f"/proc/{wrapper}/environ").read_text().split("\0")
    assert f"NIGHTSHIFT_PROJECT={directory / 'other.toml'}" in environment
