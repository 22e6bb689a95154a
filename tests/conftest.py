"""One real S3 server, one real Prefect server and the real CIFAR-10 a process of the tests; a fresh prefix a test."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

# The batches of the tests are tiny: threads that wait for each other on shared cores would take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data.datasets import fetch, pack
from nightshift.judging import evaluation
from nightshift.local.prefect import local_prefect
from nightshift.local.s3 import embedded_s3
from nightshift.publishing.publish import publish_model as publish
from nightshift.refs import DatasetRef, ModelRef
from nightshift.storage.s3 import S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What waits the most comes first, so that the other process works meanwhile."""
    items.sort(key=lambda item: item.path.name != "test_server.py")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NIGHTSHIFT_HOME of the whole session: servers and the cached data set."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[S3]:
    """The session's S3 server, without a prefix."""
    with embedded_s3(home) as store:
        yield store


@pytest.fixture
def prefix() -> str:
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def workspace(home: Path, server: S3, prefix: str) -> Iterator[Workspace]:
    """A workspace of its own in the session's store."""
    with embedded_s3(home, prefix) as store:
        yield Workspace(store, home, lease_seconds=60, save_retry_seconds=5)


@pytest.fixture(scope="session")
def cifar10(home: Path, server: S3, tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    """CIFAR-10 in the session's local cache, from wherever it is to be had; one process has it from the other."""
    base = tmp_path_factory.getbasetemp()
    fetched = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "datasets"
    with FileLock(f"{fetched}.lock"), embedded_s3(home, "shared-data") as store:
        if fetched.exists():
            shutil.copytree(fetched, home / "datasets")
        shared = Workspace(store, home, lease_seconds=60, save_retry_seconds=5)
        dataset = pack(shared, fetch(shared, "cifar10"))
        if not fetched.exists():
            shutil.copytree(home / "datasets", fetched)
        return dataset


@pytest.fixture(scope="session")
def prefect_api(home: Path) -> Iterator[str]:
    """The session's Prefect server."""
    with local_prefect(home) as (api_url, wait):
        wait()
        yield api_url


def small_config(recipe: str = "tutorial", **overrides: Any) -> TrainConfig:
    """A recipe cut down to a few seconds: 20 steps an epoch, two epochs."""
    base = {"max_train_images": 640, "batch_size": 32, "epochs": 2, "checkpoint_every_seconds": None}
    return make_config(recipe, {**base, **overrides})


def eventually(condition: Callable[[], bool], timeout: float = 30) -> None:
    """Wait until something is so that tells nobody when it comes about."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not so after {timeout} s"
        time.sleep(0.05)


@dataclass
class Finished:
    """How a command ended."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Command:
    """`nightshift …` as a process of its own, as a user starts it."""

    def __init__(self, arguments: tuple[str, ...], environment: Mapping[str, str], cwd: Path) -> None:
        program = str(Path(sys.executable).with_name("nightshift"))
        self.process = subprocess.Popen(
            [program, *arguments],
            env={**os.environ, **environment},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for_line(self, text: str) -> None:
        """Read standard error until a line with `text` is there."""
        assert self.process.stderr
        for line in self.process.stderr:
            if text in line:
                return
        pytest.fail(f"ended without printing {text!r}")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def finish(self, timeout: float = 240) -> Finished:
        out, err = self.process.communicate(timeout=timeout)
        return Finished(self.process.returncode, out, err)


@pytest.fixture
def start(home: Path, server: S3, prefix: str, tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Start `nightshift` on the session's servers with this test's prefix; extra environment as keywords."""
    started: list[Command] = []

    def start_command(*arguments: str, **environment: str) -> Command:
        defaults = {"NIGHTSHIFT_HOME": str(home), "NIGHTSHIFT_S3__PREFIX": prefix}
        started.append(Command(arguments, {**defaults, **environment}, tmp_path))
        return started[-1]

    yield start_command
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.finish()


@pytest.fixture
def nightshift(start: Callable[..., Command]) -> Callable[..., Finished]:
    """Run `nightshift` to its end."""

    def run_command(*arguments: str, **environment: str) -> Finished:
        return start(*arguments, **environment).finish()

    return run_command


@pytest.fixture(scope="session")
def candidates(home: Path, server: S3, cifar10: DatasetRef) -> Iterator[tuple[Workspace, dict[int, ModelRef]]]:
    """Published models of one, two and three epochs, each better than the one before, and where they lie."""
    with embedded_s3(home, f"candidates-{secrets.token_hex(6)}") as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=5)
        yield workspace, {epochs: publish_model(workspace, cifar10, epochs) for epochs in (1, 2, 3)}


def publish_model(workspace: Workspace, cifar10: DatasetRef, epochs: int) -> ModelRef:
    """Train, evaluate and publish, without the flow."""
    config = small_config("quick", epochs=epochs, batch_size=32, lr=0.1, max_train_images=1280)
    checkpoint = train_alone(workspace, f"epochs-{epochs}", config, cifar10)
    return publish(workspace, checkpoint, cifar10, evaluation.evaluate(workspace, checkpoint, cifar10))
