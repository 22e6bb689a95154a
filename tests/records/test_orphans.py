"""What no record names is found and deleted; what is needed, or may be about to be, is not."""

import logging
from collections.abc import Callable
from datetime import timedelta

import pytest

from nightshift.local.s3 import embedded_s3
from nightshift.records import champions, orphans
from nightshift.records.lease import Run
from nightshift.records.run import Checkpoint, CheckpointMetrics
from nightshift.records.versions import publish_version
from nightshift.storage.store import Store
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.records.test_lease import RESULT, acquire, hold
from tests.records.test_versions import card_of
from tests.stores import begin_upload, memory_store, wait_until

NOW = timedelta(0)
A_DAY = timedelta(days=1)


def commit(run: Run, key: str) -> None:
    run.store.put(key, b"payload")
    checkpoint = Checkpoint(
        step=1,
        epoch=0,
        key=key,
        bytes=7,
        sha256="0" * 64,
        written_at=run.store.now(),
        metrics=CheckpointMetrics(train_seconds=1),
    )
    run.update(lambda record: record.changed(checkpoints=[checkpoint]))


def found(store: Store, older_than: timedelta = NOW) -> list[str]:
    return orphans.find(store, older_than).keys


def test_a_payload_that_no_record_names_is_an_orphan_and_a_named_one_is_not(store: Store) -> None:
    with hold(store) as run:
        commit(run, "checkpoints/run/1-1.pt")
        run.end("interrupted")
    store.put("checkpoints/run/2-1.pt", b"uploaded, never committed")
    store.put("checkpoints/nobody/1-1.pt", b"of a run without a record")
    assert found(store) == ["checkpoints/nobody/1-1.pt", "checkpoints/run/2-1.pt"]


def test_what_is_younger_than_asked_for_is_left_alone(store: Store) -> None:
    store.put("checkpoints/nobody/1-1.pt", b"payload")
    begin_upload(store, "checkpoints/nobody/2-1.pt")
    assert found(store, A_DAY) == []
    assert len(found(store)) == 2


def test_what_a_live_trainer_may_be_about_to_commit_is_left_alone_at_any_age(store: Store) -> None:
    acquire(store).end("interrupted")
    with hold(store) as run:
        store.put(f"checkpoints/run/2-{run.token}.pt", b"about to be committed")
        begin_upload(store, f"checkpoints/run/3-{run.token}.pt")
        store.put("models/cifar10/run/weights.pth", b"about to be published")
        store.put("checkpoints/run/2-1.pt", b"of the trainer before")
        begin_upload(store, "checkpoints/run/3-1.pt")
        assert found(store) == ["checkpoints/run/2-1.pt", "checkpoints/run/3-1.pt"]


def test_a_version_without_its_card_is_an_orphan_and_a_published_one_is_not(store: Store) -> None:
    for key in (
        "models/cifar10/half/weights.pth",
        "models/cifar10/whole/weights.pth",
        "models/cifar10/whole/card.json",
    ):
        store.put(key, b"content")
    assert found(store) == ["models/cifar10/half/weights.pth"]


def test_a_data_set_is_a_cache_and_stays(store: Store) -> None:
    store.put("datasets/0/packed.safetensors", b"data")
    assert found(store) == []


