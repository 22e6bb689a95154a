"""A store that misbehaves costs time, never a bit: each fault at each kind of request, and a server that is killed."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from nightshift.checkpoints.payload import read_payload
from nightshift.checkpoints.verify import verify_checkpoints
from nightshift.errors import (
    LeaseExpiredError,
    StorageDeniedError,
    StorageError,
    TrainingDivergedError,
    TrainingInterrupted,
)
from nightshift.local.s3 import embedded_credentials, embedded_s3
from nightshift.records.lease import is_live
from nightshift.records.run import RunRecord, read_record
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.settings import S3Settings
from nightshift.storage import s3
from nightshift.storage.s3 import S3
from nightshift.storage.store import Store
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.conftest import eventually, small_config
from tests.faults import proxy as faults
from tests.faults.proxy import Fault, Kind, Proxy

CONFIG = small_config(checkpoint_every_steps=4, keep_last=1)
IN_PARTS: tuple[Kind, ...] = (
    *("record get", "record put", "payload get", "multipart begin", "part put", "multipart end", "payload delete"),
)
FAULTS: dict[str, Fault] = {
    "500": faults.refuse(500, "InternalError"),
    "503 SlowDown": faults.refuse(503, "SlowDown"),
    "reset before the request": faults.reset_before,
    "lost response": faults.lose_response,
    "truncated body": faults.truncate,
    "flipped bit": faults.flip_bit,
    "delay": faults.delay,
    "hang": faults.hang,
}


@pytest.fixture
def proxy(workspace: Workspace) -> Iterator[Proxy]:
    with faults.running(workspace.store.endpoint) as running:
        yield running


def behind(
    proxy: Proxy, workspace: Workspace, timeout_seconds: float = 60, save_retry_seconds: float = 60
) -> Workspace:
    """The same workspace, reached through the proxy."""
    store = workspace.store
    assert isinstance(store, S3)
    settings = S3Settings(
        endpoint_url=proxy.endpoint_url, bucket=store.bucket, prefix=store.prefix, timeout_seconds=timeout_seconds
    )
    through = S3(settings, embedded_credentials(workspace.home / "s3"))
    return Workspace(through, workspace.home, 60, save_retry_seconds)


@pytest.fixture
def faulty(workspace: Workspace, proxy: Proxy) -> Workspace:
    """A client that waits one second for an answer."""
    return behind(proxy, workspace, timeout_seconds=1)


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let payloads of a few MB go up in parts, as large ones do."""
    for config in (s3._TRANSFER, s3._PIPED):
        monkeypatch.setattr(config, "multipart_threshold", s3.MIB // 4)


@pytest.fixture(scope="module")
def expected(home: Path, server: S3, cifar10: DatasetRef) -> str:
    """The state an undisturbed run ends with."""
    with embedded_s3(home, "undisturbed") as store:
        return ending(store, train_alone(Workspace(store, home, 60, 0), "run", CONFIG, cifar10))


def ending(store: Store, checkpoint: CheckpointRef) -> str:
    return state_sha256(read_payload(store, checkpoint))


def train_through(workspace: Workspace, cifar10: DatasetRef, stop: int) -> CheckpointRef:
    """Train until `stop`, then to the end; what ends with a clear error is started again, as Prefect would."""
    stops = [stop]
    for _ in range(20):
        try:
            return train_alone(workspace, "run", CONFIG, cifar10, should_stop=lambda step: step in stops)
        except TrainingInterrupted:
            stops.clear()
        except StorageError as error:
            if workspace.store.url("") not in str(error):
                raise
    pytest.fail("still not trained after 20 starts")


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.usefixtures("in_parts")
def test_a_fault_at_any_kind_of_request_does_not_change_the_bits(
    name: str, proxy: Proxy, faulty: Workspace, workspace: Workspace, cifar10: DatasetRef, expected: str
) -> None:
    happened = {kind: proxy.plan(kind, FAULTS[name]) for kind in (*IN_PARTS, "other")}
    done = train_through(faulty, cifar10, stop=10)
    assert [kind for kind, event in happened.items() if not event.is_set()] == []
    assert ending(workspace.store, done) == expected
    record, _ = read_record(workspace.store, "run")
    assert [bad for _, bad in verify_checkpoints(workspace.store, record)] == [None] * len(record.checkpoints)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_the_put_of_a_small_payload_does_not_change_the_bits(
    name: str, proxy: Proxy, faulty: Workspace, workspace: Workspace, cifar10: DatasetRef, expected: str
) -> None:
    happened = proxy.plan("payload put", FAULTS[name])
    done = train_through(faulty, cifar10, stop=10)
    assert happened.is_set()
    assert ending(workspace.store, done) == expected


def test_a_run_that_diverges_keeps_the_checkpoint_that_is_on_its_way(
    proxy: Proxy, workspace: Workspace, cifar10: DatasetRef
) -> None:
    late = proxy.plan("payload put", faults.delay)
    with pytest.raises(TrainingDivergedError):
        train_alone(
            behind(proxy, workspace), "run", small_config(optimizer="sgd", lr=100, checkpoint_every_steps=1), cifar10
        )
    assert late.is_set()
    record, _ = read_record(workspace.store, "run")
    assert record.checkpoints


def test_a_writer_that_loses_the_response_to_its_commit_recognizes_its_own_write(
    proxy: Proxy, faulty: Workspace, workspace: Workspace, cifar10: DatasetRef, expected: str
) -> None:
    lost = proxy.plan("record put", faults.lose_response, skip=1, times=3)
    done = train_alone(faulty, "run", CONFIG, cifar10)
    assert lost.is_set()
    record, _ = read_record(workspace.store, "run")
    assert (record.lease.token, [event.what for event in record.events]) == (1, ["started"])
    assert ending(workspace.store, done) == expected


def test_training_goes_on_while_a_save_is_under_way(
    proxy: Proxy, workspace: Workspace, cifar10: DatasetRef, expected: str
) -> None:
    released = threading.Event()
    proxy.plan("payload put", faults.hold_until(released))

    def release_late(step: int) -> bool:
        if step == 30:
            assert not stored(workspace).checkpoints, "the first save did not wait"
            released.set()
        return False

    done = train_alone(behind(proxy, workspace), "run", CONFIG, cifar10, should_stop=release_late)
    saved = stored(workspace).checkpoints[-1]
    assert saved.metrics.skipped >= 6  # the boundaries at steps 8, 12, 16, 20, 24 and 28
    assert ending(workspace.store, done) == expected


def test_training_goes_on_without_saves_and_the_record_says_so(
    proxy: Proxy, workspace: Workspace, cifar10: DatasetRef, expected: str
) -> None:
    refused = proxy.plan("payload put", faults.refuse(507, "InsufficientStorage"), times=1)
    hurried = behind(proxy, workspace, save_retry_seconds=0)
    done = train_alone(hurried, "run", CONFIG, cifar10, should_stop=lambda step: step == 8 and not refused.wait(10))
    record = stored(workspace)
    assert [event.what for event in record.events] == ["started", "unprotected"]
    assert "InsufficientStorage" in record.events[1].detail
    assert record.checkpoints[-1].metrics.failed == 1
    assert ending(workspace.store, done) == expected


def test_a_save_that_fails_again_and_again_is_told_once_and_counted(
    proxy: Proxy, workspace: Workspace, cifar10: DatasetRef, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nightshift")
    refused = proxy.plan("payload put", faults.refuse(403, "AccessDenied"), times=3)

    def until_refused(step: int) -> bool:
        return step == 30 and not refused.wait(10)

    train_alone(behind(proxy, workspace, save_retry_seconds=0), "run", CONFIG, cifar10, should_stop=until_refused)
    told = [record.getMessage() for record in caplog.records if "could not be" in record.getMessage()]
    assert [message.partition(":")[0] for message in told] == [
        "a checkpoint could not be stored",
        "checkpoints are stored again; 3 could not be",
    ]


def test_a_run_whose_key_is_withdrawn_ends_within_its_lease_and_goes_on_under_another_to_the_same_bits(
    proxy: Proxy, workspace: Workspace, cifar10: DatasetRef, expected: str
) -> None:
    """Under the new key it is the same store, reached directly."""
    withdrawn = replace(behind(proxy, workspace, save_retry_seconds=0), lease_seconds=6)
    refused = threading.Event()

    def withdraw(step: int) -> bool:
        if step == 12:
            for kind in faults.KINDS:
                proxy.plan(kind, faults.refuse(403, "InvalidAccessKeyId"), times=10_000)
        return step > 12 and refused.wait(0.5)  # so slowly that the lease runs out in the training

    with pytest.raises(LeaseExpiredError, match="refuses the credentials"):
        train_alone(withdrawn, "run", CONFIG, cifar10, should_stop=withdraw)
    record = stored(workspace)
    assert (record.status, [event.what for event in record.events]) == ("running", ["started"])
    with pytest.raises(StorageDeniedError, match="Set AWS_ACCESS_KEY_ID"):
        train_alone(withdrawn, "run", CONFIG, cifar10)
    eventually(lambda: not is_live(stored(workspace).lease, workspace.store.now()))
    done = train_alone(workspace, "run", CONFIG, cifar10)
    assert [event.what for event in stored(workspace).events] == ["started", "interrupted", "resumed"]
    assert ending(workspace.store, done) == expected


def test_a_stop_while_nothing_can_be_stored_says_which_step_is_the_newest_that_is(
    proxy: Proxy, workspace: Workspace, cifar10: DatasetRef
) -> None:
    def stop(step: int) -> bool:
        if step == 12:
            proxy.plan("payload put", faults.refuse(507, "InsufficientStorage"), times=100)
        return step == 13

    hurried = behind(proxy, workspace, save_retry_seconds=0)
    with pytest.raises(TrainingInterrupted, match=r"step 13 of 40, which could not be saved .* step .* is the newest"):
        train_alone(hurried, "run", CONFIG, cifar10, should_stop=stop)


def test_a_server_killed_in_the_middle_of_a_run_does_not_end_it(
    workspace: Workspace, tmp_path: Path, cifar10: DatasetRef, expected: str
) -> None:
    def kill_server(step: int) -> bool:
        if step == 15:
            os.kill(int((tmp_path / "s3" / "server.pid").read_text().split()[2]), signal.SIGKILL)
        return False

    with embedded_s3(tmp_path) as store:  # its own: others use that of the tests
        done = train_alone(replace(workspace, store=store), "run", CONFIG, cifar10, should_stop=kill_server)
        assert ending(store, done) == expected


def stored(workspace: Workspace) -> RunRecord:
    return read_record(workspace.store, "run")[0]
