"""Training ends by the clock, early enough for the verdict: with a step that the record names before it is saved."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from nightshift.checkpoints.payload import read_payload
from nightshift.config.train import TrainConfig
from nightshift.data.batches import make_plan
from nightshift.data.datasets import open_dataset
from nightshift.errors import ConfigError, NoTimeError, PreconditionFailedError, StorageError, TrainingInterrupted
from nightshift.judging import evaluation
from nightshift.judging.report import build_report
from nightshift.publishing.publish import publish_model
from nightshift.records.curve import best_of
from nightshift.records.keys import RECORDS
from nightshift.records.lease import Run
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import RunRecord, read_record
from nightshift.records.times import Due, Past
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.storage.memory import MemoryStore
from nightshift.training.clock import Clock
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests import made_up
from tests.bits import state_sha256
from tests.records.test_lease import spec
from tests.stores import Clock as StoreClock
from tests.stores import Faulty
from tests.training import choices

EPOCH, ALL = 6, 18
"""Steps."""


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return replace(made_up.in_memory(tmp_path / "home"), save_retry_seconds=0)


@pytest.fixture
def dataset(workspace: Workspace) -> DatasetRef:
    return made_up.known(workspace, 32, 4)


def put_ahead(workspace: Workspace, by: timedelta) -> None:
    assert isinstance(workspace.store, MemoryStore)
    assert isinstance(workspace.store.clock, StoreClock)
    workspace.store.clock.ahead += by


def in_an_hour(**overrides: Any) -> TrainConfig:
    due = datetime.now(UTC) + timedelta(hours=1)
    return made_up.config_of(finish_by=due.isoformat(), **overrides)


def time_is_up_at(workspace: Workspace, step: int) -> Callable[[int], bool]:
    """An hour passes during this step."""

    def should_stop(done: int) -> bool:
        if done == step:
            put_ahead(workspace, timedelta(hours=1))
        return False

    return should_stop


def record_of(workspace: Workspace, run_id: str = "run") -> RunRecord:
    return read_record(workspace.store, run_id)[0]


def state_of(workspace: Workspace, checkpoint: CheckpointRef) -> str:
    return state_sha256(read_payload(workspace.store, checkpoint))


def stopped_at(workspace: Workspace, config: TrainConfig, dataset: DatasetRef, step: int) -> str:
    """The state of a run without a budget after this step."""
    free = config.override({"finish_by": "none", "max_hours": "none"})
    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, f"to-{step}", free, dataset, should_stop=lambda done: done == step)
    checkpoint = record_of(workspace, f"to-{step}").checkpoints[-1]
    return state_sha256(read_payload(workspace.store, checkpoint))


@pytest.mark.parametrize("step", [EPOCH, EPOCH + 2])
def test_training_ends_at_the_step_at_which_the_time_is_up_and_what_is_there_is_tested_and_published(
    workspace: Workspace, dataset: DatasetRef, step: int
) -> None:
    config = in_an_hour(epochs=3)
    done = train_alone(workspace, "run", config, dataset, should_stop=time_is_up_at(workspace, step))
    record = record_of(workspace)
    assert (done.step, record.last_step, record.step, record.status) == (step, step, step, "running")
    assert state_of(workspace, done) == stopped_at(workspace, config, dataset, step)
    (event,) = [event for event in record.events if event.what == "clock"]
    assert (event.step, event.detail) == (step, done.clock)
    assert event.detail.startswith(f"after step {step} of {ALL}: the verdict is due by ")
    assert "budget.finish_by=" in event.detail
    tested = evaluation.evaluate(workspace, done, dataset)
    publish_model(workspace, done, dataset, tested)
    report = build_report(workspace, record, None, None)
    assert all("The clock has ended the training after step" in page for page in (report.markdown, report.html))
    assert record.summary()["last_step"] == step


def test_the_last_step_of_all_is_no_decision_of_the_clock(workspace: Workspace, dataset: DatasetRef) -> None:
    done = train_alone(workspace, "run", in_an_hour(), dataset, should_stop=time_is_up_at(workspace, ALL))
    record = record_of(workspace)
    assert (done.step, record.last_step, record.clock, done.clock) == (ALL, None, "", "")


def test_a_budget_that_is_not_used_up_changes_no_bit(workspace: Workspace, dataset: DatasetRef) -> None:
    with_one = train_alone(workspace, "with", in_an_hour(), dataset)
    without = train_alone(workspace, "without", made_up.config_of(), dataset)
    assert state_of(workspace, with_one) == state_of(workspace, without)


def test_what_the_clock_has_decided_stands_however_much_time_there_is_later(
    workspace: Workspace, dataset: DatasetRef
) -> None:
    config, step = in_an_hour(checkpoint_every_steps=4), EPOCH + 3
    failing = Faulty(workspace.store)
    # Decided and recorded; then the last step cannot be saved.
    failing.fail("upload", StorageError("no"), f"checkpoints/run/{step}-", times=100)
    with pytest.raises(StorageError):
        train_alone(
            replace(workspace, store=failing), "run", config, dataset, should_stop=time_is_up_at(workspace, step)
        )
    assert record_of(workspace).last_step == step
    assert 0 < record_of(workspace).step < step
    free = config.override({"finish_by": "none"})
    done = train_alone(workspace, "run", free, dataset)
    assert (done.step, record_of(workspace).last_step) == (step, step)
    assert state_of(workspace, done) == stopped_at(workspace, config, dataset, step)
    again = train_alone(workspace, "run", free, dataset)
    assert (again.key, again.clock) == (done.key, record_of(workspace).clock)


def test_nothing_is_made_of_a_decision_that_could_not_be_recorded(workspace: Workspace, dataset: DatasetRef) -> None:
    config, step = in_an_hour(), EPOCH + 3
    failing = Faulty(workspace.store)

    def should_stop(done: int) -> bool:
        if done == step:
            put_ahead(workspace, timedelta(hours=1))
            failing.fail("put", StorageError("no"), RECORDS, times=1)
        return False

    with pytest.raises(StorageError):
        train_alone(replace(workspace, store=failing), "run", config, dataset, should_stop=should_stop)
    assert (record_of(workspace).last_step, record_of(workspace).status) == (None, "interrupted")


def test_a_decision_of_which_no_answer_came_is_recorded_once(workspace: Workspace, dataset: DatasetRef) -> None:
    config, step = in_an_hour(), EPOCH + 3
    failing = Faulty(workspace.store)

    def should_stop(done: int) -> bool:
        if done == step:
            put_ahead(workspace, timedelta(hours=1))
            failing.lose_response("put", PreconditionFailedError("it is there already"), RECORDS)
        return False

    train_alone(replace(workspace, store=failing), "run", config, dataset, should_stop=should_stop)
    record = record_of(workspace)
    assert (record.last_step, [event.what for event in record.events]) == (step, ["started", "clock"])


def test_a_run_that_is_resumed_after_its_time_ends_with_what_was_saved(
    workspace: Workspace, dataset: DatasetRef
) -> None:
    config = in_an_hour()
    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, "run", config, dataset, should_stop=lambda done: done == 4)
    put_ahead(workspace, timedelta(hours=9))
    done = train_alone(workspace, "run", config, dataset)
    assert (done.step, record_of(workspace).last_step) == (4, 4)


def test_the_best_epoch_is_kept_of_those_that_the_clock_has_left(workspace: Workspace, tmp_path: Path) -> None:
    photos, config = choices.images(workspace, tmp_path / "photos"), choices.config(epochs=6)
    timed = config.override({"finish_by": (datetime.now(UTC) + timedelta(hours=1)).isoformat()})
    chosen = train_alone(workspace, "run", timed, photos, should_stop=time_is_up_at(workspace, 18))
    record = record_of(workspace)
    best = best_of(record.curve, config.evaluation)
    assert best
    assert (record.last_step, record.step, len(record.curve)) == (18, 18, 4)  # four steps an epoch
    assert (chosen.step, chosen.epoch) == (best.step, best.epoch)


@pytest.mark.parametrize("minutes", [-1, 0, 1])
def test_a_run_without_time_for_a_single_epoch_says_so_before_its_first_step(
    workspace: Workspace, dataset: DatasetRef, minutes: float
) -> None:
    due, steps = datetime.now(UTC) + timedelta(minutes=minutes), []
    config = made_up.config_of(finish_by=due.isoformat())
    with pytest.raises(NoTimeError, match=r"^there is no time for a single epoch: .* --set finish_by=none$"):
        train_alone(workspace, "run", config, dataset, should_stop=lambda step: bool(steps.append(step)))  # type: ignore[func-returns-value]
    assert (steps, record_of(workspace).status) == ([], "failed")
    done = train_alone(workspace, "run", config.override({"finish_by": "none"}), dataset)
    assert done.step == ALL


def test_hours_are_those_with_a_machine_and_not_those_between_two_attempts(
    workspace: Workspace, dataset: DatasetRef
) -> None:
    config = made_up.config_of(max_hours=2)

    def stop_after_an_hour(step: int) -> bool:
        if step == 7:
            put_ahead(workspace, timedelta(hours=1))
        return step == 7

    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, "run", config, dataset, should_stop=stop_after_an_hour)
    put_ahead(workspace, timedelta(hours=5))
    done = train_alone(workspace, "run", config, dataset, should_stop=time_is_up_at(workspace, 9))
    assert (done.step, record_of(workspace).last_step) == (9, 9)


def test_money_is_hours_by_the_price(workspace: Workspace, dataset: DatasetRef) -> None:
    config = made_up.config_of(max_cost=3)
    with pytest.raises(ConfigError, match=r"budget.max_cost=3 needs .* set NIGHTSHIFT_PRICE_PER_HOUR$"):
        train_alone(workspace, "run", config, dataset)
    free = replace(workspace, price_per_hour=0.0)
    assert train_alone(free, "free", config, dataset, should_stop=time_is_up_at(workspace, 9)).step == ALL
    priced = replace(workspace, price_per_hour=3.0)
    assert train_alone(priced, "run", config, dataset, should_stop=time_is_up_at(workspace, 9)).step == 9
    assert "budget.max_cost=3" in record_of(workspace).clock


class Night:
    """A clock in a night of which the test says how long each step takes: 100 steps an epoch, ten epochs."""

    def __init__(self, held: Run, dataset: Any, due_in: float, past: Past | None = None, **overrides: Any) -> None:
        config = made_up.config_of(**overrides)
        plan = replace(make_plan(config, dataset), images=1600, epochs=10)
        assert plan.steps_per_epoch == 100
        self.store, self.seconds = held.store, 0.0
        due = Due(held.store.now() + timedelta(seconds=due_in), "budget.max_hours=1")
        self.clock = Clock(held, config, plan, due, past or Past(), 1000, 0, seconds=lambda: self.seconds)
        self.clock.reason(0)

    def trains(self, seconds: Callable[[int], float]) -> int:
        """The step after which the clock ends the training, each of which takes as long as the function says."""
        for step in range(1, 1001):
            self.seconds += seconds(step)
            assert isinstance(self.store, MemoryStore)
            self.store.clock.ahead += timedelta(seconds=seconds(step))  # type: ignore[attr-defined]
            if self.clock.reason(step):
                return step
        return 1000


@pytest.fixture
def held(workspace: Workspace) -> Any:
    environment = {"world_size": "1"}
    with hold_run(workspace.store, replace(spec(), environment=environment), 60) as run:
        yield run


@pytest.fixture
def images(workspace: Workspace, dataset: DatasetRef) -> Any:
    return open_dataset(workspace, dataset)


def test_on_the_first_night_time_is_kept_for_two_tests_at_the_speed_of_training_and_a_minute(
    held: Run, images: Any
) -> None:
    night = Night(held, images, 1000)
    last = night.trains(lambda step: 1.0)
    tests = 2 * 1000 / 16
    assert 1000 - last == pytest.approx(60 + tests, abs=2)
    night.clock.reason(last, save_seconds=5)
    assert night.clock.reserve == pytest.approx(60 + tests + 20)


@pytest.mark.parametrize(("judging", "kept"), [((100.0,), 210), ((100.0, 40.0, 60.0), 135)])
def test_former_nights_say_how_much_time_is_kept(
    held: Run, images: Any, judging: tuple[float, ...], kept: float
) -> None:
    night = Night(held, images, 1000, Past(judging))
    last = night.trains(lambda step: 1.0)
    assert 1000 - last == pytest.approx(kept, abs=2)
    night.clock.reason(last, save_seconds=5)
    assert night.clock.reserve == kept + 10, "what is judged has to be saved first"


def test_there_is_time_left_for_a_step_as_long_as_the_longest(held: Run, images: Any) -> None:
    night = Night(held, images, 1000, Past((0.0, 0.0)))
    last = night.trains(lambda step: 31.0 if step % 100 == 0 else 1.0)
    assert night.clock._left() > 31 + 10 - 2
    assert last < 1000


def test_the_first_step_which_compiles_the_network_is_no_measure(held: Run, images: Any) -> None:
    night = Night(held, images, 1000, Past((50.0, 50.0)))
    assert night.trains(lambda step: 300.0 if step == 1 else 1.0) == pytest.approx(1000 - 72.5 - 299, abs=3)


def test_a_run_whose_steps_prove_far_too_slow_for_an_epoch_says_so_at_once(held: Run, images: Any) -> None:
    night, steps = Night(held, images, 1000, Past((50.0, 50.0))), []
    with pytest.raises(NoTimeError, match=r"An epoch takes about 2,500 s\. Nothing was published"):
        night.trains(lambda step: steps.append(step) or 25.0)  # type: ignore[func-returns-value]
    assert max(steps) == 11


def test_a_run_whose_steps_were_far_too_slow_on_former_nights_says_so_before_it_begins(held: Run, images: Any) -> None:
    with pytest.raises(NoTimeError, match="An epoch takes about 2,500 s"):
        Night(held, images, 1000, Past((50.0, 50.0), step=25.0))


def test_where_there_is_doubt_about_the_first_epoch_what_is_there_goes_to_the_gate(held: Run, images: Any) -> None:
    night = Night(held, images, 1000, Past((50.0, 50.0), step=12.0))
    assert night.trains(lambda step: 12.0) == pytest.approx((1000 - 72.5) / 12, abs=2)


def test_what_is_less_than_an_epoch_goes_to_the_gate_if_there_seemed_to_be_time(held: Run, images: Any) -> None:
    night = Night(held, images, 1000, Past((50.0, 50.0)))
    assert night.trains(lambda step: 1.0 if step < 50 else 100.0) < 100