def test_the_payloads_of_a_damaged_record_are_left_alone_with_a_warning(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with hold(store) as run:
        commit(run, "checkpoints/run/1-1.pt")
        run.end("interrupted")
    body, _ = store.get("runs/run.json")
    store.put("runs/run.json", body.replace(b'"step": 1', b'"step": 2'))
    with caplog.at_level(logging.WARNING):
        assert found(store) == []
    assert "run run is left alone" in caplog.text


def test_an_unfinished_upload_that_belongs_to_no_run_is_an_orphan(store: Store) -> None:
    for key in ("models/cifar10/champion.json", "checkpoints/nobody/1-1.pt", f"datasets/{'0' * 64}/packed.safetensors"):
        begin_upload(store, key)
    assert len(found(store)) == 3


def test_what_other_people_keep_in_the_same_bucket_is_left_alone(store: Store) -> None:
    for key in (
        "checkpoints/resnet/epoch-3.pt",
        "checkpoints/resnet/3-1.pt.bak",
        "checkpoints/team/resnet/3-1.pt",
        "models/resnet/v1/model.onnx",
        "models/resnet/v1/sub/weights.pth",
        "reports/2026/november.pdf",
        "probe/of-somebody",
    ):
        store.put(key, b"somebody else's")
        begin_upload(store, key)
    begin_upload(store, "videos/holiday.mp4")
    assert found(store) == []


def test_a_version_that_its_run_may_still_publish_is_left_alone(store: Store) -> None:
    acquire(store).end("interrupted")
    store.put("models/cifar10/run/weights.pth", b"half of a version")
    assert found(store) == []


def test_a_version_that_was_published_after_it_was_found_is_not_deleted(store: Store) -> None:
    acquire(store).end("failed")
    store.put("models/cifar10/run/weights.pth", b"half of a version")
    orphaned = orphans.find(store, NOW)
    assert orphaned.keys == ["models/cifar10/run/weights.pth"]
    with hold(store) as run:  # resumed by hand meanwhile: it publishes the same keys and goes live
        publish_version(store, card_of("run"), {"weights.pth": b"half of a version"})
        run.end("finished", result=RESULT)
    assert orphans.collect(store, orphaned).keys == []
    assert store.head("models/cifar10/run/weights.pth")


def test_a_payload_that_was_committed_after_it_was_found_is_not_deleted(store: Store) -> None:
    acquire(store).end("interrupted")
    store.put("checkpoints/run/1-2.pt", b"payload")
    orphaned = orphans.find(store, NOW)
    assert orphaned.keys == ["checkpoints/run/1-2.pt"]
    with hold(store) as run:
        commit(run, "checkpoints/run/1-2.pt")
    assert orphans.collect(store, orphaned).keys == []


def test_a_version_that_the_history_of_champions_names_is_left_alone_without_its_card(store: Store) -> None:
    publish_version(store, card_of("live"), {"weights.pth": b"weights"})
    champions.promote_by_hand(store, "cifar10", "live")
    store.delete("models/cifar10/live/card.json")
    assert found(store) == []


def test_another_prefix_of_the_bucket_is_not_touched(workspace: Workspace) -> None:
    with embedded_s3(workspace.home, "another-tenant") as other:
        other.put("checkpoints/nobody/1-1.pt", b"payload")
        begin_upload(other, "checkpoints/nobody/2-1.pt")
        orphans.collect(workspace.store, orphans.find(workspace.store, NOW))
        assert len(found(other)) == 2
        orphans.collect(other, orphans.find(other, NOW))
        assert found(other) == []


def test_gc_shows_what_it_would_delete_and_then_deletes_it(
    workspace: Workspace, nightshift: Callable[..., Finished]
) -> None:
    workspace.store.put("checkpoints/nobody/1-1.pt", b"payload")
    begin_upload(workspace.store, "checkpoints/nobody/2-1.pt")
    counts = {"deleted": 1, "bytes": 7, "multipart_aborted": 1}
    for arguments in (("--dry-run",), ()):
        assert nightshift("gc", "--json", *arguments).json.items() >= dict.fromkeys(counts, 0).items()
        done = nightshift("gc", "--json", "--older-than-hours", "0", *arguments)
        assert done.exit_code == 0, done.err
        assert done.json.items() >= counts.items()
        assert len(found(workspace.store)) == (2 if arguments else 0)


def test_a_probe_that_is_in_use_is_left_alone_at_any_age_and_a_forgotten_one_is_an_orphan() -> None:
    store = memory_store()
    store.put("probe/0123456789abcdef", b"first")
    assert found(store) == []
    wait_until(store, store.now() + timedelta(minutes=1))
    assert found(store) == ["probe/0123456789abcdef"]
