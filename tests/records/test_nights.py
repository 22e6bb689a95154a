"""How much room a night takes, by what the last ones have left."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from nightshift.records.lease import hold
from nightshift.records.nights import sizes
from nightshift.records.run import Origin, Result
from nightshift.storage.memory import MemoryStore
from tests.records.test_lease import spec

FIRST = datetime(2026, 11, 1, 2, tzinfo=UTC)
MODEL = 10_000_000
"""Bytes of a model; records and reports are far smaller."""


def finish(store: MemoryStore, run_id: str, deployment: str | None, day: int) -> None:
    store.clock = lambda: FIRST + timedelta(days=day)
    with hold(store, replace(spec(run_id), origin=Origin(deployment=deployment)), 60) as run:
        store.put(f"models/cifar10/{run_id}/model.safetensors", bytes(MODEL))
        made = Result(test_accuracy=0.5, test_loss=1, weights_sha256="0" * 64, model=f"models/cifar10/{run_id}/")
        run.end("finished", "", made)


def test_a_night_is_what_all_deployments_have_left_on_its_day_and_runs_by_hand_are_none() -> None:
    store = MemoryStore()
    for day in range(7):
        finish(store, f"nightly-{day}", "train-cifar/nightly", day)
        finish(store, f"parts-{day}", "retrain/parts", day)
        finish(store, f"by-hand-{day}", "train-cifar/adhoc", day)
        finish(store, f"laptop-{day}", None, day)
    assert [round(size / MODEL, 1) for size in sizes(store)] == [2.0] * 5


def test_where_there_was_no_night_yet_each_run_counts() -> None:
    store = MemoryStore()
    for number in range(3):
        finish(store, f"laptop-{number}", None, 0)
    assert [round(size / MODEL, 1) for size in sizes(store)] == [1.0] * 3
