"""The deployments, as the README has them: pool, deploy, worker, run; and what becomes of a run that is lost."""

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nightshift import records
from nightshift.records import RunRecord
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.conftest import Finished, eventually

ROOT = Path(__file__).parents[1]
Prefect = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def prefix() -> str:
    return f"deployed-{secrets.token_hex(6)}"


@pytest.fixture(scope="module")
def environment(home: Path, prefix: str, prefect_api: str, cifar10: DatasetRef) -> dict[str, str]:
    ours = {"NIGHTSHIFT_HOME": str(home), "NIGHTSHIFT_S3__PREFIX": prefix, "PREFECT_API_URL": prefect_api}
    return {**os.environ, **ours}


@pytest.fixture(scope="module")
def prefect(environment: dict[str, str]) -> Prefect:
    """Run `prefect …` from the root of the checkout, with nobody there to answer a prompt."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "prefect", *arguments],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
        )

    return run


@pytest.fixture(scope="module", autouse=True)
def worker(prefect: Prefect, environment: dict[str, str]) -> Iterator[None]:
    """A worker for the deployments of the project."""
    assert prefect("work-pool", "create", "gpu-process", "--type", "process").returncode == 0
    deployed = prefect("deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu-process"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield
    process.kill()
    process.wait()


def test_the_nightly_deployment_trains_under_a_name_of_its_day(prefect: Prefect, workspace: Workspace) -> None:
    before = datetime.now(UTC)
    ran = prefect(
        *("deployment", "run", "train-cifar/nightly", "--watch", "--param", "recipe=tutorial"),
        *("--param", "overrides=" + json.dumps({"max_train_images": 640, "epochs": 2})),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record = records.list_records(workspace.store)[0]
    assert record.run_id in {f"nightly-{day:%Y-%m-%d}" for day in (before, datetime.now(UTC))}
    assert record.status == "finished"

    flow_run_id = next(line.split()[-1] for line in ran.stdout.splitlines() if "UUID:" in line)
    logs = prefect("flow-run", "logs", flow_run_id).stdout
    assert "epoch 2/2: loss" in logs, "the training does not show in Prefect's log"


def start_long_run(prefect: Prefect, workspace: Workspace, run_id: str) -> tuple[str, int]:
    """Start a run on the worker and wait for its first checkpoint; its flow run's id and its trainer's pid."""
    overrides = {"epochs": 3, "max_train_images": 6400, "checkpoint_every_steps": 20}
    ran = prefect(
        *("deployment", "run", "train-cifar/nightly", "--param", "recipe=tutorial", "--param", f"run_id={run_id}"),
        *("--param", "overrides=" + json.dumps(overrides)),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    eventually(lambda: any(item for item in workspace.store.list(f"checkpoints/{run_id}/")), timeout=90)
    eventually(lambda: bool(record_of(workspace, run_id).checkpoints))
    owner = record_of(workspace, run_id).lease.owner
    return next(line.split()[-1] for line in ran.stdout.splitlines() if "UUID:" in line), int(owner.split("/")[1])


def record_of(workspace: Workspace, run_id: str) -> RunRecord:
    return records.read_record(workspace.store, run_id)[0]


def recover(prefect: Prefect) -> None:
    ran = prefect("deployment", "run", "recover/every-5-minutes", "--watch")
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_run_whose_trainer_was_killed_is_started_again_by_the_recovery_flow(
    prefect: Prefect, workspace: Workspace
) -> None:
    _, pid = start_long_run(prefect, workspace, "lost")
    os.kill(pid, signal.SIGKILL)
    recover(prefect)
    eventually(lambda: record_of(workspace, "lost").status == "finished", timeout=120)
    record = record_of(workspace, "lost")
    assert [event.what for event in record.events] == ["started", "recovered", "resumed", "finished"]
    assert record.origin.deployment == "train-cifar/nightly"
    assert record.resumed_from_step


def test_a_run_that_the_user_has_cancelled_is_not_started_again(
    prefect: Prefect, workspace: Workspace, nightshift: Callable[..., Finished], prefect_api: str
) -> None:
    flow_run_id, _ = start_long_run(prefect, workspace, "unwanted")
    assert prefect("flow-run", "cancel", flow_run_id).returncode == 0
    eventually(lambda: record_of(workspace, "unwanted").status == "interrupted", timeout=60)
    assert nightshift("recover", "--json", PREFECT_API_URL=prefect_api).json == {"started": [], "live": []}
    record = record_of(workspace, "unwanted")
    assert [event.what for event in record.events] == ["started", "interrupted", "cancelled"]
    assert record.status == "cancelled"
