"""The whole flow as a user runs it: a process of its own, a real Prefect server, a real store."""

import hashlib
import io
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from PIL import Image
from safetensors import safe_open

from flows.verdicts import verdict_message
from nightshift.checkpoints.payload import read_weights, weights_sha256
from nightshift.local.prefect import PrefectServer
from nightshift.records.keys import DATASETS, MODELS, PAYLOADS, REPORTS, place_of
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.asking import ask
from tests.commands import Command, Finished
from tests.conftest import eventually

TUTORIAL = ("--recipe", "tutorial", "--set", "max_train_images=3200", "--set", "epochs=3")
WORSE = (
    "train",
    "--recipe",
    "tutorial",
    "--set",
    "max_train_images=320",
    "--set",
    "epochs=1",
    "--run-id",
    "night-worse",
)

PLAIN_TORCH = """
import sys, torch, numpy as np, torch.nn as nn

class SimpleCNN(nn.Module):
    def __init__(self):
        super(SimpleCNN, self).__init__()
        self.conv1 = nn.Conv2d(3, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.fc1 = nn.Linear(6*6*64, 128)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, x):
        x = nn.functional.relu(self.conv1(x))
        x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.relu(self.conv2(x))
        x = nn.functional.max_pool2d(x, 2)
        x = torch.flatten(x, 1)
        x = nn.functional.relu(self.fc1(x))
        return self.fc2(x)

assert "nightshift" not in sys.modules
model = SimpleCNN()
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
model.eval()
data = np.load(sys.argv[2])
images = torch.from_numpy(data["images"]).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
with torch.no_grad():
    print((model(images).argmax(1).numpy() == data["labels"]).sum())
"""


@pytest.fixture(scope="module")
def prefix() -> str:
    """One for all tests in this file. Their runs have names that no other file gives to the Prefect server."""
    return f"flow-{secrets.token_hex(6)}"


@pytest.fixture(scope="module")
def run(home: Path, prefix: str, prefect_api: str, cifar10: DatasetRef) -> Callable[..., Finished]:
    """Run a command on the servers of all tests, with the data set in the local cache already."""
    environment = {"NIGHTSHIFT_HOME": str(home), "NIGHTSHIFT_S3__PREFIX": prefix}
    return lambda *arguments, **more: Command(arguments, {**environment, **more}, home).finish()


@pytest.fixture(scope="module")
def whole(run: Callable[..., Finished]) -> Finished:
    """A run that nothing interrupts."""
    return run("train", *TUTORIAL, "--run-id", "night-whole", "--json")


def newest_flow_run(prefect: PrefectServer, run_id: str) -> Any:
    wanted = {"flow_runs": {"name": {"like_": run_id}}, "sort": "START_TIME_DESC"}
    return ask(prefect, "flow_runs/filter", wanted)[0]


def flow_run_state(prefect: PrefectServer, run_id: str) -> tuple[str, dict[str, str]]:
    """The state of the newest flow run of this run id, and those of its tasks by name."""
    found = newest_flow_run(prefect, run_id)
    tasks = ask(prefect, "task_runs/filter", {"flow_runs": {"id": {"any_": [found["id"]]}}})
    return found["state"]["type"], {task["name"].rpartition("-")[0]: task["state"]["type"] for task in tasks}


def test_the_published_weights_have_the_same_accuracy_in_plain_torch(
    whole: Finished, workspace: Workspace, home: Path, cifar10: DatasetRef, tmp_path: Path
) -> None:
    assert (whole.exit_code, whole.json["status"]) == (0, "finished"), whole.err
    (tmp_path / "weights.pth").write_bytes(workspace.store.get(whole.json["model"] + "weights.pth")[0])
    with safe_open(home / "datasets" / f"{cifar10.digest}.safetensors", framework="np") as packed:
        images, labels = packed.get_tensor("test_images"), packed.get_tensor("test_labels")
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    plain = subprocess.run(
        [sys.executable, "-c", PLAIN_TORCH, "weights.pth", "test.npz"], cwd=tmp_path, capture_output=True, text=True
    )
    assert plain.returncode == 0, plain.stderr
    assert int(plain.stdout) / 10_000 == pytest.approx(whole.json["test_accuracy"], abs=1e-7)


def test_the_published_version_has_its_formats_and_a_card(whole: Finished, workspace: Workspace) -> None:
    card = json.loads(workspace.store.get(whole.json["model"] + "card.json")[0])
    tensors = workspace.store.get(whole.json["model"] + "weights.safetensors")[0]
    assert {"weights.pth", "weights.safetensors", "model.pt2"} <= set(card["files"])
    assert card["weights_sha256"] == whole.json["weights_sha256"] == weights_sha256(safetensors.torch.load(tensors))


def test_prefect_knows_the_flow_run_and_its_seven_tasks(whole: Finished, prefect_server: PrefectServer) -> None:
    tasks = ("download", "preprocess", "train", "evaluate", "publish", "promote", "report")
    completed = dict.fromkeys(tasks, "COMPLETED")
    assert flow_run_state(prefect_server, "night-whole")[0] == "COMPLETED"
    eventually(
        lambda: flow_run_state(prefect_server, "night-whole")[1] == completed
    )  # recorded from events, after a while


