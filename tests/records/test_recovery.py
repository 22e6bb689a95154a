"""Interrupted runs are found, and each is started again once however many look for them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from nightshift.errors import (
    ExportError,
    LeaseLostError,
    ModelNotFoundError,
    PreconditionFailedError,
    StorageError,
    TrainingInterrupted,
)
from nightshift.records import champions, recovery
from nightshift.records.keys import RECORDS
from nightshift.records.run import Checkpoint, CheckpointMetrics, Origin, RunRecord, Status, read_record, write_record
from nightshift.refs import DatasetRef
from nightshift.storage.store import Store
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.conftest import small_config
from tests.records.test_lease import POINT, RESULT, acquire, hold
from tests.stores import Faulty, wait_until

A_DAY = timedelta(days=1)


def claimed(store: Store, max_recoveries: int = 20) -> list[str]:
    found = recovery.find(store, A_DAY)
    return [record.run_id for record in recovery.claim_due(store, found.interrupted, max_recoveries)]


def interrupt(store: Store, step: int = 0) -> None:
    """Take the run up, commit a checkpoint at `step`, and be stopped."""
    run = acquire(store)
    checkpoint = Checkpoint(
        step=step,
        epoch=0,
        key=f"checkpoints/run/{step}-{run.token}.pt",
        bytes=1,
        sha256="0" * 64,
        written_at=store.now(),
        metrics=CheckpointMetrics(train_seconds=1),
    )
    run.update(lambda record: record.changed(checkpoints=[*record.checkpoints, checkpoint] if step else []))
    run.end("interrupted")


def read(store: Store) -> RunRecord:
    return read_record(store, "run")[0]


def test_a_run_that_is_being_trained_is_live_and_not_started_again(store: Store) -> None:
    with hold(store):
        found = recovery.find(store, A_DAY)
        assert (found.live, found.interrupted) == (["run"], [])


def test_a_run_whose_lease_has_run_out_is_started_again(store: Store) -> None:
    run = acquire(store, lease_seconds=1)
    wait_until(store, run.record.lease.expires_at)
    assert claimed(store) == ["run"]
    assert [event.what for event in read(store).events] == ["started", "recovered"]


def test_a_run_that_stopped_a_moment_ago_is_started_again_though_its_clock_is_a_little_ahead(store: Store) -> None:
    """The store's is exact to a second."""
    interrupt(store, step=5)
    record, etag = read_record(store, "run")
    write_record(store, record.changed(updated_at=store.now() + timedelta(seconds=2)), etag)
    assert claimed(store) == ["run"]


def test_a_run_that_nobody_trains_any_more_is_shown_as_lost(
    workspace: Workspace, nightshift: Callable[..., Finished]
) -> None:
    run = acquire(workspace.store, lease_seconds=1)
    assert nightshift("runs", "--json").json["runs"][0]["status"] in ("running", "lost")
    wait_until(workspace.store, run.record.lease.expires_at)
    assert nightshift("runs", "--json").json["runs"][0]["status"] == "lost"
    assert nightshift("show", "run", "--json").json["status"] == "lost"
    assert "lost" in nightshift("runs").out
    assert "lost" in nightshift("show", "run").out


@pytest.mark.parametrize(
    ("status", "started"), [("interrupted", ["run"]), ("finished", []), ("failed", []), ("cancelled", [])]
)
def test_only_what_was_interrupted_is_started_again(store: Store, status: Status, started: list[str]) -> None:
    acquire(store).end(status, result=RESULT)
    assert claimed(store) == started


def test_of_many_recoverers_at_once_exactly_one_starts_the_run(store: Store) -> None:
    interrupt(store)
    found = recovery.find(store, A_DAY)

    def start(_: int) -> list[RunRecord]:
        return list(recovery.claim_due(store, found.interrupted, max_recoveries=20))

    with ThreadPoolExecutor(8) as pool:
        assert sum(len(started) for started in pool.map(start, range(8))) == 1
    assert len(read(store).recoveries) == 1


def test_a_claim_whose_response_is_lost_is_recognized_as_ones_own(store: Store) -> None:
    interrupt(store)
    losing = Faulty(store)
    losing.lose_response("put", PreconditionFailedError("a retry met its own write"), RECORDS)
    assert claimed(losing) == ["run"]
    assert not losing.planned
    assert len(read(store).recoveries) == 1


