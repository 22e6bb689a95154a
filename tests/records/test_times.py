"""What the records of former nights say of how long things take."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from nightshift.config.sections import BudgetConfig
from nightshift.records.keys import payload_key
from nightshift.records.lease import Run
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import Checkpoint, CheckpointMetrics, Origin, RunRecord, newest_records, read_record
from nightshift.records.times import Past, cost, due, judging_seconds, machine_seconds, past_of
from nightshift.storage.memory import MemoryStore
from tests.records.test_lease import RESULT, spec

BEGAN = datetime(2026, 11, 27, 2, tzinfo=UTC)
MACHINE = {"device": "cpu", "world_size": "1", "threads": "1"}


class Store(MemoryStore):
    """One whose clock is put ahead by the test."""

    def __init__(self) -> None:
        self.moment = BEGAN
        super().__init__(clock=lambda: self.moment)

    def passes(self, seconds: float) -> datetime:
        self.moment += timedelta(seconds=seconds)
        return self.moment

    def save(self, run: Run, step: int, train_seconds: float) -> None:
        checkpoint = Checkpoint(
            step=step,
            epoch=0,
            key=payload_key(run.run_id, step, run.token),
            bytes=1,
            sha256="0" * 64,
            written_at=self.now(),
            metrics=CheckpointMetrics(train_seconds=train_seconds),
        )
        run.update(lambda record: record.changed(checkpoints=[*record.checkpoints, checkpoint]))

    def night(self, run_id: str, judging: float, step_seconds: float = 1.0, **changed: Any) -> None:
        """A finished run of twenty steps."""
        overrides, origin = changed.pop("overrides", {}), Origin(promote=changed.pop("promote", True))
        wanted = replace(spec(run_id, **overrides), environment={**MACHINE, **changed}, origin=origin)
        with hold_run(self, wanted, 600) as run:
            self.passes(20 * step_seconds)
            self.save(run, 20, 20 * step_seconds)
            self.passes(judging)
            run.end("finished", result=RESULT)

    def tonight(self, **overrides: Any) -> RunRecord:
        with hold_run(self, replace(spec("tonight", **overrides), environment=MACHINE), 600):
            return read_record(self, "tonight")[0]

    def past(self, **overrides: Any) -> Past:
        ours = self.tonight(**overrides)
        return past_of(newest_records(self), ours)


def test_former_nights_tell_how_long_a_step_and_a_verdict_took() -> None:
    store = Store()
    assert store.past() == Past()
    for number in range(7):
        store.night(f"night-{number}", judging=100 + number, step_seconds=number + 1)
    assert store.past() == Past((106, 105, 104, 103, 102), 5)  # the last five; the median of their steps


def test_nights_of_another_network_data_set_machine_or_purpose_tell_nothing() -> None:
    store = Store()
    store.night("other-network", 1, overrides={"model": "quick_cnn"})
    store.night("other-machine", 2, device="NVIDIA H100")
    store.night("trial", 3, promote=False)
    with hold_run(store, replace(spec("unfinished"), environment=MACHINE), 600):
        pass
    assert store.past() == Past()


def test_nights_whose_steps_were_others_tell_of_the_verdict_only() -> None:
    store = Store()
    store.night("other-batches", 7, overrides={"batch_size": 64})
    store.night("other-seed", 8, step_seconds=3, overrides={"seed": 5, "epochs": 9})
    assert store.past() == Past((8, 7), 3)


def test_a_verdict_before_which_the_run_was_started_again_is_no_measure() -> None:
    store = Store()
    with hold_run(store, spec(), 600) as run:
        store.save(run, 20, 20)
    store.passes(3600)
    with hold_run(store, spec(), 600) as run:
        store.passes(50)
        run.end("finished", result=RESULT)
    assert judging_seconds(read_record(store, "run")[0]) is None


def test_a_night_costs_all_its_time_with_a_machine_and_one_of_an_older_nightshift_its_training() -> None:
    store = Store()
    store.night("run", judging=40)
    store.passes(24 * 3600)
    record = read_record(store, "run")[0]
    assert (cost(record, 3600), cost(record, 0), cost(record, None)) == (60, 0, None)
    assert cost(record.changed(attempts=[]), 3600) == 20


def test_hours_with_a_machine_begin_with_the_flow_and_leave_pauses_out() -> None:
    store = Store()
    origin = Origin(scheduled_at=BEGAN, began_at=store.passes(1000))
    store.passes(60)
    with hold_run(store, replace(spec(), origin=origin), 600) as run:
        store.passes(600)
        run.update(lambda record: record)
        store.passes(30)  # of which nobody heard
    store.passes(5000)
    later = Origin(scheduled_at=BEGAN, began_at=store.passes(10))
    store.passes(20)
    with hold_run(store, replace(spec(), origin=later), 600) as run:
        now = store.passes(100)
        assert machine_seconds(run.record, now) == 660 + 120
        budget = BudgetConfig(max_hours=1, max_cost=4, finish_by="2026-11-27T09:00+01:00")
        found = due(run.record, budget, 2.0, now)
        assert found
        assert (found.at, found.why) == (now + timedelta(seconds=3600 - 780), "budget.max_hours=1")
        found = due(run.record, budget, 100.0, now)
        assert found
        assert found.why == "budget.max_cost=4"
        found = due(run.record, BudgetConfig(finish_by="2026-11-27T09:00+01:00", max_hours=100), None, now)
        assert found
        assert found.at == datetime(2026, 11, 27, 8, tzinfo=UTC)
        assert due(run.record, BudgetConfig(), None, now) is None