def test_the_commands_hold_the_contract(whole: Finished, run: Callable[..., Finished], workspace: Workspace) -> None:
    assert {
        *("run_id", "status", "step", "epochs", "test_accuracy", "train_seconds"),
        *("weights_sha256", "checkpoints", "resumed_from_step", "champion"),
    } <= set(whole.json)

    listed = {line["run_id"]: line for line in run("runs", "--json").json["runs"]}
    assert {"run_id", "status", "step", "test_accuracy", "updated_at", "owner"} <= set(listed["night-whole"])

    shown = run("show", "night-whole", "--json").json
    assert {"config", "status", "checkpoints", "weights_sha256"} <= set(shown)
    assert {"step", "epoch", "key", "bytes", "sha256"} <= set(shown["checkpoints"][0])
    newest = read_record(workspace.store, "night-whole")[0].checkpoints[-1]
    assert shown["weights_sha256"] == weights_sha256(read_weights(workspace.store, newest))

    recipes = run("recipes", "--json").json["recipes"]
    assert {"quick", "tutorial", "resnet18"} <= {recipe["name"] for recipe in recipes}
    assert {"name", "model", "epochs", "detail"} <= set(recipes[0])

    examined = run("doctor", "--json").json
    assert examined["ok"]
    names = {
        "storage",
        "conditional writes",
        "clock",
        "champion of cifar10",
        "interrupted runs",
        "room for nights",
        "Prefect",
        "device",
        "disk",
    }
    assert {check["name"] for check in examined["checks"]} == names


def test_what_was_trained_is_exported_champion_and_of_use(
    whole: Finished, run: Callable[..., Finished], home: Path, cifar10: DatasetRef, tmp_path: Path
) -> None:
    assert whole.json["champion"]["run_id"] == "night-whole"
    assert whole.json["verdict"]["promoted"]
    champion = run("champion", "--json").json
    assert champion.items() >= whole.json["champion"].items()
    assert set(champion) >= {"name", "version", "run_id", "test_accuracy", "previous"}

    exported = run("export", "night-whole", "--format", "safetensors", "--out", str(tmp_path / "model"), "--json").json
    body = (tmp_path / "model").read_bytes()
    assert exported.items() >= {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}.items()
    assert weights_sha256(safetensors.torch.load(body)) == whole.json["weights_sha256"]

    with safe_open(home / "datasets" / f"{cifar10.digest}.safetensors", framework="np") as packed:
        Image.fromarray(packed.get_tensor("test_images")[0]).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"damaged")
    predicted = run("predict", str(tmp_path), "--json")
    assert (predicted.exit_code, predicted.json["predicted"], predicted.json["model"]) == (0, 1, "night-whole")
    (bad,) = predicted.json["bad"]
    assert (bad["image"], bad["reason"][:12]) == (str(tmp_path / "bad.png"), "not an image")
    none = run("predict", str(tmp_path / "bad.png"))
    assert none.exit_code == 2
    assert none.out.splitlines()[0] == "image,label,probability,error"
    assert "bad.png: not an image" in none.err

    page = run("report", "night-whole", "--out", str(tmp_path / "page.html"), "--json")
    assert page.json["bytes"] == (tmp_path / "page.html").stat().st_size > 100_000


