"""What a server at work runs on: the same deployments and the same flow with a Prefect server on PostgreSQL."""

import json
import os
import socket
import subprocess
import sys
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is not set
    from pgserver.postgres_server import PostgresServer, get_server

from nightshift.errors import PrefectServerError
from nightshift.local.prefect import PrefectServer, online_workers
from nightshift.records.lease import acquire
from nightshift.records.run import Origin
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.conftest import eventually
from tests.records.test_lease import spec

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    database = get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    yield database
    database.cleanup()


@pytest.fixture(scope="module")
def api_url(postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server on that database."""
    tmp_path = tmp_path_factory.mktemp("prefect")
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ours = {
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.get_uri().replace("postgresql", "postgresql+asyncpg", 1),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, env={**os.environ, **ours}, stdout=log, stderr=log)
    api_url = f"http://127.0.0.1:{port}/api"

    def answers() -> bool:
        assert server.poll() is None, (tmp_path / "log").read_text()
        try:
            return online_workers(PrefectServer(api_url)) == []
        except PrefectServerError:
            return False

    eventually(answers)
    yield api_url
    server.terminate()
    server.wait()


def test_deployments_and_flow_run_on_a_server_with_postgresql(
    api_url: str,
    postgres: PostgresServer,
    nightshift: Callable[..., Finished],
    cifar10: DatasetRef,
) -> None:
    deployed = nightshift("deploy", "--json", PREFECT_API_URL=api_url)
    assert deployed.exit_code == 0, deployed.err
    settings = [f"--set={setting}" for setting in ("max_train_images=640", "epochs=1")]
    trained = nightshift("train", "--recipe=tutorial", *settings, "--json", PREFECT_API_URL=api_url)
    assert trained.exit_code == 0, trained.err
    assert trained.json["status"] == "finished"
    states = postgres.psql("select name || ': ' || state_type from flow_run where state_type = 'COMPLETED'")
    assert trained.json["run_id"] in states


def test_recover_starts_what_prefect_has_lost_once_and_leaves_to_prefect_what_it_knows(
    api_url: str, nightshift: Callable[..., Finished], workspace: Workspace
) -> None:
    def ask(path: str, body: dict[str, Any] | None = None) -> Any:
        headers, data = {"Content-Type": "application/json"}, json.dumps(body).encode() if body else None
        with urllib.request.urlopen(urllib.request.Request(f"{api_url}/{path}", data, headers), timeout=30) as answer:
            return json.load(answer)

    def recover() -> list[str]:
        started: list[str] = nightshift("recover", "--json", PREFECT_API_URL=api_url).json["started"]
        return started

    adhoc = ask("deployments/name/train-cifar/adhoc")["id"]
    known = ask(f"deployments/{adhoc}/create_flow_run", {"state": {"type": "CRASHED"}})["id"]
    for run_id, flow_run_id in (("lost", str(uuid4())), ("known", known)):
        origin = Origin(flow_run_id=flow_run_id, deployment="train-cifar/adhoc", promote=False)
        acquire(workspace.store, replace(spec(run_id), origin=origin), lease_seconds=60).end("interrupted")
    assert recover() == ["lost"]
    tagged = ask("flow_runs/filter", {"flow_runs": {"tags": {"all_": ["recovery", "lost"]}}})
    assert [(run["deployment_id"], run["parameters"]["run_id"]) for run in tagged] == [(adhoc, "lost")]
    assert tagged[0]["parameters"]["promote"] is False, "a trial is started again as a trial"
    assert recover() == []
