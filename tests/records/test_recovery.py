"""Interrupted runs are found, and each is started again once however many look for them."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest

from nightshift.errors import ModelNotFoundError, TrainingInterrupted
from nightshift.records import champions, recovery
from nightshift.records.keys import RECORDS
from nightshift.records.run import Checkpoint, Origin, RunRecord, Status, read_record, write_record
from nightshift.refs import DatasetRef
from nightshift.storage.s3 import S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import Finished, eventually, small_config
from tests.faults import proxy as faults
from tests.faults.test_faults import behind
from tests.records.test_lease import acquire, hold

A_DAY = timedelta(days=1)


def claimed(store: S3, max_recoveries: int = 20) -> list[str]:
    found = recovery.find(store, A_DAY)
    return [record.run_id for record in recovery.claims(store, found.interrupted, max_recoveries)]


def interrupt(store: S3, step: int = 0) -> None:
    """Take the run up, commit a checkpoint at `step`, and be stopped."""
    run = acquire(store)
    checkpoint = Checkpoint(
        step=step,
        epoch=0,
        key=f"checkpoints/run/{step}-{run.token}.pt",
        bytes=1,
        sha256="0" * 64,
        written_at=store.now(),
        metrics={"train_seconds": 1.0},
    )
    run.update(lambda record: record.changed(checkpoints=[*record.checkpoints, checkpoint] if step else []))
    run.end("interrupted")


def read(store: S3) -> RunRecord:
    return read_record(store, "run")[0]


def test_a_run_that_is_being_trained_is_live_and_not_started_again(workspace: Workspace) -> None:
    with hold(workspace.store):
        found = recovery.find(workspace.store, A_DAY)
        assert (found.live, found.interrupted) == (["run"], [])


def test_a_run_whose_lease_has_run_out_is_started_again(workspace: Workspace) -> None:
    run = acquire(workspace.store, lease_seconds=1)
    eventually(lambda: workspace.store.now() > run.record.lease.expires_at)
    assert claimed(workspace.store) == ["run"]
    assert [event.what for event in read(workspace.store).events] == ["started", "recovered"]


@pytest.mark.parametrize(
    ("status", "started"), [("interrupted", ["run"]), ("finished", []), ("failed", []), ("cancelled", [])]
)
def test_only_what_was_interrupted_is_started_again(workspace: Workspace, status: Status, started: list[str]) -> None:
    acquire(workspace.store).end(status)
    assert claimed(workspace.store) == started


def test_of_many_recoverers_at_once_exactly_one_starts_the_run(workspace: Workspace) -> None:
    interrupt(workspace.store)
    found = recovery.find(workspace.store, A_DAY)

    def start(_: int) -> list[RunRecord]:
        return list(recovery.claims(workspace.store, found.interrupted, max_recoveries=20))

    with ThreadPoolExecutor(8) as pool:
        assert sum(len(started) for started in pool.map(start, range(8))) == 1
    assert len(read(workspace.store).recoveries) == 1


def test_a_claim_whose_response_is_lost_is_recognized_as_ones_own(workspace: Workspace) -> None:
    interrupt(workspace.store)
    with faults.running(workspace.store.endpoint) as proxy:
        lost = proxy.plan("record put", faults.lose_response)
        assert claimed(behind(proxy, workspace).store) == ["run"]
    assert lost.is_set()


def test_a_run_that_makes_no_progress_is_started_again_after_longer_and_longer_pauses(workspace: Workspace) -> None:
    pauses = []
    interrupt(workspace.store)
    assert claimed(workspace.store) == ["run"]
    for _ in range(3):
        assert claimed(workspace.store) == []
        interrupted = recovery.find(workspace.store, A_DAY).interrupted[0]
        pauses.append(interrupted.due - interrupted.record.recoveries[-1].at)
        at_due = interrupted.record.with_event("recovered", interrupted.due, str(len(pauses)))
        write_record(workspace.store, at_due.changed(sequence=at_due.sequence + 1))
    assert pauses == [recovery.FIRST_PAUSE, 2 * recovery.FIRST_PAUSE, 4 * recovery.FIRST_PAUSE]


def test_a_run_that_has_made_progress_since_is_started_again_at_once(workspace: Workspace) -> None:
    for step in (5, 10, 15):
        interrupt(workspace.store, step)
        assert claimed(workspace.store) == ["run"]


def test_after_max_recoveries_a_run_is_given_up(workspace: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    for step in (5, 10):
        interrupt(workspace.store, step)
        assert claimed(workspace.store, max_recoveries=2) == ["run"]
    interrupt(workspace.store, 15)
    assert claimed(workspace.store, max_recoveries=2) == []
    assert "given up" in caplog.text


def test_only_the_records_that_changed_lately_are_read(workspace: Workspace) -> None:
    for run_id in ("a", "b", "c"):
        with hold(workspace.store, run_id):
            pass
    old = max(item.modified for item in workspace.store.list(RECORDS))
    eventually(lambda: workspace.store.now() > old + timedelta(seconds=2))
    interrupt(workspace.store)
    with faults.running(workspace.store.endpoint) as proxy:
        store = behind(proxy, workspace).store
        lists_before = proxy.requests["list"] + len([store.now()])  # a new client asks for the time by a listing
        found = recovery.find(store, store.now() - old - timedelta(seconds=1))
        assert (proxy.requests["list"] - lists_before, proxy.requests["record get"]) == (1, 1)
    assert [run.record.run_id for run in found.interrupted] == ["run"]


def test_a_trainer_notices_nothing_of_a_recoverer_that_was_mistaken(workspace: Workspace) -> None:
    with hold(workspace.store) as run:
        mistaken = recovery.InterruptedRun(*read_record(workspace.store, "run"))
        assert list(recovery.claims(workspace.store, [mistaken], max_recoveries=20))
        run.update(lambda record: record.changed(curve=[{"epoch": 1.0}]))
        run.check()
    assert (len(read(workspace.store).recoveries), len(read(workspace.store).curve)) == (1, 1)


def test_recover_goes_on_with_an_interrupted_run_to_its_end(
    nightshift: Callable[..., Finished], workspace: Workspace, prefect_api: str, cifar10: DatasetRef
) -> None:
    trial = Origin(promote=False)
    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, "run", small_config(), cifar10, trial, should_stop=lambda step: step == 30)
    recovered = nightshift("recover", "--json")
    assert (recovered.exit_code, recovered.json) == (0, {"started": ["run"], "live": []}), recovered.err
    assert (read(workspace.store).status, read(workspace.store).resumed_from_step) == ("finished", 30)
    assert read(workspace.store).origin.promote is False
    with pytest.raises(ModelNotFoundError, match="no champion"):  # the gate is not asked of a trial
        champions.read_champion(workspace.store, "cifar10")
    assert nightshift("recover", "--json").json == {"started": [], "live": []}
