"""The run record: compare-and-swap, lease, fencing token."""

import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from nightshift.errors import (
    ConfigError,
    LeaseHeldError,
    LeaseLostError,
    PreconditionFailedError,
    ResumeMismatchError,
    RunNotFoundError,
    StorageUnreachableError,
    TrainingInterrupted,
)
from nightshift.records.keys import RECORDS
from nightshift.records.lease import Run, RunSpec
from nightshift.records.lease import acquire as acquire_run
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import RunRecord, list_records, read_record
from nightshift.refs import DatasetRef
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace
from tests.conftest import eventually, small_config

DATASET = DatasetRef(name="cifar10", digest="0" * 64, key="datasets/0/packed.safetensors", source="cache")


def spec(run_id: str = "run", environment: str = "x", **overrides: Any) -> RunSpec:
    return RunSpec(run_id, small_config(**overrides), DATASET, {"torch": environment}, 40)


def hold(store: S3, run_id: str = "run", lease_seconds: float = 60, **overrides: Any) -> AbstractContextManager[Run]:
    return hold_run(store, spec(run_id, **overrides), lease_seconds)


def acquire(store: S3, lease_seconds: float = 60) -> Run:
    """Take the lease and, unlike `hold`, do not renew it."""
    return acquire_run(store, spec(), lease_seconds)


def add_curve_point(record: RunRecord) -> RunRecord:
    point = {"epoch": 1.0}
    return record if point in record.curve else record.changed(curve=[*record.curve, point])


class FaultyS3(S3):
    """Injects a fault after the next write was committed: the response is lost on the way."""

    def __init__(self, inner: S3, fault: Exception) -> None:
        self.__dict__.update(inner.__dict__)
        self.fault: Exception | None = fault

    def put(self, key: str, body: bytes, **condition: Any) -> str:
        etag = super().put(key, body, **condition)
        if self.fault and key.startswith(RECORDS):
            fault, self.fault = self.fault, None
            raise fault
        return etag


def test_a_new_run_is_recorded_as_running_under_token_one(workspace: Workspace) -> None:
    with hold(workspace.store):
        record, _ = read_record(workspace.store, "run")
    assert (record.status, record.lease.token, record.events[0].what) == ("running", 1, "started")


def test_every_write_of_the_record_has_an_etag_of_its_own(workspace: Workspace) -> None:
    with hold(workspace.store) as run:
        etags = {run.update(lambda record: record).sequence: run._etag for _ in range(5)}
    assert len(set(etags.values())) == len(etags) == 5


def test_a_live_lease_is_refused_with_its_owner_and_its_expiry(workspace: Workspace) -> None:
    with hold(workspace.store) as run, pytest.raises(LeaseHeldError) as refused, hold(workspace.store):
        pass
    lease = run.record.lease
    assert lease.owner in str(refused.value)
    assert f"{lease.expires_at:%H:%M:%S}" in str(refused.value)


def test_an_expired_lease_is_taken_over_and_the_old_owner_can_write_no_more(workspace: Workspace) -> None:
    old = acquire(workspace.store, lease_seconds=1)
    eventually(lambda: workspace.store.now() > old.record.lease.expires_at)
    with hold(workspace.store) as new:
        before, _ = read_record(workspace.store, "run")
        with pytest.raises(LeaseLostError, match=new.record.lease.owner):
            old.update(add_curve_point)
        after, _ = read_record(workspace.store, "run")
    assert new.token == old.token + 1
    assert after == before


def test_of_many_that_want_an_expired_lease_exactly_one_gets_it(workspace: Workspace) -> None:
    acquire(workspace.store).end("interrupted")

    def attempt(_: int) -> Run | None:
        try:
            return acquire(workspace.store)
        except LeaseHeldError:
            return None

    with ThreadPoolExecutor(8) as pool:
        won = [run for run in pool.map(attempt, range(8)) if run]
    assert [run.token for run in won] == [2]


