"""Published files that were damaged or deleted are found, and made again from the run to the same sha256."""

import hashlib
import secrets
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest

from nightshift.errors import CheckpointCorruptError, ConfigError, ExportError, ModelNotFoundError
from nightshift.judging import gate
from nightshift.judging.evaluation import evaluate
from nightshift.judging.paired import compare
from nightshift.judging.report import build_report, publish_report
from nightshift.local.s3 import embedded_s3
from nightshift.publishing.export import FORMATS
from nightshift.publishing.publish import export_run
from nightshift.publishing.republish import republish
from nightshift.publishing.verify import verify_published
from nightshift.records import champions, orphans
from nightshift.records.run import RunRecord, read_record
from nightshift.refs import DatasetRef, Verdict
from nightshift.settings import GateSettings
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace
from tests.conftest import publish_model
from tests.records.test_lease import acquire
from tests.stores import memory_store

FILES = ("weights.pth", "weights.safetensors", "model.pt2", "predictions.safetensors", "card.json")
RUN = "epochs-1"
FOLDER = f"models/cifar10/{RUN}/"


@pytest.fixture(scope="module")
def finished(home: Path, server: S3, cifar10: DatasetRef) -> Iterator[S3]:
    """A store with one finished run, whose version is live."""
    with embedded_s3(home, f"republished-{secrets.token_hex(6)}") as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=5)
        model = publish_model(workspace, cifar10, epochs=1)
        record, _ = read_record(store, RUN)
        checkpoint = record.ref(record.checkpoints[-1])
        evaluated = evaluate(workspace, checkpoint, cifar10)
        verdict = gate.promote(store, model, GateSettings())
        publish_report(workspace, checkpoint, evaluated, model, verdict, price_per_hour=None)
        yield store


@pytest.fixture
def workspace(workspace: Workspace, finished: S3) -> Workspace:
    """A copy of it, to be damaged."""
    for item in finished.list(""):
        if not item.key.startswith("datasets/"):
            workspace.store.put(item.key, finished.get(item.key)[0])
    return workspace


def record_of(workspace: Workspace) -> RunRecord:
    return read_record(workspace.store, RUN)[0]


def contents(workspace: Workspace) -> dict[str, str]:
    store = workspace.store
    return {item.key: hashlib.sha256(store.get(item.key)[0]).hexdigest() for item in store.list(FOLDER)}


def bad(workspace: Workspace) -> list[str]:
    return [checked.key.removeprefix(FOLDER) for checked in verify_published(workspace.store, RUN) if checked.problem]


def cut(body: bytes) -> bytes:
    return body[: len(body) // 2]


def flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]


@pytest.mark.parametrize("damage", [flipped, *(pytest.param(damage, marks=pytest.mark.soak) for damage in (cut, None))])
def test_each_damaged_file_of_the_champion_is_found_and_made_again_to_the_same_sha256(
    workspace: Workspace, damage: Callable[[bytes], bytes] | None
) -> None:
    store, before = workspace.store, contents(workspace)
    assert bad(workspace) == republish(workspace, record_of(workspace)) == []
    for damaged in (*((name,) for name in FILES), FILES):
        for name in damaged:
            key = FOLDER + name
            store.put(key, damage(store.get(key)[0])) if damage else store.delete(key)
        assert bad(workspace) == (["card.json"] if "card.json" in damaged else list(damaged))
        assert sorted(republish(workspace, record_of(workspace))) == sorted(damaged)
        assert contents(workspace) == before
    assert bad(workspace) == []
    assert champions.read_champion(store, "cifar10").version == RUN


def test_gc_leaves_every_file_of_a_finished_run_and_of_a_champion_though_its_card_and_record_are_gone(
    workspace: Workspace,
) -> None:
    store = workspace.store
    for key in (FOLDER + "card.json", f"runs/{RUN}.json", "models/cifar10/champion.json"):
        store.delete(key)
        assert not any(found.startswith("models/") for found in orphans.find(store, timedelta(0)).keys)


