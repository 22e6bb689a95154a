"""The run record: compare-and-swap, lease, fencing token."""

import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from nightshift.errors import (
    ConfigError,
    DocumentDamagedError,
    LeaseHeldError,
    LeaseLostError,
    PreconditionFailedError,
    ResumeMismatchError,
    RunNotFoundError,
    StorageUnreachableError,
    TrainingInterrupted,
)
from nightshift.records.curve import CurvePoint
from nightshift.records.index import overviews
from nightshift.records.keys import RECORDS
from nightshift.records.lease import Run, RunSpec
from nightshift.records.lease import acquire as acquire_run
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import Origin, Result, RunRecord, newest_records, read_record
from nightshift.refs import DatasetRef
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from nightshift.workspace import Workspace
from tests.conftest import eventually, small_config
from tests.stores import Clock, Faulty, memory_store, wait_until

DATASET = DatasetRef(name="cifar10", digest="0" * 64, key="datasets/0/packed.safetensors", source="cache")


def spec(run_id: str = "run", environment: str = "x", **overrides: Any) -> RunSpec:
    return RunSpec(run_id, small_config(**overrides), DATASET, {"torch": environment}, 40)


def hold(store: Store, run_id: str = "run", lease_seconds: float = 60, **overrides: Any) -> AbstractContextManager[Run]:
    return hold_run(store, spec(run_id, **overrides), lease_seconds)


def acquire(store: Store, lease_seconds: float = 60) -> Run:
    """Take the lease and, unlike `hold`, do not renew it."""
    return acquire_run(store, spec(), lease_seconds)


POINT = CurvePoint(epoch=1, step=20, loss=1.0, accuracy=0.5)
RESULT = Result(test_accuracy=0.5, test_loss=1.0, weights_sha256="0" * 64, model="models/cifar10/run/")


def add_curve_point(record: RunRecord) -> RunRecord:
    point = POINT
    return record if point in record.curve else record.changed(curve=[*record.curve, point])


def losing(store: Store, error: Exception) -> Any:
    """A store that writes the next record and raises this: the response is lost on the way."""
    faulty = Faulty(store)
    faulty.lose_response("put", error, RECORDS)
    return faulty


def check_forever(run: Run) -> None:
    while True:
        run.check()
        time.sleep(0.01)


def short_lease(store: Store) -> float:
    """Seconds: a server's clock is known to a second, which has to be less than the sixth its holder leaves."""
    return 0.6 if isinstance(store, MemoryStore) else 6


def test_a_new_run_is_recorded_as_running_under_token_one(store: Store) -> None:
    with hold(store):
        record, _ = read_record(store, "run")
    assert (record.status, record.lease.token, record.events[0].what) == ("running", 1, "started")


def test_every_write_of_the_record_has_an_etag_of_its_own(store: Store) -> None:
    with hold(store) as run:
        etags = {run.update(lambda record: record).sequence: run._etag for _ in range(5)}
    assert len(set(etags.values())) == len(etags) == 5


def test_a_live_lease_is_refused_with_its_owner_and_its_expiry(store: Store) -> None:
    with hold(store) as run, pytest.raises(LeaseHeldError) as refused, hold(store):
        pass
    lease = run.record.lease
    assert lease.owner in str(refused.value)
    assert f"{lease.expires_at:%H:%M:%S}" in str(refused.value)


def test_an_expired_lease_is_taken_over_and_the_old_owner_can_write_no_more(store: Store) -> None:
    old = acquire(store, lease_seconds=1)
    wait_until(store, old.record.lease.expires_at)
    with hold(store) as new:
        before, _ = read_record(store, "run")
        with pytest.raises(LeaseLostError, match=new.record.lease.owner):
            old.update(add_curve_point)
        after, _ = read_record(store, "run")
    assert new.token == old.token + 1
    assert after == before


def test_of_many_that_want_an_expired_lease_exactly_one_gets_it(store: Store) -> None:
    acquire(store).end("interrupted")

    def attempt(_: int) -> Run | None:
        try:
            return acquire(store)
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


def test_the_lease_is_renewed_while_the_run_is_held(store: Store) -> None:
    with hold(store, lease_seconds=short_lease(store)) as run:
        first = run.record.lease.expires_at
        eventually(lambda: store.now() > first)
        with pytest.raises(LeaseHeldError):
            acquire(store)
        run.check()


def test_nothing_is_written_under_a_lease_that_was_given_back(store: Store) -> None:
    run = acquire(store)
    run.end("interrupted")
    before = read_record(store, "run")
    with pytest.raises(LeaseLostError, match="given it back"):
        run.update(add_curve_point)
    assert read_record(store, "run") == before


def test_a_lease_that_cannot_be_renewed_stops_its_owner_before_another_may_take_it(store: Store) -> None:
    run = acquire(store, lease_seconds=short_lease(store))
    run.store = unwritable = Faulty(store)
    unwritable.fail("put", StorageUnreachableError("no answer"), times=math.inf)
    with run.renewed(), pytest.raises(LeaseLostError, match=r"could not be renewed .* no answer"):
        check_forever(run)
    assert store.now() < run.record.lease.expires_at


