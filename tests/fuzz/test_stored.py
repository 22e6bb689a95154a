"""Objects in the bucket that somebody else has written: every command goes on, or says what is wrong with them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer import Exit

from nightshift import workspace as workspaces
from nightshift.cli.common import app
from nightshift.errors import NightshiftError
from nightshift.judging import gate
from nightshift.judging.drift import drift_key, read_drift
from nightshift.records import champions, index, orphans, recovery
from nightshift.records.curve import CurvePoint
from nightshift.records.history import copy_key, history_key
from nightshift.records.index import Index
from nightshift.records.keys import record_key, report_key
from nightshift.records.run import Checkpoint, CheckpointMetrics, Origin, Result, RunRecord, newest_records
from nightshift.records.versions import card_key
from nightshift.refs import ModelRef
from nightshift.settings import GateSettings
from nightshift.storage import documents
from nightshift.storage.memory import MemoryStore
from nightshift.sweeps import stored as sweeps
from nightshift.sweeps.study import ask
from nightshift.tracking.metrics import read_lines
from nightshift.workspace import Workspace
from tests.fuzz import mutations
from tests.fuzz.conftest import FUZZ
from tests.judging.test_gate import published
from tests.judging.test_report import drift_of
from tests.records.test_lease import hold


def a_store() -> MemoryStore:
    """Two runs, of which one is interrupted, and two versions, of which one went live and was followed by the other."""
    store = MemoryStore()
    at = datetime(2026, 11, 25, 2, tzinfo=UTC)
    checkpoint = Checkpoint(
        step=20,
        epoch=1,
        key="checkpoints/bad/20-1.pt",
        bytes=100,
        sha256="2" * 64,
        written_at=at,
        metrics=CheckpointMetrics(train_seconds=3.0, loss=1.0, accuracy=0.5),
    )
    for run_id in ("good", "bad"):
        with hold(store, run_id) as run:
            changes: dict[str, Any] = {
                "checkpoints": [checkpoint.changed(key=f"checkpoints/{run_id}/20-1.pt")],
                "curve": [CurvePoint(epoch=1, step=20, loss=1.0, accuracy=0.5)],
                "origin": Origin(flow_run_id="5a3c3c9e-5f0a-4d0c-8f53-0d6e6b1f9d11", deployment="train-cifar/nightly"),
                "result": Result(test_accuracy=0.5, test_loss=1.0, weights_sha256="0" * 64, model="models/x/"),
            }
            run.update(partial(RunRecord.changed, **changes))
            run.end("interrupted", "somebody stopped it")
    for version in ("first", "bad"):
        gate.promote(store, published(store, 0.5 if version == "first" else 0.6, version), GateSettings())
    store.put("runs/", b"")  # what a file browser leaves behind
    return store


STORE = a_store()
VERDICT = gate.promote(STORE, published(STORE, 0.65, "judged"), GateSettings())
OBJECTS = {item.key: STORE.get(item.key)[0] for item in STORE.list("")}
RECORD = json.loads(OBJECTS[record_key("bad")])
CARD = json.loads(OBJECTS[card_key("cifar10", "bad")])
HISTORY = json.loads(OBJECTS[history_key("cifar10")])
FINISHED = {
    **RECORD,
    "status": "finished",
    "result": Result(
        test_accuracy=0.6, test_loss=1.0, weights_sha256="0" * 64, model="models/cifar10/bad/", verdict=VERDICT
    ).model_dump(mode="json"),
}
INDEX = json.loads(
    documents.encoded(Index(runs=[run.changed(status="finished") for run in index.overviews(STORE, limit=10)]))
)
SWEEP = json.loads(documents.encoded(sweeps.plan("bad", "quick", {"lr": [0.1, 0.2], "momentum": [0.5, 0.6]})))
LINES = "\n".join(
    json.dumps({"at": "2026-11-25T02:00:00Z", "step": step, "epoch": 1, **kind})
    for step in (10, 20)
    for kind in (
        {
            **{"kind": "training", "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1},
            **{"images_per_second": 10.0, "train_seconds": 3.0},
        },
        {"kind": "checkpoint", "bytes": 100, "stall_seconds": 0.1, "save_seconds": 0.1},
    )
).encode()


def store_with(key: str, body: bytes) -> MemoryStore:
    """The store, with one object of somebody else's."""
    store = MemoryStore()
    for known, whole in {**OBJECTS, key: body}.items():
        store.put(known, whole)
    return store


@contextmanager
def commands_use(store: MemoryStore, home: Path) -> Iterator[None]:
    """Let the commands work on this store."""

    @contextmanager
    def opened(*_: object) -> Iterator[Workspace]:
        yield Workspace(store, home, 60, 5)

    with mock.patch.object(workspaces, "open_workspace", opened):
        yield


def run(*command: str) -> None:
    """A command as somebody types it: it ends, in a sentence or with a result."""
    with suppress(NightshiftError, Exit):
        app(list(command), standalone_mode=False)


