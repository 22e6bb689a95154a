"""The nightly deployment, as the README has it: pool, deploy, worker, run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nightshift import runs
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace

ROOT = Path(__file__).parents[1]
Prefect = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(home: Path, prefix: str, prefect_api: str, cifar10: DatasetRef) -> dict[str, str]:
    ours = {"NIGHTSHIFT_HOME": str(home), "NIGHTSHIFT_S3__PREFIX": prefix, "PREFECT_API_URL": prefect_api}
    return {**os.environ, **ours}


@pytest.fixture
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


@pytest.fixture
def worker(prefect: Prefect, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    assert prefect("work-pool", "create", "gpu-process", "--type", "process").returncode == 0
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "gpu-process"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


def test_the_nightly_deployment_trains_under_a_name_of_its_day(
    prefect: Prefect, worker: subprocess.Popen[bytes], workspace: Workspace
) -> None:
    deployed = prefect("deploy", "--all", "--prefect-file", "deployments/prefect.yaml")
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    before = datetime.now(UTC)
    ran = prefect(
        *("deployment", "run", "train-cifar/nightly", "--watch", "--param", "recipe=tutorial"),
        *("--param", "overrides=" + json.dumps({"max_train_images": 640, "epochs": 2})),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    record = runs.list_records(workspace.store)[0]
    assert record.run_id in {f"nightly-{day:%Y-%m-%d}" for day in (before, datetime.now(UTC))}
    assert record.status == "finished"

    flow_run_id = next(line.split()[-1] for line in ran.stdout.splitlines() if "UUID:" in line)
    logs = prefect("flow-run", "logs", flow_run_id).stdout
    assert "epoch 2/2: loss" in logs, "the training does not show in Prefect's log"