def test_a_run_that_makes_no_progress_is_started_again_after_longer_and_longer_pauses(store: Store) -> None:
    pauses = []
    interrupt(store)
    assert claimed(store) == ["run"]
    for _ in range(3):
        assert claimed(store) == []
        interrupted = recovery.find(store, A_DAY).interrupted[0]
        pauses.append(interrupted.due - interrupted.record.recoveries[-1].at)
        at_due = interrupted.record.with_event("recovered", interrupted.due, str(len(pauses)))
        write_record(store, at_due.changed(sequence=at_due.sequence + 1), interrupted.etag)
    assert pauses == [recovery.FIRST_PAUSE, 2 * recovery.FIRST_PAUSE, 4 * recovery.FIRST_PAUSE]


def test_a_run_that_has_made_progress_since_is_started_again_at_once(store: Store) -> None:
    for step in (5, 10, 15):
        interrupt(store, step)
        assert claimed(store) == ["run"]


def test_after_max_recoveries_a_run_is_given_up(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 10):
        interrupt(store, step)
        assert claimed(store, max_recoveries=2) == ["run"]
    interrupt(store, 15)
    assert claimed(store, max_recoveries=2) == []
    assert "given up" in caplog.text


def test_only_the_records_that_changed_lately_are_read(store: Store) -> None:
    for run_id in ("a", "b", "c"):
        with hold(store, run_id):
            pass
    old = max(item.modified for item in store.list(RECORDS))
    wait_until(store, old + timedelta(seconds=2))
    interrupt(store)
    counting = Faulty(store)
    found = recovery.find(counting, counting.now() - old - timedelta(seconds=1))
    assert (counting.calls["list", "runs"], counting.calls["get", "runs"]) == (1, 1)
    assert [run.record.run_id for run in found.interrupted] == ["run"]


def test_a_trainer_notices_nothing_of_a_recoverer_that_was_mistaken(store: Store) -> None:
    with hold(store) as run:
        mistaken = recovery.InterruptedRun(*read_record(store, "run"))
        assert list(recovery.claim_due(store, [mistaken], max_recoveries=20))
        run.update(lambda record: record.changed(curve=[POINT]))
        run.check()
    assert (len(read(store).recoveries), len(read(store).curve)) == (1, 1)


def test_recover_goes_on_with_an_interrupted_run_to_its_end(
    nightshift: Callable[..., Finished], workspace: Workspace, prefect_api: str, cifar10: DatasetRef
) -> None:
    trial = Origin(promote=False)
    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, "run", small_config(), cifar10, trial, should_stop=lambda step: step == 30)
    only_shown = nightshift("recover", "--dry-run", "--json").json
    assert only_shown == {"interrupted": ["run"], "live": []}
    recovered = nightshift("recover", "--json")
    assert (recovered.exit_code, recovered.json) == (0, {"started": ["run"], "failed": [], "live": []}), recovered.err
    assert (read(workspace.store).status, read(workspace.store).resumed_from_step) == ("finished", 30)
    assert read(workspace.store).origin.promote is False
    with pytest.raises(ModelNotFoundError, match="no champion"):  # the gate is not asked of a trial
        champions.read_champion(workspace.store, "cifar10")
    assert nightshift("recover", "--json").json == {"started": [], "failed": [], "live": []}


def test_an_error_that_will_always_come_fails_the_run_and_one_that_can_pass_does_not(store: Store) -> None:
    """After training, an ExportError left the record running: it was started again 20 times."""
    for run_id, error, status in (
        ("export", ExportError("a lambda cannot be exported"), "failed"),
        ("bug", KeyError("bug"), "failed"),
        ("outage", StorageError("503"), "running"),
        ("stop", LeaseLostError("taken over"), "running"),
    ):
        with hold(store, run_id):
            pass  # trained: evaluation and publication are still to come
        with pytest.raises(type(error)), recovery.closed_if_it_fails(store, run_id):
            raise error
        record, _ = read_record(store, run_id)
        assert (run_id, record.status) == (run_id, status)
        assert (record.events[-1].detail == str(error)) == (status == "failed")