def changed(whole: Any) -> st.SearchStrategy[bytes]:
    """The bytes of a document that was changed and sealed again, changed only, or damaged."""
    mutated = mutations.documents(whole)
    return st.one_of(
        mutated.map(mutations.sealed),
        mutated.map(lambda document: json.dumps(document).encode()),
        mutations.bytes_of(json.dumps(whole).encode()),
        st.sampled_from((b"", b"[]", b"{}", b"null", b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe", b"1" * 5000)),
    )


@FUZZ
@given(body=changed(RECORD))
def test_a_run_record_of_any_content_stops_no_command(body: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = store_with(record_key("bad"), body)
    with commands_use(store, tmp_path_factory.getbasetemp()):
        for command in (
            ["runs"],
            ["runs", "--json"],
            ["show", "bad"],
            ["verify", "bad"],
            ["gc", "--older-than-hours=0"],
        ):
            run(*command)
    assert "good" in [record.run_id for record in newest_records(store)]
    found = recovery.find(store, timedelta(hours=24))
    assert "good" in [run.record.run_id for run in found.interrupted]
    assert "good" in [record.run_id for record in recovery.claim_due(store, found.interrupted, 3)]
    assert not any("good" in key for key in orphans.find(store, timedelta(0)).keys)
    try:
        gate.promote(store, model("bad"), GateSettings())
        with hold(store, "bad") as held:
            held.check()
    except NightshiftError:
        pass


@FUZZ
@given(body=changed(INDEX))
def test_an_index_of_runs_of_any_content_stops_no_command_and_loses_no_run(
    body: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = store_with(index.KEY, body)
    with commands_use(store, tmp_path_factory.getbasetemp()):
        for command in (["runs"], ["runs", "--json"], ["gc", "--older-than-hours=0"]):
            run(*command)
    assert len(index.overviews(store, limit=10)) == 2


@FUZZ
@given(body=changed(CARD))
def test_a_card_of_any_content_stops_no_command(body: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    store = store_with(card_key("cifar10", "bad"), body)
    with commands_use(store, tmp_path_factory.getbasetemp()):
        for command in (
            ["champion"],
            ["verify", "--published"],
            ["gc", "--older-than-hours=0"],
            ["rollback", "first"],
            ["promote", "bad"],
        ):
            run(*command)
    candidate = published(store, 0.7, "candidate")
    with suppress(NightshiftError):
        gate.promote(store, candidate, GateSettings())
    champions.promote_by_hand(store, "cifar10", "first")


@FUZZ
@given(body=changed(HISTORY), of_the_copy=st.booleans())
def test_a_history_of_champions_of_any_content_stops_no_command(
    body: bytes, of_the_copy: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = store_with(copy_key("cifar10") if of_the_copy else history_key("cifar10"), body)
    if of_the_copy:
        store.delete(history_key("cifar10"))
    candidate = published(store, 0.7, "candidate")
    with commands_use(store, tmp_path_factory.getbasetemp()):
        for command in (
            ["champion"],
            ["champion", "--json"],
            ["gc", "--older-than-hours=0"],
            ["verify", "--published"],
            ["rollback"],
            ["delete", "bad", "--yes"],
        ):
            run(*command)
        with suppress(NightshiftError):
            gate.promote(store, candidate, GateSettings())
        for command in (["champion", "--rebuild"], ["pin"], ["unpin"]):
            run(*command)


@FUZZ
@given(body=changed(FINISHED))
def test_records_of_any_content_from_which_a_history_is_made_again_stop_no_command(
    body: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = store_with(record_key("bad"), body)
    for key in (history_key("cifar10"), copy_key("cifar10")):
        store.delete(key)
    with commands_use(store, tmp_path_factory.getbasetemp()):
        for command in (["verify", "--published"], ["champion", "--rebuild"], ["champion"], ["delete", "bad", "--yes"]):
            run(*command)


@FUZZ
@given(body=changed(SWEEP))
def test_a_sweep_of_any_content_is_read_or_refused_in_a_sentence(body: bytes) -> None:
    store = store_with("sweeps/bad.json", body)
    planned = sweeps.plan("bad", "quick", {"lr": [0.1, 0.2], "momentum": [0.5, 0.6]})
    try:
        study = sweeps.begin(store, planned)
        sweeps.results(study, {})
        ask(store, study, {})
    except NightshiftError:
        pass


@FUZZ
@given(body=changed(json.loads(documents.encoded(drift_of("good", ["bee", "cow"])))))
def test_an_account_of_what_came_in_of_any_content_stops_no_command(
    body: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = store_with(drift_key("good"), body)
    with commands_use(store, tmp_path_factory.getbasetemp()):
        run("show", "good", "--json")
    assert read_drift(store, "bad") is None


@FUZZ
@given(
    body=st.one_of(
        mutations.bytes_of(LINES),
        mutations.documents([json.loads(line) for line in LINES.splitlines()]).map(
            lambda lines: b"\n".join(json.dumps(line).encode() for line in (lines if isinstance(lines, list) else [0]))
        ),
    )
)
def test_of_metrics_of_any_content_the_lines_that_are_right_are_read(body: bytes) -> None:
    store = store_with(report_key("bad", "metrics.jsonl"), body + b"\n" + LINES.splitlines()[0])
    assert read_lines(store, "bad")[-1].step == 10


def model(version: str) -> ModelRef:
    return ModelRef(
        name="cifar10",
        version=version,
        run_id=version,
        key=f"models/cifar10/{version}/",
        test_accuracy=0.6,
        weights_sha256="0" * 64,
    )
