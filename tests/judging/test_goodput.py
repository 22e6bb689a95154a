"""Where a night's time went: the parts follow each other from schedule to verdict, whatever interrupts it."""

from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from nightshift.judging.goodput import Goodput, account
from nightshift.records import recovery
from nightshift.records.keys import payload_key
from nightshift.records.lease import Run
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import Checkpoint, CheckpointMetrics, Origin, read_record
from nightshift.storage.memory import MemoryStore
from nightshift.tracking.metrics import CheckpointLine, TrainingLine
from tests.records.test_lease import RESULT, spec

BEGAN = datetime(2026, 11, 25, 2, tzinfo=UTC)


class Night:
    """A run on a store whose clock the test sets: ten steps a second."""

    def __init__(self) -> None:
        self.now = self.scheduled = BEGAN
        self.store = MemoryStore(clock=lambda: self.now)
        self.seconds = 0.0

    def passes(self, seconds: float) -> datetime:
        self.now += timedelta(seconds=seconds)
        return self.now

    def attempt(self, trains: float, lost: float = 0.0, ends: str = "") -> None:
        """Wait 5 s for a worker, 7 s for the data and 3 s for the first step; train, save, and train in vain."""
        origin = Origin(scheduled_at=self.scheduled, began_at=self.passes(5))
        self.passes(7)
        try:
            with hold_run(self.store, replace(spec(), origin=origin), 600) as run:
                self.passes(3)
                run.trains()
                self.passes(trains)
                self.seconds += trains
                self.save(run)
                self.passes(lost)
                if ends:
                    self.passes(11)
                    run.end("finished", result=RESULT)
                    return
                run.update(lambda record: record)
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass

    def save(self, run: Run) -> None:
        step = round(10 * self.seconds)
        checkpoint = Checkpoint(
            step=step,
            epoch=0,
            key=payload_key(run.run_id, step, run.token),
            bytes=1,
            sha256="0" * 64,
            written_at=self.now,
            metrics=CheckpointMetrics(train_seconds=self.seconds),
        )
        run.update(lambda record: record.changed(checkpoints=[checkpoint]))

    def account(self, stall: float = 0.0) -> Goodput:
        common: dict[str, Any] = {"at": self.now, "epoch": 1}
        training = {"loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1, "images_per_second": 320.0}
        lines = [TrainingLine(step=10 * s, train_seconds=float(s), **training, **common) for s in range(1, 9)]
        saved = CheckpointLine(step=80, bytes=1, stall_seconds=stall, save_seconds=1.0, **common)
        found = account(read_record(self.store, "run")[0], [*lines, saved])
        assert found
        return found


def test_the_parts_of_an_undisturbed_night_are_its_wall_time() -> None:
    night = Night()
    night.attempt(trains=100, ends="finished")
    found = night.account(stall=2)
    assert asdict(found.parts) == {
        "waiting": 5,
        "data": 7,
        "start": 3,
        "training": 98,
        "stalls": 2,
        "replayed": 0,
        "evaluation": 11,
    }
    assert found.wall == 126
    assert found.goodput == pytest.approx(98 / 126)


def test_the_parts_of_a_night_that_was_interrupted_five_times_add_up_and_show_what_was_lost() -> None:
    night = Night()
    for number in range(5):
        night.attempt(trains=20, lost=0.3 * number)
        night.passes(60)
    night.attempt(trains=30, ends="finished")
    found = night.account()
    assert sum(asdict(found.parts).values()) == pytest.approx(found.wall)
    assert found.wall == (night.now - BEGAN).total_seconds()
    assert found.parts.replayed == pytest.approx(0.3 * 10)
    assert found.parts.training == pytest.approx(130)
    assert found.parts.waiting == pytest.approx(6 * 5 + 5 * 60)
    assert found.attempts == 6
    assert found.goodput == pytest.approx(130 / found.wall)
    assert sum(found.shares.values()) == pytest.approx(1)


def test_a_flow_run_that_waited_for_its_store_began_no_second_time() -> None:
    night = Night()
    night.attempt(trains=20)
    first = read_record(night.store, "run")[0]
    night.passes(30)
    with hold_run(night.store, replace(spec(), origin=first.origin), 600) as run:
        night.passes(2)
        run.trains()
        night.passes(10)
        night.seconds += 10
        night.save(run)
        run.end("finished", result=RESULT)
    found = night.account()
    assert sum(asdict(found.parts).values()) == pytest.approx(found.wall)
    assert (found.parts.waiting, found.parts.data) == (5 + 30, 7)
    assert found.parts.evaluation == 0


def test_the_time_after_a_night_that_did_not_finish_is_none_of_its_time() -> None:
    night = Night()
    night.attempt(trains=100)
    before = night.account()
    night.passes(24 * 3600)
    recovery.close(night.store, "run", "cancelled")
    assert night.account() == before
    assert before.wall == 5 + 7 + 3 + 100


def test_the_record_of_an_older_nightshift_has_no_account() -> None:
    night = Night()
    night.attempt(trains=5, ends="finished")
    record = read_record(night.store, "run")[0]
    assert account(record.changed(attempts=[]), []) is None


def test_steps_that_were_slow_for_a_while_are_no_goodput() -> None:
    """Ninety steps of 0.1 s and ten of 2 s: lines come every two seconds, so most of them are about the slow ones."""
    night = Night()
    night.attempt(trains=29, ends="finished")
    record = read_record(night.store, "run")[0]
    common: dict[str, Any] = {"at": night.now, "epoch": 1, "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}
    fast = [(step, step / 10) for step in range(0, 91, 20)] + [(90, 9.0)]
    slow = [(90 + number, 9.0 + 2 * number) for number in range(1, 11)]
    lines = [TrainingLine(step=step, train_seconds=at, images_per_second=1.0, **common) for step, at in fast + slow]
    checkpoint = record.checkpoints[0].changed(step=100)
    found = account(record.changed(checkpoints=[checkpoint]), lines)
    assert found
    assert found.goodput == pytest.approx(100 * 0.1 / found.wall)
