"""What an MLflow server is told, and that nobody ever waits for it."""

import hashlib
import operator
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nightshift.checkpoints.payload import read_weights, weights_sha256
from nightshift.cli import doctor
from nightshift.errors import TrackingError, TrainingInterrupted
from nightshift.records import champions
from nightshift.records.lease import RunSpec
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import read_record
from nightshift.refs import CheckpointRef, ModelRef
from nightshift.settings import MlflowSettings
from nightshift.storage.store import Store
from nightshift.tracking import beside, mlflow
from nightshift.tracking.metrics import TrainingLine, read_lines
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.conftest import eventually
from tests.judging.test_gate import finish, promote, published, result_of
from tests.made_up import NAME, config_of, in_memory, known
from tests.own_images import DATASET, write_images
from tests.records.test_lease import spec
from tests.tracking.servers import MlflowServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One for all tests here, each of which writes under a prefix of its own."""
    running = MlflowServer(tmp_path_factory.mktemp("mlflow"))
    yield running
    running.kill()


@pytest.fixture
def settings(server: MlflowServer, request: pytest.FixtureRequest) -> MlflowSettings:
    unique = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]
    return MlflowSettings(tracking_uri=server.uri, prefix=f"{unique}-")


class Told:
    """What the server knows under a prefix."""

    def __init__(self, settings: MlflowSettings) -> None:
        from mlflow import MlflowClient

        self.client, self._prefix = MlflowClient(settings.tracking_uri), settings.prefix

    def runs(self, name: str) -> dict[str, Any]:
        experiment = self.client.get_experiment_by_name(self._prefix + name)
        found = self.client.search_runs([experiment.experiment_id]) if experiment else []
        by_name = {run.info.run_name: run for run in found}
        assert len(by_name) == len(found), "a run is there twice"
        return by_name

    def curve(self, run: Any, metric: str) -> list[tuple[int, float]]:
        found = self.client.get_metric_history(run.info.run_id, metric)
        return sorted((entry.step, entry.value) for entry in found)

    def versions(self, name: str) -> dict[str, Any]:
        found = self.client.search_model_versions(f"name = '{self._prefix}{name}'")
        by_run = {version.tags["nightshift.run_id"]: version for version in found}
        assert len(by_run) == len(found), "a version is there twice"
        return by_run

    def champion(self, name: str) -> Any:
        found = self.client.get_model_version_by_alias(self._prefix + name, "champion")
        return found.tags["nightshift.run_id"]


def curve_of(store: Store, run_id: str) -> list[tuple[int, float]]:
    return [(line.step, line.loss) for line in read_lines(store, run_id) if isinstance(line, TrainingLine)]


def night(store: Store, accuracy: float, name: str) -> None:
    """A finished run, whose model went live."""
    model = published(store, accuracy, name)
    finish(store, model, promote(store, model))


def end_trained(store: Store, run_id: str, accuracy: float) -> ModelRef:
    """Publish what a run has trained, which goes live, and finish the run."""
    record, _ = read_record(store, run_id)
    model = published(store, accuracy, run_id, name=record.dataset.name)
    verdict = promote(store, model)
    trained = RunSpec(run_id, record.train_config(), record.dataset, record.environment, record.total_steps)
    with hold_run(store, trained, 60) as run:
        run.end("finished", result=result_of(model, verdict))
    return model


def test_a_run_is_told_with_config_curve_evaluation_and_version_and_twice_is_once(
    settings: MlflowSettings, tmp_path: Path
) -> None:
    workspace = in_memory(tmp_path)
    store = workspace.store
    train_alone(workspace, "first", config_of(lr=0.03), known(workspace, 16, 3))
    mlflow.send(store, settings, "first")
    told = Told(settings).runs(NAME)["first"]
    assert told.info.status == "RUNNING"
    assert told.data.params["optimizer.lr"] == "0.03"
    assert Told(settings).curve(told, "loss") == curve_of(store, "first")
    assert Told(settings).versions(NAME) == {}

    model = end_trained(store, "first", 0.7)
    for _ in range(2):
        assert mlflow.send_all(store, settings) == []
        told = Told(settings).runs(NAME)["first"]
        assert told.info.status == "FINISHED"
        assert Told(settings).curve(told, "loss") == curve_of(store, "first")
        assert Told(settings).curve(told, "test_accuracy") == [(18, 0.7)]
        version = Told(settings).versions(NAME)["first"]
        assert (version.source, version.run_id) == (store.url(model.key), told.info.run_id)
        assert Told(settings).champion(NAME) == "first"
        record, _ = read_record(store, "first")
        for tags in (told.data.tags, version.tags):
            assert tags["nightshift.run_id"] == "first"
            assert tags["nightshift.snapshot"] == record.dataset.digest
            assert tags["nightshift.sha256"] == model.weights_sha256


def test_of_a_run_that_was_interrupted_each_step_is_told_once(settings: MlflowSettings, tmp_path: Path) -> None:
    workspace = in_memory(tmp_path)
    dataset = known(workspace, 16, 3)
    for stop in (7, 13):
        with pytest.raises(TrainingInterrupted):
            train_alone(workspace, "parts", config_of(), dataset, should_stop=partial(operator.eq, stop))
        mlflow.send(workspace.store, settings, "parts")
        assert Told(settings).runs(NAME)["parts"].info.status == "SCHEDULED"
    train_alone(workspace, "parts", config_of(), dataset)
    mlflow.send(workspace.store, settings, "parts")
    told = Told(settings).runs(NAME)["parts"]
    assert Told(settings).curve(told, "loss") == curve_of(workspace.store, "parts")


def test_a_server_that_is_killed_in_mid_run_changes_no_bit_and_knows_all_after_it_came_back(
    settings: MlflowSettings, server: MlflowServer, workspace: Workspace
) -> None:
    dataset, config = known(workspace, 16, 3), config_of(checkpoint_every_steps=2)
    store = workspace.store

    def weights(checkpoint: CheckpointRef) -> str:
        return weights_sha256(read_weights(store, checkpoint))

    def kill_in_the_middle(step: int) -> bool:
        if step == 9:
            eventually(lambda: bool(Told(settings).runs(NAME).get("told")))
            server.kill()
        return False

    alone = train_alone(workspace, "alone", config, dataset)
    end_trained(store, "alone", 0.6)  # nobody has told the server of it
    try:
        with beside.sending(store, settings, "told", every=0.2):
            told = train_alone(workspace, "told", config, dataset, should_stop=kill_in_the_middle)
        assert weights(told) == weights(alone)
        end_trained(store, "told", 0.7)
        beside.send_all(store, settings, "told")  # a warning, as it is still down
    finally:
        server.start()
    assert Told(settings).runs(NAME)["told"].info.status == "RUNNING"
    beside.send_all(store, settings)
    runs = Told(settings).runs(NAME)
    assert (runs["told"].info.status, Told(settings).champion(NAME)) == ("FINISHED", "told")
    for run_id in ("alone", "told"):
        assert Told(settings).curve(runs[run_id], "loss") == curve_of(store, run_id)


@pytest.mark.soak
def test_the_alias_follows_a_rollback_and_a_promotion_by_hand(
    settings: MlflowSettings, workspace: Workspace, nightshift: Callable[..., Finished]
) -> None:
    night(workspace.store, 0.5, "monday")
    night(workspace.store, 0.6, "tuesday")
    mlflow.send_all(workspace.store, settings)
    assert Told(settings).champion("cifar10") == "tuesday"
    environment = {
        "NIGHTSHIFT_MLFLOW__TRACKING_URI": str(settings.tracking_uri),
        "NIGHTSHIFT_MLFLOW__PREFIX": settings.prefix,
    }
    assert nightshift("rollback", "--json", **environment).json["version"] == "monday"
    assert Told(settings).champion("cifar10") == "monday"
    published(workspace.store, 0.4, "by-hand")
    finish(workspace.store, published(workspace.store, 0.4, "by-hand"), None)
    assert nightshift("promote", "by-hand", "--json", **environment).exit_code == 0
    assert Told(settings).champion("cifar10") == "by-hand", "its run was not sent before"


def test_a_run_that_was_deleted_on_the_server_stays_so_and_one_that_trains_is_left_to_its_trainer(
    settings: MlflowSettings, tmp_path: Path
) -> None:
    store = in_memory(tmp_path).store
    night(store, 0.5, "monday")
    with hold_run(store, spec("tonight"), 60):
        mlflow.send_all(store, settings)
        assert set(Told(settings).runs("cifar10")) == {"monday"}
    run = Told(settings).runs("cifar10")["monday"]
    Told(settings).client.delete_run(run.info.run_id)
    finish(store, published(store, 0.4, "tuesday"), None)
    assert mlflow.send_all(store, settings, "monday") == []
    assert set(Told(settings).runs("cifar10")) == {"tonight", "tuesday"}


def test_a_model_of_the_same_name_that_somebody_else_has_registered_is_left_alone(
    settings: MlflowSettings, tmp_path: Path
) -> None:
    store, client = in_memory(tmp_path).store, Told(settings).client
    name = f"{settings.prefix}cifar10"
    client.create_registered_model(name)
    theirs = client.create_model_version(name, "s3://theirs/model", tags={"nightshift.run_id": "theirs"})
    client.set_registered_model_alias(name, "champion", theirs.version)
    night(store, 0.5, "monday")
    (problem,) = mlflow.send_all(store, settings)
    assert "NIGHTSHIFT_MLFLOW__PREFIX" in problem
    assert Told(settings).champion("cifar10") == "theirs"
    assert list(Told(settings).versions("cifar10")) == ["theirs"]


def test_a_server_that_is_not_there_costs_a_warning_and_no_exit_code(
    workspace: Workspace, nightshift: Callable[..., Finished]
) -> None:
    night(workspace.store, 0.5, "monday")
    night(workspace.store, 0.6, "tuesday")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = nightshift("rollback", "--json", NIGHTSHIFT_MLFLOW__TRACKING_URI=uri)
    assert done.json["version"] == "monday"
    assert f"MLflow at {uri} does not answer" in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_a_training_does_not_wait_for_a_server_that_never_answers(workspace: Workspace) -> None:
    night(workspace.store, 0.5, "monday")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        settings = MlflowSettings(tracking_uri=f"http://127.0.0.1:{silent.getsockname()[1]}")
        with beside.sending(workspace.store, settings, "monday", every=0.01):
            asked, _ = silent.accept()
            ended = time.monotonic()
        assert time.monotonic() - ended < 5
        asked.close()


def test_without_the_client_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TrackingError, match=r"install nightshift\[mlflow\]"):
        mlflow.check(in_memory(tmp_path).store, MlflowSettings(tracking_uri="http://127.0.0.1:1"))


def test_doctor_says_whether_the_server_answers(settings: MlflowSettings, workspace: Workspace) -> None:
    nowhere = MlflowSettings(tracking_uri="http://127.0.0.1:1")
    for given, ok in ((settings, True), (nowhere, False)):
        (check,) = doctor._mlflow(replace(workspace, mlflow=given))
        assert (check.ok, str(given.tracking_uri) in check.detail) == (ok, True)


def test_a_night_is_told_by_its_flow(
    settings: MlflowSettings,
    workspace: Workspace,
    nightshift: Callable[..., Finished],
    tmp_path: Path,
    prefect_api: str,
) -> None:
    write_images(tmp_path, range(90))
    (tmp_path / "nightshift.toml").write_text(DATASET)
    done = nightshift(
        *("train", "--recipe", "parts", "--run-id", "night", "--json"),
        PREFECT_API_URL=prefect_api,
        NIGHTSHIFT_MLFLOW__TRACKING_URI=str(settings.tracking_uri),
        NIGHTSHIFT_MLFLOW__PREFIX=settings.prefix,
    )
    assert done.exit_code == 0, done.err
    run = Told(settings).runs("parts")["night"]
    assert run.info.status == "FINISHED"
    assert run.data.metrics["test_accuracy"] == done.json["test_accuracy"]
    assert Told(settings).champion("parts") == "night"
    assert champions.read_champion(workspace.store, "parts").version == "night"