def test_a_run_whose_trainer_died_on_this_machine_is_taken_over_at_once(
    workspace: Workspace, home: Path, prefix: str
) -> None:
    script = (
        "import sys, pathlib; from nightshift.local.s3 import embedded_s3; from tests.records import test_lease\n"
        "with embedded_s3(pathlib.Path(sys.argv[1]), sys.argv[2]) as store:\n"
        "    test_lease.acquire(store, lease_seconds=3600); print('held', flush=True); input()"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", script, str(home), prefix], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "held\n"
    with pytest.raises(LeaseHeldError):
        acquire(workspace.store)
    trainer.send_signal(signal.SIGKILL)
    trainer.communicate()
    assert acquire(workspace.store).token == 2


def test_the_lease_is_renewed_while_the_run_is_held(workspace: Workspace) -> None:
    with hold(workspace.store, lease_seconds=6) as run:
        first = run.record.lease.expires_at
        eventually(lambda: workspace.store.now() > first)
        with pytest.raises(LeaseHeldError):
            acquire(workspace.store)
        run.check()


def test_nothing_is_written_under_a_lease_that_was_given_back(workspace: Workspace) -> None:
    run = acquire(workspace.store)
    run.end("interrupted")
    before = read_record(workspace.store, "run")
    with pytest.raises(LeaseLostError, match="given it back"):
        run.update(add_curve_point)
    assert read_record(workspace.store, "run") == before


def test_a_lease_that_cannot_be_renewed_stops_its_owner_before_another_may_take_it(workspace: Workspace) -> None:
    run = acquire(workspace.store, lease_seconds=6)
    run.store = DeadS3(workspace.store)
    with run.renewed(), pytest.raises(LeaseLostError, match=r"could not be renewed .* no answer"):
        eventually(lambda: run.check() is not None)
    assert workspace.store.now() < run.record.lease.expires_at


class DeadS3(S3):
    """Injects a store that no longer answers."""

    def __init__(self, inner: S3) -> None:
        self.__dict__.update(inner.__dict__)

    def put(self, key: str, body: bytes, **condition: Any) -> str:
        raise StorageUnreachableError("no answer")


def test_a_lost_response_is_recognized_as_ones_own_write(workspace: Workspace) -> None:
    with hold(workspace.store) as run:
        run.store = FaultyS3(workspace.store, PreconditionFailedError("a retry met its own write"))
        run.update(add_curve_point)
        record, _ = read_record(workspace.store, "run")
    assert record.curve == [{"epoch": 1.0}]


def test_after_a_write_of_unknown_fate_the_next_one_finds_out(workspace: Workspace) -> None:
    with hold(workspace.store) as run:
        run.store = FaultyS3(workspace.store, StorageUnreachableError("the response was lost"))
        with pytest.raises(StorageUnreachableError):
            run.update(add_curve_point)
        run.update(add_curve_point)
        record, _ = read_record(workspace.store, "run")
    assert record.curve == [{"epoch": 1.0}]


def test_a_lost_response_when_taking_the_lease_does_not_lock_the_owner_out(workspace: Workspace) -> None:
    store = FaultyS3(workspace.store, PreconditionFailedError("a retry met its own write"))
    assert acquire(store).token == 1


def test_two_threads_that_update_one_run_lose_nothing(workspace: Workspace) -> None:
    def add(number: int) -> Callable[[RunRecord], RunRecord]:
        return lambda record: record.changed(curve=[*record.curve, {"epoch": float(number)}])

    with hold(workspace.store) as run, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: run.update(add(number)), range(40)))
    record, _ = read_record(workspace.store, "run")
    assert sorted(point["epoch"] for point in record.curve) == list(range(40))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingInterrupted("stopped"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (ConfigError("bad"), "failed"),
    ],
)
def test_how_a_run_ended_is_recorded_and_its_lease_given_back(
    workspace: Workspace, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), hold(workspace.store):
        raise error
    record, _ = read_record(workspace.store, "run")
    assert record.status == status
    assert record.lease.expires_at <= workspace.store.now()
    assert acquire(workspace.store).token == 2


def test_another_config_is_refused_with_the_fields_named(workspace: Workspace) -> None:
    with hold(workspace.store) as run:
        run.end("interrupted")
    with pytest.raises(ResumeMismatchError) as refused, hold(workspace.store, lr=0.5, seed=3):
        pass
    assert "lr: stored 0.001, now 0.5" in str(refused.value)
    assert "seed: stored 0, now 3" in str(refused.value)
    assert "epochs" not in str(refused.value)


def test_fields_without_effect_on_the_result_may_change_on_resume(workspace: Workspace) -> None:
    with hold(workspace.store) as run:
        run.end("interrupted")
    with hold(workspace.store, keep_last=7, checkpoint_every_steps=5) as run:
        assert run.record.config["keep_last"] == 7


def test_a_changed_environment_is_recorded_by_name(workspace: Workspace) -> None:
    acquire(workspace.store).end("interrupted")
    run = acquire(workspace.store, spec(environment="9"), 60)
    assert run.record.events[-1].detail == "torch x → 9"


def test_a_run_that_does_not_exist_is_an_error_that_says_how_to_list_those_that_do(workspace: Workspace) -> None:
    with pytest.raises(RunNotFoundError, match="nightshift runs"):
        read_record(workspace.store, "nobody")


def test_runs_are_listed_newest_first(workspace: Workspace) -> None:
    for run_id in ("b", "d", "a", "c"):
        with hold(workspace.store, run_id):
            pass
    assert [record.run_id for record in list_records(workspace.store)] == ["c", "a", "d", "b"]
    assert [record.run_id for record in list_records(workspace.store, limit=2)] == ["c", "a"]
