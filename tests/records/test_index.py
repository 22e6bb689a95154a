"""The index of runs saves reading records that say what they said before, and changes nothing of what is said."""

import json
import logging
import math
from collections.abc import Callable
from datetime import timedelta

import pytest

from nightshift.errors import StorageDeniedError
from nightshift.records import index, recovery, retention
from nightshift.records.index import KEY, Index, overviews, renew
from nightshift.records.keys import record_key
from nightshift.settings import KeepSettings
from nightshift.storage import documents
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from tests.fuzz import mutations
from tests.records.test_lease import RESULT, acquire, hold
from tests.stores import Faulty, memory_store, wait_until

A_DAY = timedelta(days=1)
RUNS = 7


@pytest.fixture(autouse=True)
def few_are_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "_WORTH", 3)


@pytest.fixture
def store() -> MemoryStore:
    """Finished runs, one that was interrupted, and one whose trainer is lost; all are in the index that can be."""
    store = memory_store()
    for number in range(RUNS):
        end(store, f"over-{number}")
    with hold(store, "stopped") as run:
        run.end("interrupted")
    wait_until(store, acquire(store, lease_seconds=1).record.lease.expires_at)
    renew(store)
    return store


def end(store: Store, run_id: str) -> None:
    with hold(store, run_id) as run:
        run.end("finished", result=RESULT)


def reads(store: Store, look: Callable[[Store], object]) -> int:
    """How many records a look at the runs reads."""
    counting = Faulty(store)
    look(counting)
    return counting.calls["get", "runs"]


def listed(store: Store) -> list[index.Overview]:
    return overviews(store, limit=100)


def recovered(store: Store) -> list[str]:
    return [run.record.run_id for run in recovery.find(store, A_DAY).interrupted]


def test_the_records_of_runs_that_were_over_are_not_read_again(store: MemoryStore) -> None:
    assert reads(store, listed) == reads(store, recovered) == 2


def test_what_is_listed_and_recovered_is_the_same_with_and_without_an_index(store: MemoryStore) -> None:
    with_index = listed(store), recovered(store)
    assert {run.status for run in with_index[0]} == {"finished", "interrupted", "lost"}
    store.delete(KEY)
    assert (listed(store), recovered(store)) == with_index


def test_a_run_that_was_resumed_since_is_listed_as_its_record_says(store: MemoryStore) -> None:
    with hold(store, "over-3") as run:
        run.end("interrupted")
    (found,) = (run for run in listed(store) if run.run_id == "over-3")
    assert found.status == "interrupted"
    assert "over-3" in recovered(store)


def test_a_run_that_was_deleted_is_listed_no_more_and_leaves_the_index(store: MemoryStore) -> None:
    store.delete(record_key("over-3"))
    assert "over-3" not in {run.run_id for run in listed(store)}
    for number in range(3):
        end(store, f"new-{number}")
    renew(store)
    kept = {run.run_id for run in documents.read(store, KEY, Index)[0].runs}
    assert kept == {f"over-{number}" for number in range(RUNS) if number != 3} | {
        f"new-{number}" for number in range(3)
    }


def test_it_is_written_by_gc_once_it_lacks_many_runs(store: MemoryStore) -> None:
    def gc() -> str:
        retention.tidy(store, KeepSettings(), A_DAY)
        return documents.read(store, KEY, Index)[1]

    before = gc()
    for number in range(2):
        end(store, f"new-{number}")
    assert gc() == before
    end(store, "new-2")
    assert gc() != before
    assert reads(store, listed) == 2


@pytest.mark.parametrize("body", [b"", b"{}", b"\xff"], ids=["empty", "no seal", "no text"])
def test_a_damaged_one_is_told_and_makes_no_difference_but_time_until_gc_clears_it_away(
    store: MemoryStore, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    expected = listed(store)
    store.put(KEY, body)
    with caplog.at_level(logging.WARNING):
        assert listed(store) == expected
    assert f"{KEY} is damaged" in caplog.text
    retention.tidy(store, KeepSettings(), A_DAY)
    assert reads(store, listed) == 2


def test_one_of_a_newer_nightshift_is_neither_used_nor_overwritten(store: MemoryStore) -> None:
    store.put(KEY, mutations.sealed({**json.loads(documents.encoded(Index())), "format": 2}))
    before = store.get(KEY)
    assert len(listed(store)) == RUNS + 2
    renew(store)
    assert store.get(KEY) == before


def test_an_entry_of_a_run_that_is_not_over_is_not_believed(store: MemoryStore) -> None:
    runs = [run.changed(status="running") for run in documents.read(store, KEY, Index)[0].runs]
    store.put(KEY, documents.encoded(Index(runs=runs)))
    assert {run.status for run in listed(store)} == {"finished", "interrupted", "lost"}


@pytest.mark.parametrize("method", ["get", "put"])
def test_rights_that_do_not_name_it_stop_neither_gc_nor_a_listing(store: MemoryStore, method: str) -> None:
    expected = listed(store)
    store.delete(KEY)
    refusing = Faulty(store)
    refusing.fail(method, StorageDeniedError("no"), KEY, times=math.inf)
    retention.tidy(refusing, KeepSettings(), A_DAY)
    assert listed(refusing) == expected
