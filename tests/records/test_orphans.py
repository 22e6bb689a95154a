"""What no record names is found and deleted; what is needed, or may be about to be, is not."""

import logging
from collections.abc import Callable
from datetime import timedelta

import pytest

from nightshift.local.s3 import embedded_s3
from nightshift.records import orphans
from nightshift.records.lease import Run
from nightshift.records.run import Checkpoint
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace
from tests.conftest import Finished
from tests.records.test_lease import acquire, hold

NOW = timedelta(0)
A_DAY = timedelta(days=1)


def commit(run: Run, key: str) -> None:
    run.store.put(key, b"payload")
    checkpoint = Checkpoint(
        step=1, epoch=0, key=key, bytes=7, sha256="0" * 64, written_at=run.store.now(), metrics={"train_seconds": 1}
    )
    run.update(lambda record: record.changed(checkpoints=[checkpoint]))


def begin_upload(store: S3, key: str) -> None:
    """Begin a multipart upload, send a part, and come no further."""
    where = {"Bucket": store.bucket, "Key": store.prefix + key}
    upload = store._client.create_multipart_upload(**where)["UploadId"]
    store._client.upload_part(**where, UploadId=upload, PartNumber=1, Body=b"part")


def found(store: S3, older_than: timedelta = NOW) -> list[str]:
    return orphans.find(store, older_than).keys


def test_a_payload_that_no_record_names_is_an_orphan_and_a_named_one_is_not(workspace: Workspace) -> None:
    with hold(workspace.store) as run:
        commit(run, "checkpoints/run/1-1.pt")
        run.end("interrupted")
    workspace.store.put("checkpoints/run/2-1.pt", b"uploaded, never committed")
    workspace.store.put("checkpoints/nobody/1-1.pt", b"of a run without a record")
    assert found(workspace.store) == ["checkpoints/nobody/1-1.pt", "checkpoints/run/2-1.pt"]


def test_what_is_younger_than_asked_for_is_left_alone(workspace: Workspace) -> None:
    workspace.store.put("checkpoints/nobody/1-1.pt", b"payload")
    begin_upload(workspace.store, "checkpoints/nobody/2-1.pt")
    assert found(workspace.store, A_DAY) == []
    assert len(found(workspace.store)) == 2


def test_what_a_live_trainer_may_be_about_to_commit_is_left_alone_at_any_age(workspace: Workspace) -> None:
    acquire(workspace.store).end("interrupted")
    with hold(workspace.store) as run:
        workspace.store.put(f"checkpoints/run/2-{run.token}.pt", b"about to be committed")
        begin_upload(workspace.store, f"checkpoints/run/3-{run.token}.pt")
        workspace.store.put("models/cifar10/run/weights.pth", b"about to be published")
        workspace.store.put("checkpoints/run/2-1.pt", b"of the trainer before")
        begin_upload(workspace.store, "checkpoints/run/3-1.pt")
        assert found(workspace.store) == ["checkpoints/run/2-1.pt", "checkpoints/run/3-1.pt"]


def test_a_version_without_its_card_is_an_orphan_and_a_published_one_is_not(workspace: Workspace) -> None:
    for key in (
        "models/cifar10/half/weights.pth",
        "models/cifar10/whole/weights.pth",
        "models/cifar10/whole/card.json",
    ):
        workspace.store.put(key, b"content")
    workspace.store.put("models/cifar10/champion.json", b"pointer")
    assert found(workspace.store) == ["models/cifar10/half/weights.pth"]


def test_a_data_set_is_a_cache_and_stays(workspace: Workspace) -> None:
    workspace.store.put("datasets/0/packed.safetensors", b"data")
    assert found(workspace.store) == []


def test_the_payloads_of_a_damaged_record_are_left_alone_with_a_warning(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    with hold(workspace.store) as run:
        commit(run, "checkpoints/run/1-1.pt")
        run.end("interrupted")
    body, _ = workspace.store.get("runs/run.json")
    workspace.store.put("runs/run.json", body.replace(b'"step": 1', b'"step": 2'))
    with caplog.at_level(logging.WARNING):
        assert found(workspace.store) == []
    assert "run run is left alone" in caplog.text


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
