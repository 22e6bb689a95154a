"""What `nightshift up` starts, a way to ask its server, and runs on its worker."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from nightshift.local import prefect as local
from nightshift.local.prefect import PrefectServer
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import RunRecord, read_record
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests import asking
from tests.commands import Command, Finished
from tests.conftest import eventually, know_snapshot

CONFIG = {"epochs": 3, "max_train_images": 6400, "checkpoint_every_steps": 20}
SETTINGS = [f"--set={name}={value}" for name, value in CONFIG.items()]
Prefect = Callable[..., subprocess.CompletedProcess[str]]
Nightshift = Callable[..., Finished]


@pytest.fixture(scope="module")
def prefix() -> str:
    return f"deployed-{secrets.token_hex(6)}"


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The URL of a webhook, and what it was told."""
    messages: list[dict[str, str]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Webhook) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", messages
        server.shutdown()


@pytest.fixture(scope="module")
def laptop(
    home: Path, prefix: str, shared: Path, cifar10: DatasetRef, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """NIGHTSHIFT_HOME of the user who types `up`, with servers of its own, the cached data set and its snapshot."""
    laptop = tmp_path_factory.mktemp("laptop")
    shutil.copytree(home / "datasets", laptop / "datasets")
    with embedded_s3(laptop, prefix) as store:
        know_snapshot(store, shared)
        yield laptop


@pytest.fixture(scope="module")
def its_server(laptop: Path) -> Iterator[PrefectServer]:
    """Its Prefect server, and the login that asks for."""
    with local.local_prefect(laptop) as (server, wait):
        wait()
        yield server


@pytest.fixture(scope="module")
def block(its_server: PrefectServer, told: tuple[str, list[dict[str, str]]]) -> str:
    """A notification block on the server, which sends to that webhook."""
    make = f"""
from prefect.blocks.notifications import CustomWebhookNotificationBlock
message = {{"subject": "{{{{subject}}}}", "body": "{{{{body}}}}"}}
CustomWebhookNotificationBlock(name="webhook", url="{told[0]}", json_data=message).save("nightshift", overwrite=True)
"""
    subprocess.run([sys.executable, "-c", make], env={**os.environ, **its_server.environment}, check=True)
    return "custom-webhook/nightshift"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user types commands."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def nightshift(laptop: Path, prefix: str, block: str, directory: Path) -> Nightshift:
    """Run `nightshift`, without a Prefect server configured: it has to find that of `up`."""
    environment = {"NIGHTSHIFT_HOME": str(laptop), "NIGHTSHIFT_S3__PREFIX": prefix, "NIGHTSHIFT_NOTIFY": block}

    def run(*arguments: str) -> Finished:
        return Command(arguments, environment, directory).finish()

    return run


@pytest.fixture(scope="module")
def stack(nightshift: Nightshift, its_server: PrefectServer) -> Iterator[dict[str, Any]]:
    """What `nightshift up` says it has started."""
    started = nightshift("up", "--json")
    assert started.exit_code == 0, started.err
    yield started.json
    ended = nightshift("down", "--json").json
    assert ended == {"stopped": ["worker", "waiting-worker"], "in_use": ["prefect", "s3"]}, "the tests use these"


@pytest.fixture(scope="module")
def prefect(stack: dict[str, Any], nightshift: Nightshift) -> Prefect:
    """Run `prefect …` as a user does in a shell of their own, after what `up` says to type first."""
    printed = nightshift("up").out.splitlines()
    first = next(line for line in printed if line.startswith("  export "))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "-c", f'{first}\nexec "$@"', "sh", sys.executable, "-m", "prefect", *arguments],
            # Nobody is there to answer a prompt.
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture(scope="module")
def ask(stack: dict[str, Any], its_server: PrefectServer) -> Callable[..., Any]:
    """Ask the server's API: what is at a path, or what it says to a body."""

    def request(path: str, **body: Any) -> Any:
        return asking.ask(its_server, path, body or None)

    return request


@dataclass
class Training:
    """A run in the middle of its training."""

    workspace: Workspace
    run_id: str
    flow_run_id: str
    ask: Callable[..., Any]

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = self.ask(f"flow_runs/{self.flow_run_id}")["state"]
        return found

    @property
    def pid(self) -> int:
        return int(self.record.lease.owner.split("/")[1])

    @property
    def record(self) -> RunRecord:
        return read_record(self.workspace.store, self.run_id)[0]

    @property
    def events(self) -> list[str]:
        return [event.what for event in self.record.events]

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def has_ended(self) -> bool:
        return self.record.status in ("finished", "failed", "cancelled")


@pytest.fixture(scope="module")
def train(ask: Callable[..., Any], laptop: Path, prefix: str) -> Iterator[Callable[..., Training]]:
    """Start a run on the worker and wait until it has committed its first checkpoint."""
    with embedded_s3(laptop, prefix) as store:
        workspace = Workspace(store, laptop, lease_seconds=60, save_retry_seconds=5)

        def start(run_id: str, overrides: Mapping[str, Any] = CONFIG, **environment: str) -> Training:
            parameters = {"recipe": "tutorial", "run_id": run_id, "overrides": overrides}
            deployment = ask("deployments/name/train-cifar/adhoc")["id"]
            started = ask(
                f"deployments/{deployment}/create_flow_run",
                parameters=parameters,
                job_variables={"env": environment},
                state={"type": "SCHEDULED"},
            )
            training = Training(workspace, run_id, started["id"], ask)
            eventually(lambda: any(store.list(f"checkpoints/{run_id}/")))
            eventually(lambda: bool(training.record.checkpoints))
            return training

        yield start


def worker_of(laptop: Path) -> tuple[int, int]:
    """The pids of the process that stands before the worker, and of the worker."""
    wrapper = int((laptop / "worker" / "server.pid").read_text().split()[2])
    children = Path(f"/proc/{wrapper}/task/{wrapper}/children")
    eventually(lambda: bool(children.read_text()))
    return wrapper, int(children.read_text())
