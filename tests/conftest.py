"""One real S3 server, one real Prefect server and the real CIFAR-10 for all tests; a fresh prefix for each."""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock

# The batches of the tests are tiny: threads that wait for each other on shared cores would take ten times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Who waits for another run looks again every 2 s, not 30.
os.environ.setdefault("PREFECT_SERVER_DEPLOYMENTS_CONCURRENCY_SLOT_WAIT_SECONDS", "2")

from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data.known import fetch, pack
from nightshift.judging import evaluation
from nightshift.local.prefect import PrefectServer, local_prefect
from nightshift.local.s3 import embedded_s3
from nightshift.publishing.publish import publish_model as publish
from nightshift.refs import DatasetRef, ModelRef
from nightshift.storage.s3 import S3
from nightshift.storage.store import Store
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.commands import Command, Finished
from tests.forked import forked

# Whoever shares the cores may keep an example waiting for as long as it likes.
hypothesis.settings.register_profile("shared cores", deadline=None)
hypothesis.settings.load_profile("shared cores")

# Only what fails waits for so long: a machine that others load may be five times slower than an idle one.
PATIENCE_SECONDS = 600

LONGEST = (
    "server/test_server.py",
    "server/test_retrain.py",
    "flows/test_train_cifar.py",
    "flows/test_retrain.py",
    "flows/test_store_of_yesterday.py",
    "faults/test_kills.py",
    "faults/test_publishing_kills.py",
    "fuzz/test_stored.py",
    "parallel/test_launch.py",
    "publishing/test_republish.py",
    "cli/test_champion.py",
    "cli/test_tonight.py",
    "records/test_recovery.py",
    "local/test_full_disk.py",
    "faults/test_faults.py",
    "training/test_exact_resume.py",
)
SLOW = {"deployments", "deployments/server", "faults", "flows", "fuzz", "parallel", "publishing"}
SLOW_FIXTURES = {"prefect_server", "candidates", "start"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first, so that both processes end together; what `make test-fast` leaves out is marked.

    That is all that needs a Prefect server, published models, commands as a user starts them or many processes that
    train; and the manifests.
    """
    ranks = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(f"{item.path.parent.name}/{item.path.name}", len(ranks)))
    for item in items:
        room = item.path.parent.relative_to(Path(__file__).parent).as_posix()
        if room in SLOW or SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")


@pytest.fixture(scope="session", autouse=True)
def imports() -> None:
    """What many processes need is imported once, while the first tests run."""
    forked()


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of all processes of the tests."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def home(shared: Path) -> Path:
    """NIGHTSHIFT_HOME of all tests: servers and the cached data set. A server lives as long as one of them uses it."""
    home = shared / "home"
    home.mkdir(exist_ok=True)
    return home


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


@pytest.fixture(params=["server", "memory"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store: what a test promises of it, the S3 server and the one in memory both keep."""
    from tests.stores import memory_store

    if request.param == "memory":
        return memory_store()
    here: Workspace = request.getfixturevalue("workspace")
    return here.store


@pytest.fixture(scope="session")
def cifar10(home: Path, server: S3, shared: Path) -> DatasetRef:
    """CIFAR-10 in the local cache, from wherever it is to be had; the first process to ask for it fetches it."""
    snapshot = shared / "snapshot"
    with FileLock(f"{snapshot}.lock"), embedded_s3(home, "shared-data") as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=5)
        dataset = pack(workspace, fetch(workspace, "cifar10"))
        if not snapshot.exists():
            for item in store.list("datasets/cifar10/"):
                copy = snapshot / item.key
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(store.get(item.key)[0])
        return dataset


def know_snapshot(store: Store, shared: Path) -> None:
    """Let a store know the snapshot of CIFAR-10. The pixels in its shards it lacks: the cache of the session has them.

    To make it anew for each test would take seconds.
    """
    for copy in (shared / "snapshot").rglob("*.*"):
        store.put(copy.relative_to(shared / "snapshot").as_posix(), copy.read_bytes())