def test_without_its_checkpoint_or_its_evaluation_the_rest_of_a_version_is_made_from_what_is_left(
    workspace: Workspace,
) -> None:
    store, before = workspace.store, contents(workspace)
    for prefix in (f"checkpoints/{RUN}/", f"reports/{RUN}/"):
        for item in store.list(prefix):
            store.delete(item.key)
    for name in ("weights.pth", "model.pt2", "predictions.safetensors", "card.json"):
        store.delete(FOLDER + name)
    republish(workspace, record_of(workspace))
    assert contents(workspace) == before


def test_what_does_not_come_out_as_it_was_published_is_left_and_named_with_the_environment_of_then(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with another version of torch."""
    store, before = workspace.store, contents(workspace)
    kind = FORMATS["pt2"]
    other = type(kind)(lambda model, inputs: kind.write(model, inputs) + b"\0", kind.run, exact=False)
    monkeypatch.setitem(FORMATS, "pt2", other)
    for name in ("card.json", "weights.pth"):  # the pt2 that lies there is the one that the card named
        store.put(FOLDER + name, b"damaged")
    republish(workspace, record_of(workspace))
    assert contents(workspace) == before
    for name in ("model.pt2", "weights.pth"):
        store.put(FOLDER + name, b"damaged")
    with pytest.raises(ExportError, match=r"^model\.pt2 of epochs-1 .*device=cpu"):
        republish(workspace, record_of(workspace))
    assert bad(workspace) == ["model.pt2"]
    store.delete(FOLDER + "card.json")
    with pytest.raises(ExportError, match=r"^card\.json of epochs-1"):
        republish(workspace, record_of(workspace))
    assert bad(workspace) == ["card.json"]


def test_a_run_that_is_not_finished_has_no_version_to_make_again(home: Path) -> None:
    workspace = Workspace(memory_store(), home, lease_seconds=60, save_retry_seconds=5)
    acquire(workspace.store).end("interrupted")
    with pytest.raises(ConfigError, match="nightshift resume run"):
        republish(workspace, read_record(workspace.store, "run")[0])


def test_a_report_needs_no_card_of_the_champion_that_its_run_was_compared_with(workspace: Workspace) -> None:
    store, record = workspace.store, record_of(workspace)
    compared = compare(np.array([True, False]), np.array([False, True]), RUN)
    verdict = Verdict(promoted=False, reason="no better", comparison=compared, champion=None)
    whole = build_report(workspace, record, verdict, None).html
    store.put(FOLDER + "card.json", b"{")
    assert build_report(workspace, record, verdict, None).html == whole
    store.delete(FOLDER + "card.json")
    assert build_report(workspace, record, verdict, None).html == whole


def test_export_takes_the_published_weights_when_the_checkpoint_is_gone_and_names_what_is_missing(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    store, record = workspace.store, record_of(workspace)
    whole = export_run(workspace, record, "safetensors")
    key = record.checkpoints[-1].key
    store.delete(key)
    assert export_run(workspace, record, "safetensors") == whole
    assert f"{store.url(key)}: the object is missing" in caplog.text
    store.put(FOLDER + "weights.safetensors", b"damaged")
    with pytest.raises(CheckpointCorruptError) as refused:
        export_run(workspace, record, "safetensors")
    assert store.url(key) in str(refused.value)
    assert store.url(FOLDER + "weights.safetensors") in str(refused.value)


def test_all_that_is_published_is_verified_with_the_history_of_champions(workspace: Workspace) -> None:
    store = workspace.store
    assert [checked.key for checked in verify_published(store) if checked.problem] == []
    store.put("models/cifar10/champion.json", b"{")
    store.delete(FOLDER + "card.json")
    problems = {checked.key: checked.problem for checked in verify_published(store) if checked.problem}
    assert set(problems) == {"models/cifar10/champion.json", FOLDER + "card.json"}
    assert f"nightshift republish {RUN}" in str(problems[FOLDER + "card.json"])
    with pytest.raises(ModelNotFoundError, match="no version of nobody is published"):
        list(verify_published(store, "nobody"))
