"""A payload is read only if a run can go on from it, whatever size and sha256 its record says."""

import hashlib
import io
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from models import build_model
from nightshift.checkpoints.payload import read_payload
from nightshift.checkpoints.verify import verify_checkpoints
from nightshift.errors import CheckpointCorruptError, ObjectTooLargeError
from nightshift.records.run import Checkpoint, RunRecord, read_record, write_record
from nightshift.refs import DatasetRef
from nightshift.storage.store import Store
from nightshift.training.optimizers import build_optimizer
from nightshift.training.state import TrainState, payload_check
from nightshift.workspace import Workspace
from tests.checkpoints.conftest import resume, run_with_checkpoints


def reseal(workspace: Workspace, newest: Checkpoint, change: Callable[[bytes], bytes]) -> Checkpoint:
    """Change the newest payload of `run`, and its size and sha256 in the record with it."""
    record, etag = read_record(workspace.store, "run")
    body = change(workspace.store.get(newest.key)[0])
    workspace.store.put(newest.key, body)
    checkpoint = newest.changed(bytes=len(body), sha256=hashlib.sha256(body).hexdigest())
    write_record(workspace.store, record.changed(checkpoints=[*record.checkpoints[:-1], checkpoint]), etag)
    return checkpoint


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """What a change of its values makes of a payload."""

    def stored(body: bytes) -> bytes:
        payload = torch.load(io.BytesIO(body), weights_only=True)
        change(payload)
        file = io.BytesIO()
        torch.save(payload, file)
        return file.getvalue()

    return stored


def deflated(body: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as whole, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as into:
        for entry in whole.infolist():
            into.writestr(entry.filename, whole.read(entry))
    return file.getvalue()


STRANGE: dict[str, Callable[[bytes], bytes]] = {
    "is compressed": deflated,
    "too little": lambda body: body.replace(b"\x80\x02}q\x00(", b"\x80\x02aq\x00("),
    "plain tensors and values": lambda body: b"",
    "ranks: Field required": changed(lambda payload: payload.pop("ranks")),
    "epoch_images: should be a valid integer": changed(lambda payload: payload.update(epoch_images="many")),
    "it is of step 16, not of 15": changed(lambda payload: payload.update(step=16)),
    "model.5.[key]: should be a valid string": changed(lambda payload: payload["model"].update({5: None})),
    "rng.numpy.2: should be less than or equal to 624": changed(
        lambda payload: payload["ranks"][0]["rng"]["numpy"].__setitem__(2, 2**31 - 1)
    ),
    "rng.numpy.1: it is torch.int64 (1,) instead of torch.int64 (624,)": changed(
        lambda payload: payload["ranks"][0]["rng"]["numpy"].__setitem__(1, torch.zeros(1, dtype=torch.int64))
    ),
    "ranks.0.rng: ": changed(lambda payload: payload["ranks"][0]["rng"].update(torch=torch.zeros(5))),
    "epoch_loss: it is torch.float64 (2,)": changed(
        lambda payload: payload["ranks"][0].update(epoch_loss=torch.zeros(2, dtype=torch.float64))
    ),
    "model.fc2.bias is missing": changed(lambda payload: payload["model"].pop("fc2.bias")),
    "model.more is nothing": changed(lambda payload: payload["model"].update(more=torch.zeros(1))),
    "model.fc2.bias is torch.float32 (11,) instead of torch.float32 (10,)": changed(
        lambda payload: payload["model"].update({"fc2.bias": torch.zeros(11)})
    ),
    "model.fc2.bias is torch.float64 (10,)": changed(
        lambda payload: payload["model"].update({"fc2.bias": torch.zeros(10, dtype=torch.float64)})
    ),
    "optimizer.precision: ": changed(lambda payload: payload["optimizer"].update(precision="float8")),
    "optimizer.state.99 is of no parameter": changed(lambda payload: payload["optimizer"]["state"].update({99: {}})),
    "optimizer.state.0.exp_avg is missing": changed(
        lambda payload: payload["optimizer"]["state"].update({0: {"exp_average": torch.zeros(1)}})
    ),
    "optimizer.state.0.exp_avg is torch.float32 (3,), which does not fit": changed(
        lambda payload: payload["optimizer"]["state"].update({0: {"exp_avg": torch.zeros(3)}})
    ),
}


def test_a_payload_that_cannot_be_gone_on_from_is_named_with_what_is_wrong_and_passed_over(
    workspace: Workspace, cifar10: DatasetRef, record: RunRecord
) -> None:
    """Whoever can write to the bucket can write the sha256 of anything. Much of this ended in a traceback."""
    newest, whole = record.checkpoints[-1], workspace.store.get(record.checkpoints[-1].key)[0]
    check = payload_check(record.train_config(), 10)
    for reason, change in STRANGE.items():
        workspace.store.put(newest.key, whole)
        reseal(workspace, newest, change)
        verdicts = [
            bad for _, bad in verify_checkpoints(workspace.store, read_record(workspace.store, "run")[0], check)
        ]
        assert verdicts[:2] == [None, None]
        assert verdicts[2], reason
        assert reason in verdicts[2].reason
        assert "\n" not in verdicts[2].reason
    resumed, warnings = resume(workspace, cifar10)  # from the last of them
    assert resumed.resumed_from_step == 10
    assert [newest.key in warning for warning in warnings] == [True]


def test_what_the_optimizers_groups_say_in_a_payload_does_not_count(
    workspace: Workspace, cifar10: DatasetRef, record: RunRecord
) -> None:
    newest = record.checkpoints[-2]
    body = workspace.store.get(newest.key)[0]
    groups = changed(lambda payload: payload["optimizer"].update(param_groups=[{"momentum": "much"}]))(body)
    payload = torch.load(io.BytesIO(groups), weights_only=True)
    config = record.train_config()
    network = build_model(config.model.name, 10)
    state = TrainState(network, build_optimizer(network, config.optimizer), torch.device("cpu"))
    before = state.optimizer.state_dict()["param_groups"]
    state.check(payload)
    state.restore(payload)
    assert state.optimizer.state_dict()["param_groups"] == before
    restored = state.optimizer.state_dict()["state"]
    assert all(
        torch.equal(kept["exp_avg"], restored[number]["exp_avg"])
        for number, kept in payload["optimizer"]["state"].items()
    )


def test_of_a_larger_object_in_its_place_no_more_is_fetched_than_the_record_says(store: Store) -> None:
    run = run_with_checkpoints(store)
    newest = run.record.checkpoints[-1]
    store.upload(newest.key, io.BytesIO(bytes(30_000_000)))
    taken: list[int] = []

    class Counting(io.BytesIO):
        def write(self, part: Any) -> int:
            taken.append(len(part))
            return super().write(part)

    with pytest.raises(ObjectTooLargeError):
        store.download(newest.key, Counting(), max_bytes=newest.bytes)
    assert sum(taken) <= newest.bytes
    with pytest.raises(CheckpointCorruptError, match=f"it has more than {newest.bytes} bytes"):
        read_payload(store, newest)
