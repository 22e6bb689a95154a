"""`doctor` sees whatever would keep the coming night from its run, and says what to type."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from nightshift.cli import doctor as doctor_module
from nightshift.local import supervisor
from nightshift.local.prefect import POOL, WAITING_POOL, PrefectServer, local_prefect
from nightshift.records.lease import acquire
from nightshift.refs import Verdict
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.conftest import eventually
from tests.records.test_lease import RESULT, spec

Checks = dict[str, dict[str, Any]]
NIGHTLY = "train-cifar/nightly"
PARTS = """
[datasets.parts]
source = "images"
[recipes.parts]
dataset = "parts"
"""


@pytest.fixture(scope="module")
def lone_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lone")


@pytest.fixture(scope="module")
def lone(lone_home: Path) -> Iterator[PrefectServer]:
    """A Prefect server on which nothing was ever deployed."""
    with local_prefect(lone_home) as (server, wait):
        wait()
        yield server


@pytest.fixture
def doctor(nightshift: Callable[..., Finished], lone: PrefectServer) -> Callable[..., Checks]:
    """What `doctor` finds, by the names of its checks."""

    def examine(**environment: str) -> Checks:
        done = nightshift("doctor", "--json", **{**lone.environment, **environment})
        assert "Traceback" not in done.err
        return {check["name"]: check for check in done.json["checks"]}

    return examine


@pytest.fixture
def deployed(nightshift: Callable[..., Finished], lone: PrefectServer) -> None:
    done = nightshift("deploy", **lone.environment)
    assert done.exit_code == 0, done.err


def test_a_server_without_deployments_makes_no_night_and_the_command_that_does_is_named(
    doctor: Callable[..., Checks],
) -> None:
    found = doctor()
    assert not found["deployments"]["ok"]
    assert NIGHTLY in found["deployments"]["detail"]
    assert found["deployments"]["detail"].endswith("Make them: nightshift deploy")
    assert not found["automations"]["ok"]
    assert not found[f"pool {POOL}"]["ok"]


def test_a_server_of_up_that_does_not_answer_is_not_the_users_to_start_and_its_log_is_named(
    nightshift: Callable[..., Finished], lone: PrefectServer, lone_home: Path
) -> None:
    directory = lone_home / "prefect"
    server = int((directory / "server.pid").read_text().split()[2])
    supervisor.keep(directory)
    os.kill(server, signal.SIGSTOP)
    done = nightshift("doctor", "--json", NIGHTSHIFT_HOME=str(lone_home))
    os.kill(server, signal.SIGCONT)
    (directory / "kept").unlink()
    (found,) = (check for check in done.json["checks"] if check["name"] == "Prefect")
    assert not found["ok"]
    assert found["detail"].startswith(f"{lone.api_url} does not answer")
    assert str(directory / "server.log") in found["detail"]
    assert "PREFECT_API_URL" not in found["detail"]


def test_what_was_deployed_is_there_with_the_next_start_in_its_zone_and_what_is_switched_off_is_seen(
    doctor: Callable[..., Checks], deployed: None, lone: PrefectServer
) -> None:
    eventually(lambda: bool(doctor()[f"schedule of {NIGHTLY}"]["ok"]))
    found = doctor()
    assert found["deployments"]["ok"]
    assert found["automations"]["ok"]
    assert found[f"schedule of {NIGHTLY}"]["detail"].startswith("next start 20")
    assert found[f"schedule of {NIGHTLY}"]["detail"].endswith("02:00 UTC")
    assert found["last recover"]["detail"].startswith("none yet, deployed ")
    for pool in (POOL, WAITING_POOL):
        assert found[f"pool {pool}"]["detail"].endswith(f"Start one: nightshift worker --pool {pool}")
    switch_off(lone)
    found = doctor()
    assert found[f"schedule of {NIGHTLY}"]["detail"].startswith("paused, so nothing starts")
    assert "train-cifar is started again" in found["automations"]["detail"]


def test_a_deployment_of_the_project_that_was_never_made_is_missing(
    doctor: Callable[..., Checks], deployed: None, tmp_path: Path
) -> None:
    project = tmp_path / "nightshift.toml"
    project.write_text('[deployments.parts]\nrecipe = "parts"\n' + PARTS)
    assert doctor()["deployments"]["detail"] == "missing: retrain/parts. Make them: nightshift deploy"
    project.write_text('[deployments.parts]\nrecipe = "part"\n' + PARTS)
    found = doctor()["Prefect"]
    assert not found["ok"]
    assert "[deployments.parts] recipe 'part'" in found["detail"]


def switch_off(server: PrefectServer) -> None:
    """As somebody does in the UI."""
    code = f"""
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    client.pause_deployment(client.read_deployment_by_name({NIGHTLY!r}).id)
    client.pause_automation(client.read_automations_by_name("train-cifar is started again")[0].id)
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **server.environment}, check=True)


def test_a_champion_that_cannot_be_read_or_has_lost_a_file_is_seen(
    doctor: Callable[..., Checks], workspace: Workspace
) -> None:
    workspace.store.put("models/cifar10/champion.json", b"{}")
    found = doctor(PREFECT_API_URL="http://127.0.0.1:9/api")["champion of cifar10"]
    assert not found["ok"]
    assert "models/cifar10/champion.json is damaged" in found["detail"]


def test_a_champion_of_which_only_a_record_tells_is_seen_as_lost(
    doctor: Callable[..., Checks], workspace: Workspace
) -> None:
    """With champion.json, its copy and all versions gone, every line was green."""
    run = acquire(workspace.store, spec("night"), lease_seconds=60)
    run.end(
        "finished",
        result=RESULT.changed(
            verdict=Verdict(promoted=True, reason="there was no champion", comparison=None, champion=None)
        ),
    )
    found = doctor(PREFECT_API_URL="http://127.0.0.1:9/api")["champion of cifar10"]
    assert not found["ok"]
    assert "nightshift champion --rebuild" in found["detail"]


def test_a_run_that_nobody_has_started_again_is_seen(monkeypatch: pytest.MonkeyPatch, workspace: Workspace) -> None:
    run = acquire(workspace.store, spec("night"), lease_seconds=60)
    run.end("interrupted")
    assert doctor_module._interrupted(workspace).ok, "recover comes every five minutes"
    monkeypatch.setattr(doctor_module, "_RECOVERED_BY_THEN", timedelta(0))
    found = doctor_module._interrupted(workspace)
    assert not found.ok
    assert "stopped for more than an hour: night. nightshift show RUN" in found.detail


def test_the_room_is_reckoned_in_nights_as_large_as_the_last_ones(
    doctor: Callable[..., Checks], workspace: Workspace
) -> None:
    run = acquire(workspace.store, spec("night"), lease_seconds=60)
    run.end("finished", result=RESULT.changed(model="models/cifar10/night/"))
    workspace.store.put("models/cifar10/night/weights.pth", bytes(2_000_000))
    workspace.store.put("reports/night/metrics.jsonl", bytes(1_000_000))
    found = doctor(PREFECT_API_URL="http://127.0.0.1:9/api")["room for nights"]
    assert "more at 3.0 MB each (the mean of the last 1)" in found["detail"]