def expire(run: Run, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Let the store take nothing from this run until its lease is no longer good."""
    store, run.store = run.store, Faulty(run.store)
    run.store.fail("put", StorageUnreachableError("no answer"), times=math.inf)
    try:
        eventually(lambda: run._renewal_failure is not None)
        check_forever(run)
    finally:
        meanwhile()
        run.store = store


def test_why_a_lease_expired_is_recorded_when_the_store_answers_again(store: Store) -> None:
    with pytest.raises(LeaseLostError), hold(store, lease_seconds=short_lease(store)) as run:
        expire(run)
    record, _ = read_record(store, "run")
    assert record.status == "interrupted"
    assert "no answer" in record.events[-1].detail


def test_an_expired_owner_neither_writes_over_the_one_who_has_taken_the_run_over_nor_tries_again(store: Store) -> None:
    taken: list[RunRecord] = []

    def take_over() -> None:
        wait_until(store, run.record.lease.expires_at)
        taken.append(acquire_run(store, replace(spec(), process="another process"), 60).record)

    with (
        pytest.raises(LeaseLostError, match="was taken over by") as lost,
        hold(store, lease_seconds=short_lease(store)) as run,
    ):
        expire(run, take_over)
    assert not lost.value.transient
    assert [read_record(store, "run")[0]] == taken


def test_a_run_that_was_resumed_by_hand_is_no_longer_one_of_its_deployment(store: Store) -> None:
    nightly = Origin(flow_run_id="5a3c3c9e-5f0a-4d0c-8f53-0d6e6b1f9d11", deployment="train-cifar/nightly")
    acquire_run(store, replace(spec(), origin=nightly), 60).end("cancelled")
    assert acquire(store).record.origin.deployment is None


def test_a_lost_response_is_recognized_as_ones_own_write(store: Store) -> None:
    with hold(store) as run:
        run.store = losing(store, PreconditionFailedError("a retry met its own write"))
        run.update(add_curve_point)
        record, _ = read_record(store, "run")
    assert record.curve == [POINT]


def test_after_a_write_of_unknown_fate_the_next_one_finds_out(store: Store) -> None:
    with hold(store) as run:
        run.store = losing(store, StorageUnreachableError("the response was lost"))
        with pytest.raises(StorageUnreachableError):
            run.update(add_curve_point)
        run.update(add_curve_point)
        record, _ = read_record(store, "run")
    assert record.curve == [POINT]


def test_a_lost_response_when_taking_the_lease_does_not_lock_the_owner_out(store: Store) -> None:
    assert acquire(losing(store, PreconditionFailedError("a retry met its own write"))).token == 1


def test_a_trainer_whose_record_was_deleted_stops_and_does_not_write_it_anew(store: Store) -> None:
    run = acquire(store)
    store.delete("runs/run.json")
    with pytest.raises(LeaseLostError, match="deleted"):
        run.update(add_curve_point)
    with pytest.raises(LeaseLostError, match="deleted"):
        run.check()
    assert store.head("runs/run.json") is None


def test_a_damaged_record_is_neither_believed_nor_overwritten(store: Store) -> None:
    acquire(store).end("interrupted")
    body = store.get("runs/run.json")[0].replace(b'"token": 1', b'"token": 7')
    store.put("runs/run.json", body)
    with pytest.raises(DocumentDamagedError, match=r"runs/run\.json is damaged, or not a run record: .* run id$"):
        acquire(store)
    assert store.get("runs/run.json")[0] == body


def test_two_threads_that_update_one_run_lose_nothing(store: Store) -> None:
    def add(number: int) -> Callable[[RunRecord], RunRecord]:
        return lambda record: record.changed(curve=[*record.curve, POINT.changed(epoch=number)])

    with hold(store) as run, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: run.update(add(number)), range(40)))
    record, _ = read_record(store, "run")
    assert sorted(point.epoch for point in record.curve) == list(range(40))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TrainingInterrupted("stopped"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (ConfigError("bad"), "failed"),
    ],
)
def test_how_a_run_ended_is_recorded_and_its_lease_given_back(store: Store, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)), hold(store):
        raise error
    record, _ = read_record(store, "run")
    assert record.status == status
    assert record.lease.expires_at <= store.now()
    assert acquire(store).token == 2


def test_a_lease_that_was_given_back_is_free_to_a_process_whose_clock_is_half_a_second_behind() -> None:
    store = memory_store()
    with suppress(TrainingInterrupted), hold(store):
        raise TrainingInterrupted("stop")
    store.clock = Clock(timedelta(seconds=-0.5))
    assert acquire_run(store, replace(spec(), process="another process"), 60).record.lease.token == 2


def test_another_config_is_refused_with_the_fields_named(store: Store) -> None:
    with hold(store) as run:
        run.end("interrupted")
    with pytest.raises(ResumeMismatchError) as refused, hold(store, lr=0.5, seed=3):
        pass
    assert "lr: stored 0.001, now 0.5" in str(refused.value)
    assert "seed: stored 0, now 3" in str(refused.value)
    assert "epochs" not in str(refused.value)


def test_fields_without_effect_on_the_result_may_change_on_resume(store: Store) -> None:
    with hold(store) as run:
        run.end("interrupted")
    with hold(store, keep_last=7, checkpoint_every_steps=5) as run:
        assert run.record.train_config().saving.keep_last == 7


def test_a_changed_environment_is_recorded_by_name(store: Store) -> None:
    acquire(store).end("interrupted")
    run = acquire_run(store, spec(environment="9"), 60)
    assert run.record.events[-1].detail == "torch x → 9"


def test_a_run_that_does_not_exist_is_an_error_that_says_how_to_list_those_that_do(store: Store) -> None:
    with pytest.raises(RunNotFoundError, match="nightshift runs"):
        read_record(store, "nobody")


def test_runs_are_listed_newest_first(store: Store) -> None:
    for run_id in ("b", "d", "a", "c"):
        with hold(store, run_id):
            pass
    assert [record.run_id for record in newest_records(store)] == ["c", "a", "d", "b"]
    assert [run.run_id for run in overviews(store, limit=2)] == ["c", "a"]
