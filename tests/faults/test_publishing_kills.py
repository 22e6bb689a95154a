"""SIGKILL between the last step and the end of the night: the same run, started again, comes to the same end."""

import os
import signal
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from nightshift.judging import evaluation, gate
from nightshift.judging.report import publish_report
from nightshift.local.s3 import embedded_s3
from nightshift.publishing.publish import publish_model
from nightshift.records import orphans
from nightshift.records.history import read_copy, read_history
from nightshift.records.run import RunRecord, read_record
from nightshift.records.versions import read_card
from nightshift.refs import DatasetRef
from nightshift.settings import GateSettings
from nightshift.storage.s3 import S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.forked import forked

CONFIG = small_config("quick", max_train_images=320, epochs=1)
# What is written last before, or first after, each point at which another step begins.
POINTS = (
    "before card.json",
    "after card.json",
    "after champion.json",
    "after html",
)


def the_rest_of_the_night(home: Path, prefix: str, run_id: str, dataset: DatasetRef, kill_at: str) -> None:
    """What the flow's last five tasks do; killed before or after the first write of a key that ends as told."""
    put = S3.put
    when, _, suffix = kill_at.partition(" ")

    def put_or_die(self: S3, key: str, body: bytes, **condition: Any) -> str:
        hit = kill_at != "" and key.endswith(suffix)
        if hit and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        etag = put(self, key, body, **condition)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)
        return etag

    S3.put = put_or_die  # type: ignore[method-assign]
    with embedded_s3(home, prefix) as store:
        workspace = Workspace(store, home, 60, 5)
        checkpoint = train_alone(workspace, run_id, CONFIG, dataset)
        evaluated = evaluation.evaluate(workspace, checkpoint, dataset)
        model = publish_model(workspace, checkpoint, dataset, evaluated)
        verdict = gate.promote(store, model, GateSettings())
        publish_report(workspace, checkpoint, evaluated, model, verdict, price_per_hour=None)


def test_a_run_killed_at_every_step_after_its_training_comes_to_the_same_end(
    workspace: Workspace, home: Path, prefix: str, cifar10: DatasetRef
) -> None:
    def run(run_id: str, kill_at: str = "") -> int | None:
        process: ForkServerProcess = forked().Process(
            target=the_rest_of_the_night, args=(home, prefix, run_id, cifar10, kill_at)
        )
        process.start()
        process.join()
        return process.exitcode

    for point in POINTS:
        assert run("killed", point) == -signal.SIGKILL, point
        champion = read_history(workspace.store, "cifar10").champion
        assert not champion or workspace.store.head("models/cifar10/killed/card.json"), point
    assert run("killed") == 0
    history = read_history(workspace.store, "cifar10")
    assert [(entry.what, entry.version) for entry in history.transitions] == [("promoted", "killed")]
    assert read_copy(workspace.store, "cifar10") == history
    assert orphans.find(workspace.store, timedelta(0)).keys == []

    def ending(run_id: str) -> tuple[Any, ...]:
        record: RunRecord = read_record(workspace.store, run_id)[0]
        assert record.result
        assert record.result.verdict
        card = read_card(workspace.store, "cifar10", run_id)
        files = {name: card.files[name] for name in ("weights.pth", "weights.safetensors", "predictions.safetensors")}
        return (
            record.status,
            record.result.test_accuracy,
            record.result.weights_sha256,
            record.result.verdict.promoted,
            record.result.verdict.reason,
            files,
            {key.key.split("/", 2)[2] for key in workspace.store.list(f"reports/{run_id}/")},
        )

    killed = ending("killed")
    for room in ("models/", "runs/"):  # the other begins with no champion as well
        for item in workspace.store.list(room):
            workspace.store.delete(item.key)
    assert run("whole") == 0
    assert killed == ending("whole")
