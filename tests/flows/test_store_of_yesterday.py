"""A store that 312a4ed has written is listed, shown, resumed, predicted with and rolled back to.

`tests/fixtures/store-of-312a4ed.tar.xz` has its objects by key, all made by that commit: the finished runs `first` and
`second`, both promoted, the interrupted run `stopped`, and the sweep `tuned` with two trials asked. What no test needs
(data set, pages, some weights) was left out. `stopped` has the config of `second`, so both end with the same bits.
"""

import os
import platform
import secrets
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import Field

from nightshift.config.recipes import make_config
from nightshift.config.sections import Decisive, LossConfig
from nightshift.config.train import TrainConfig
from nightshift.errors import ResumeMismatchError
from nightshift.local.s3 import embedded_s3
from nightshift.records.lease import check_matches
from nightshift.records.run import newest_records, read_record
from nightshift.refs import DatasetRef
from nightshift.storage.s3 import S3
from nightshift.sweeps.stored import begin, plan
from nightshift.sweeps.study import ask
from tests.commands import Command, Finished, run_installed

FIXTURE = Path(__file__).parents[1] / "fixtures" / "store-of-312a4ed.tar.xz"
WHOLE = "3a82efab8d4a5197ecf1c35d041a1a054aa7ebb0f1b30de79eb8130232f38e9c"
"""What 312a4ed ended `second` with, on kernels that every x86-64 processor has."""
ANY_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "OMP_NUM_THREADS": "1",
}


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the bits were made on x86-64")


@pytest.fixture(scope="module")
def prefix() -> str:
    return f"yesterday-{secrets.token_hex(6)}"


@pytest.fixture(scope="module")
def store(home: Path, server: S3, prefix: str) -> Any:
    with embedded_s3(home, prefix) as store, tarfile.open(FIXTURE) as archive:
        for member in archive:
            body = archive.extractfile(member)
            assert body
            store.put(member.name, body.read())
        yield store


@pytest.fixture(scope="module")
def environment(home: Path, store: S3, prefix: str, prefect_api: str, cifar10: DatasetRef) -> dict[str, str]:
    return {"NIGHTSHIFT_HOME": str(home), "NIGHTSHIFT_S3__PREFIX": prefix}


@pytest.fixture(scope="module")
def run(environment: dict[str, str], home: Path) -> Callable[..., Finished]:
    return lambda *arguments: Command(arguments, environment, home).finish()


def test_its_records_have_a_config_of_today_and_typed_metrics(store: S3) -> None:
    records = {record.run_id: record for record in newest_records(store)}
    assert {run_id: record.status for run_id, record in records.items()} == {
        "first": "finished",
        "second": "finished",
        "stopped": "interrupted",
    }
    assert records["stopped"].train_config() == records["second"].train_config()
    assert records["second"].train_config() == make_config(
        "quick",
        {
            "max_train_images": 1280,
            "batch_size": 64,
            "checkpoint_every_seconds": None,
            "precision": "float32",
            "epochs": 3,
            "keep_last": 1,
        },
    )
    assert [point.epoch for point in records["second"].curve] == [1, 2, 3]
    assert records["stopped"].checkpoints[-1].metrics.train_seconds > 0


def test_its_runs_are_listed_and_shown(run: Callable[..., Finished]) -> None:
    listed = run("runs", "--json").json["runs"]
    assert {line["run_id"] for line in listed} == {"first", "second", "stopped"}
    shown = run("show", "stopped", "--json").json
    assert (shown["step"], shown["epochs"], shown["config"]["optimizer"]["lr"]) == (27, 3, 0.05)


def test_its_sweep_goes_on_with_the_trials_it_had_asked(store: S3) -> None:
    space = {"lr": {"low": 0.02, "high": 0.1, "log": True}, "momentum": [0.5, 0.6]}
    overrides = {
        "max_train_images": 1280,
        "batch_size": 64,
        "checkpoint_every_seconds": None,
        "precision": "float32",
        "epochs": 1,
    }
    stored = begin(store, plan("tuned", "quick", space, overrides, trials=3))
    assert [trial.run_id for trial in stored.asked] == ["tuned-01", "tuned-02"]
    assert len(ask(store, stored, {}).asked) == 3


def test_a_config_with_a_decisive_field_more_still_resumes_and_another_value_of_it_does_not(
    store: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    class LossOfTomorrow(LossConfig):
        sharpness: Decisive[float] = Field(0.0, description="A field that nobody has today.")

    class ConfigOfTomorrow(TrainConfig):
        loss: LossOfTomorrow = LossOfTomorrow()

    monkeypatch.setattr("nightshift.records.run.TrainConfig", ConfigOfTomorrow)
    record, _ = read_record(store, "stopped")
    config = ConfigOfTomorrow.parse(record.config)
    assert config.decisive()["loss.sharpness"] == 0.0
    check_matches(record, config, record.dataset)
    with pytest.raises(ResumeMismatchError, match=r"loss.sharpness: stored 0.0, now 2.0"):
        check_matches(record, config.override({"sharpness": 2.0}), record.dataset)


def test_its_champion_predicts_after_a_rollback_to_the_first(
    run: Callable[..., Finished], store: S3, tmp_path: Path
) -> None:
    before = run("champion", "--json").json
    assert (before["version"], [entry["version"] for entry in before["history"]]) == ("second", ["first", "second"])
    back = run("rollback", "--json").json
    assert (back["version"], back["history"][-1]["what"]) == ("first", "rolled back")
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    predicted = run("predict", str(tmp_path), "--json").json
    assert (predicted["model"], predicted["predicted"]) == ("first", 1)


GO_ON = """
from nightshift.checkpoints.payload import read_weights, weights_sha256
from nightshift.records.run import read_record
from nightshift.settings import Settings
from nightshift.training.run import train_alone
from nightshift.workspace import open_workspace

with open_workspace(Settings.load()) as workspace:
    record, _ = read_record(workspace.store, "stopped")
    last = train_alone(workspace, "stopped", record.train_config(), record.dataset)
    print(weights_sha256(read_weights(workspace.store, last)))
"""


@needs_x86
def test_the_training_of_its_interrupted_run_ends_with_the_bits_it_would_have_ended_with_then(
    environment: dict[str, str], home: Path, store: S3
) -> None:
    """Here it is trained only, because evaluation takes a minute on such kernels."""
    settings = {**os.environ, **environment, **ANY_PROCESSOR}
    done = subprocess.run(
        [sys.executable, "-c", GO_ON], env=settings, cwd=home, check=True, stdout=subprocess.PIPE, text=True
    )
    record, _ = read_record(store, "stopped")
    assert (record.resumed_from_step, record.step) == (27, 60)
    assert done.stdout.splitlines()[-1] == WHOLE


@needs_x86
@pytest.mark.soak
def test_its_interrupted_run_ends_with_the_bits_it_would_have_ended_with_then(
    environment: dict[str, str], home: Path
) -> None:
    resumed = run_installed(("resume", "stopped", "--json"), {**environment, **ANY_PROCESSOR}, home)
    assert resumed.exit_code == 0, resumed.err
    assert (resumed.json["resumed_from_step"], resumed.json["step"]) == (27, 60)
    assert resumed.json["weights_sha256"] == WHOLE


def test_its_finished_run_trains_nothing_when_it_is_started_again(run: Callable[..., Finished]) -> None:
    again = run("resume", "second", "--json")
    assert "nothing to train" in again.err
    assert again.json["weights_sha256"] == WHOLE