@pytest.fixture(scope="session")
def prefect_server(home: Path) -> Iterator[PrefectServer]:
    """The Prefect server of all tests, and the login it asks for."""
    with local_prefect(home) as (prefect, wait):
        wait()
        yield prefect


@pytest.fixture(scope="session")
def prefect_api(prefect_server: PrefectServer) -> str:
    """Its URL; commands that know the session's home know the login too."""
    return prefect_server.api_url


def small_config(recipe: str = "tutorial", **overrides: Any) -> TrainConfig:
    """A recipe cut down to a few seconds: 20 steps an epoch, two epochs."""
    base = {"max_train_images": 640, "batch_size": 32, "epochs": 2, "checkpoint_every_seconds": None}
    return make_config(recipe, {**base, **overrides})


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until something is so that tells nobody when it comes about; whoever is asked has other work too."""
    deadline, pause = time.monotonic() + PATIENCE_SECONDS, 0.02
    while not condition():
        assert time.monotonic() < deadline, f"not so after {PATIENCE_SECONDS} s"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.25)


@pytest.fixture
def start(
    home: Path, server: S3, prefix: str, tmp_path: Path, shared: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Command]]:
    """Start `nightshift` on the session's servers with this test's prefix; extra environment as keywords."""
    started: list[Command] = []
    if "cifar10" in request.fixturenames:
        request.getfixturevalue("cifar10")
        with embedded_s3(home, prefix) as store:
            know_snapshot(store, shared)

    def start_command(*arguments: str, **environment: str) -> Command:
        defaults = {"NIGHTSHIFT_HOME": str(home), "NIGHTSHIFT_S3__PREFIX": prefix}
        started.append(Command(arguments, {**defaults, **environment}, tmp_path))
        return started[-1]

    yield start_command
    for command in started:
        command.kill()


@pytest.fixture
def nightshift(start: Callable[..., Command]) -> Callable[..., Finished]:
    """Run `nightshift` to its end."""

    def run_command(*arguments: str, **environment: str) -> Finished:
        return start(*arguments, **environment).finish()

    return run_command


@pytest.fixture(scope="session")
def candidates(
    home: Path, server: S3, cifar10: DatasetRef, shared: Path
) -> Iterator[tuple[Workspace, dict[int, ModelRef]]]:
    """Published models of one, two and three epochs, each better than the one before, and where they lie.

    One process trains them, and each of the others has a copy.
    """
    trained = shared / "candidates"
    with embedded_s3(home, f"candidates-{os.getpid()}") as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=5)
        with FileLock(f"{trained}.lock"):
            if not trained.exists():
                models = {epochs: publish_model(workspace, cifar10, epochs) for epochs in (1, 2, 3)}
                for object_ in store.list(""):
                    copy = trained / object_.key
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(store.get(object_.key)[0])
                for epochs, model in models.items():
                    (trained / f"{epochs}.json").write_text(model.model_dump_json())
            else:
                for copy in trained.glob("*/**/*"):
                    if copy.is_file():
                        store.put(copy.relative_to(trained).as_posix(), copy.read_bytes())
                texts = {epochs: (trained / f"{epochs}.json").read_text() for epochs in (1, 2, 3)}
                models = {epochs: ModelRef.model_validate_json(text) for epochs, text in texts.items()}
        yield workspace, models


def publish_model(workspace: Workspace, cifar10: DatasetRef, epochs: int) -> ModelRef:
    """Train, evaluate and publish, without the flow."""
    config = small_config("quick", epochs=epochs, batch_size=32, lr=0.1, max_train_images=1280)
    checkpoint = train_alone(workspace, f"epochs-{epochs}", config, cifar10)
    return publish(workspace, checkpoint, cifar10, evaluation.evaluate(workspace, checkpoint, cifar10))