def test_the_flow_predict_writes_where_it_is_told(
    whole: Finished, home: Path, prefix: str, prefect_server: PrefectServer, workspace: Workspace, cifar10: DatasetRef
) -> None:
    with safe_open(home / "datasets" / f"{cifar10.digest}.safetensors", framework="np") as packed:
        picture = io.BytesIO()
        Image.fromarray(packed.get_tensor("test_images")[0]).save(picture, "png")
    workspace.store.put("inbox/a.png", picture.getvalue())
    code = "import sys; from flows.predict import predict; print(predict(sys.argv[1:2], sys.argv[2]).predicted)"
    places = (workspace.store.url("inbox/"), workspace.store.url("predictions.csv"))
    ours = {"NIGHTSHIFT_HOME": str(home), "NIGHTSHIFT_S3__PREFIX": prefix, **prefect_server.environment}
    done = subprocess.run(
        [sys.executable, "-c", code, *places], env={**os.environ, **ours}, cwd=home, capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr
    assert b"inbox/a.png" in workspace.store.get("predictions.csv")[0]


@pytest.fixture(scope="module")
def worse(whole: Finished, run: Callable[..., Finished]) -> Finished:
    """What a person sees of a run whose model is worse than the one of `whole`."""
    return run(*WORSE)


def test_a_person_sees_epochs_and_a_summary_and_nothing_else(worse: Finished) -> None:
    assert worse.exit_code == 0
    assert all(
        part in worse.out for part in ("test accuracy", "cifar10 from the snapshot", "not promoted", "all images")
    )
    lines = worse.err.splitlines()
    assert [line for line in lines if not line.startswith(("·", "  epoch"))] == []
    assert len([line for line in lines if line.startswith("  epoch")]) == 1


def test_a_rejection_is_a_result_and_by_setting_a_failure(
    worse: Finished, run: Callable[..., Finished], workspace: Workspace, prefect_server: PrefectServer
) -> None:
    record, _ = read_record(workspace.store, "night-worse")
    assert record.status == "finished"
    assert record.result
    verdict = record.result.verdict
    assert verdict
    assert not verdict.promoted
    assert verdict.champion
    assert verdict.champion.run_id == "night-whole"
    state = newest_flow_run(prefect_server, "night-worse")["state"]
    assert (state["type"], state["message"]) == ("COMPLETED", verdict_message("night-worse", verdict))
    failed = run(*WORSE, NIGHTSHIFT_GATE__FAIL_WHEN_REJECTED="true")
    assert failed.exit_code == 1
    assert "night-worse is not promoted" in failed.err
    assert "Traceback" not in failed.err
    assert newest_flow_run(prefect_server, "night-worse")["state"]["type"] == "FAILED"


def test_prefect_shows_the_report_and_the_progress_as_artifacts(whole: Finished, prefect_server: PrefectServer) -> None:
    flow_run = newest_flow_run(prefect_server, "night-whole")["id"]
    found = ask(prefect_server, "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run]}}})
    by_key = {artifact["key"]: artifact for artifact in found if artifact["key"]}  # results have none
    assert set(by_key) == {"report", "training"}
    assert (by_key["training"]["type"], by_key["training"]["data"]) == ("progress", 100)
    assert whole.json["verdict"]["reason"] in by_key["report"]["data"]


def test_verify_reads_every_checkpoint_back(
    whole: Finished, run: Callable[..., Finished], workspace: Workspace
) -> None:
    stored = len(read_record(workspace.store, "night-whole")[0].checkpoints)
    assert run("verify", "night-whole", "--json").json == {"ok": True, "checked": stored, "bad": []}
    key = whole.json["checkpoints"][-1]["key"]
    body = workspace.store.get(key)[0]
    workspace.store.put(key, body[:-1])
    broken = run("verify", "night-whole", "--json")
    workspace.store.put(key, body)
    assert (broken.exit_code, broken.json["ok"], broken.json["checked"]) == (1, False, stored)
    assert [bad["key"] for bad in broken.json["bad"]] == [key]


def test_a_finished_run_returns_its_result_and_trains_nothing(
    whole: Finished, run: Callable[..., Finished], workspace: Workspace
) -> None:
    record = read_record(workspace.store, "night-whole")
    again = run("train", *TUTORIAL, "--run-id", "night-whole", "--json")
    assert "nothing to train" in again.err
    assert again.json == whole.json
    assert read_record(workspace.store, "night-whole") == record


def test_a_run_killed_and_then_told_to_stop_ends_with_the_same_weights(
    whole: Finished,
    run: Callable[..., Finished],
    start: Callable[..., Command],
    workspace: Workspace,
    prefect_server: PrefectServer,
) -> None:
    killed = start("train", *TUTORIAL, "--run-id", "night-stopped", "--set", "checkpoint_every_steps=20")
    killed.wait_for_line("epoch 1/3")
    killed.send(signal.SIGKILL)
    killed.finish()

    terminated = start("resume", "night-stopped", "--json")
    terminated.wait_for_line("epoch 2/3")
    terminated.send(signal.SIGTERM)
    stopped = terminated.finish()
    assert stopped.exit_code == 3, stopped.err
    assert "nightshift resume night-stopped" in stopped.json["error"]
    record = read_record(workspace.store, "night-stopped")[0]
    assert record.status == "interrupted"
    assert record.resumed_from_step
    assert record.resumed_from_step >= 20
    assert f"after step {record.step} of 300" in stopped.json["error"]
    crashed = newest_flow_run(prefect_server, "night-stopped")["state"]
    assert (crashed["type"], crashed["message"]) == ("CRASHED", stopped.json["error"])

    taken_for_lost = start("resume", "night-stopped", "--json")
    taken_for_lost.wait_for_line("training simple_cnn")
    flow_run = newest_flow_run(prefect_server, "night-stopped")["id"]
    ask(prefect_server, f"flow_runs/{flow_run}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    taken_for_lost.send(signal.SIGTERM)
    ended = taken_for_lost.finish()
    assert (ended.exit_code, "Traceback" in ended.err) == (3, False), ended.err
    assert "nightshift resume night-stopped" in ended.json["error"]
    record = read_record(workspace.store, "night-stopped")[0]

    resumed = run("resume", "night-stopped", "--json")
    assert resumed.exit_code == 0, resumed.err
    assert resumed.json["resumed_from_step"] == record.step
    assert resumed.json["weights_sha256"] == whole.json["weights_sha256"]


def test_every_key_that_a_flow_writes_is_known_to_gc(whole: Finished, workspace: Workspace) -> None:
    keys = [item.key for prefix in (PAYLOADS, REPORTS, MODELS, DATASETS) for item in workspace.store.list(prefix)]
    assert {place.kind for key in keys if (place := place_of(key))} >= {"payload", "report", "version", "champion"}
    assert [key for key in keys if not place_of(key)] == []
