"""What a server at work runs on: the same deployments and the same flow with a Prefect server on PostgreSQL."""

import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns where XDG_RUNTIME_DIR is not set
    import pgserver

from nightshift.local_prefect import online_workers
from nightshift.refs import DatasetRef
from tests.conftest import Finished, eventually


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pgserver.PostgresServer]:
    database = pgserver.get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete")
    yield database
    database.cleanup()


@pytest.fixture
def api_url(postgres: pgserver.PostgresServer, tmp_path: Path) -> Iterator[str]:
    """A Prefect server on that database."""
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
            return online_workers(api_url) == []
        except OSError:
            return False

    eventually(answers, timeout=120)
    yield api_url
    server.terminate()
    server.wait()


def test_deployments_and_flow_run_on_a_server_with_postgresql(
    api_url: str,
    postgres: pgserver.PostgresServer,
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
