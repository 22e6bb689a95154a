"""Two bad records of each kind among fifty good ones: every command goes on with the fifty, and names the bad ones.

Whoever can write to the bucket can seal a record, so each of these has a right sha256 where it can have one.
"""

import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest

from nightshift.errors import DocumentDamagedError, StorageError
from nightshift.records import orphans, recovery
from nightshift.records.keys import record_key
from nightshift.records.lease import acquire, attached
from nightshift.records.run import RunRecord, newest_records, read_record
from nightshift.refs import CheckpointRef
from nightshift.storage import documents
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from tests.records.test_lease import spec
from tests.stores import Faulty, memory_store

A_DAY = timedelta(days=1)
GOOD = [f"good-{number:02}" for number in range(50)]


def sealed(fields: dict[str, Any]) -> bytes:
    return json.dumps({**fields, "sha256": documents._digest(fields)}).encode()


def changed(*path: str | int, to: Any) -> Callable[[dict[str, Any]], bytes]:
    """What seals a record after one of its values was changed."""

    def change(fields: dict[str, Any]) -> bytes:
        place: Any = fields
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = to
        return sealed(fields)

    return change


CHECKPOINT = {
    "step": 1,
    "epoch": 0,
    "key": "checkpoints/good-00/1-1.pt",
    "bytes": 1,
    "sha256": "0" * 64,
    "written_at": "2026-11-25T00:00:00Z",
    "metrics": {"train_seconds": 1},
}
NESTED: list[Any] = []
for _ in range(100):
    NESTED = [NESTED]

KINDS: dict[str, Callable[[dict[str, Any]], bytes]] = {
    "list": lambda fields: b"[]",
    "brackets": lambda fields: b"[" * 200_000,
    "too-large": lambda fields: sealed({**fields, "more": "x" * RunRecord.max_bytes}),
    "under-another-key": changed("run_id", to=GOOD[0]),
    "year-9999": changed("updated_at", to="9999-12-31T23:59:59.999999Z"),
    "year-1": changed("lease", "expires_at", to="0001-01-01T00:00:00+23:59"),
    "no-flow-run": changed("origin", "flow_run_id", to="none"),
    "no-config": changed("config", to={}),
    "deep-config": changed("config", "recipe", to=NESTED),
    "checkpoint-of-another": changed("checkpoints", to=[CHECKPOINT]),
    "checkpoint-outside": changed("checkpoints", to=[{**CHECKPOINT, "key": "checkpoints/../runs/good-00.json"}]),
    "infinite": changed("curve", to=[{"epoch": 1, "step": 1, "loss": float("inf"), "accuracy": 0.5}]),
    "huge": changed("sequence", to=10**400),
    "negative": changed("total_steps", to=-1),
    "no-events": changed("events", to=[]),
    "control-characters": changed("lease", "owner", to="\x1b[2J"),
    "no-such-status": changed("status", to="sleeping"),
    "finished-without-result": changed("status", to="finished"),
}
BAD = [f"{kind}-{number}" for kind in KINDS for number in (1, 2)]


def fill(store: Store) -> None:
    """Fifty interrupted runs, two bad records of each kind, and what else may lie there."""
    for run_id in GOOD:
        acquire(store, spec(run_id), lease_seconds=60).end("interrupted")
    for name in BAD:
        fields = json.loads(store.get(record_key(GOOD[0]))[0]) | {"run_id": name}
        del fields["sha256"]
        store.put(record_key(name), KINDS[name.rpartition("-")[0]](fields))
    for key in ("runs/", "runs/folder/", "runs/notes.txt", "runs/.json", "runs/a..b.json", "runs/deep/good-00.json"):
        store.put(key, b"")


@pytest.fixture
def filled(store: Store) -> Store:
    fill(store)
    return store


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], set[str]]]:
    """Which records the warnings have named."""
    with caplog.at_level(logging.WARNING):
        yield lambda: set(re.findall(r"/runs/([^ ]+)\.json is damaged", caplog.text))


def test_the_fifty_are_listed(filled: Store, warned: Callable[[], set[str]]) -> None:
    assert sorted(record.run_id for record in newest_records(filled)) == GOOD
    assert warned() == set(BAD)


def test_what_is_too_large_by_the_listing_is_not_fetched() -> None:
    store = memory_store()
    fill(store)
    counting = Faulty(store)
    list(newest_records(counting))
    too_large = sum(name.startswith("too-large") for name in BAD)
    # What is damaged is read twice.
    assert counting.calls["get", "runs"] == len(GOOD) + 2 * (len(BAD) - too_large)


def test_the_fifty_are_started_again(filled: Store, warned: Callable[[], set[str]]) -> None:
    found = recovery.find(filled, A_DAY)
    assert sorted(record.run_id for record in recovery.claim_due(filled, found.interrupted, 20)) == GOOD
    assert warned() == set(BAD)


def test_what_the_fifty_left_behind_is_collected_and_what_may_belong_to_a_bad_record_stays(filled: Store) -> None:
    for run_id in (*GOOD, *BAD):
        filled.put(f"checkpoints/{run_id}/7-1.pt", b"left behind")
    gone = orphans.collect(filled, orphans.find(filled, timedelta(0)))
    assert gone.keys == [f"checkpoints/{run_id}/7-1.pt" for run_id in GOOD]


@pytest.mark.parametrize("name", [name for name in BAD if name.endswith("-1")])
def test_a_bad_record_is_one_sentence_and_nobody_takes_its_run_up(name: str) -> None:
    store = memory_store()
    fill(store)
    counting = Faulty(store)
    for ask in (
        lambda: read_record(counting, name),
        lambda: acquire(counting, spec(name), lease_seconds=60),
        lambda: recovery.close(counting, name, "cancelled"),
    ):
        with pytest.raises(DocumentDamagedError, match=re.escape(f"{store.url(record_key(name))} is damaged")) as error:
            ask()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000
    assert counting.calls["put", "runs"] == 0


def test_one_run_that_cannot_be_claimed_keeps_no_other_from_being_started(caplog: pytest.LogCaptureFixture) -> None:
    store = Faulty(memory_store())
    for run_id in GOOD[:3]:
        acquire(store, spec(run_id), lease_seconds=60).end("interrupted")
    found = recovery.find(store, A_DAY)
    store.fail("put", StorageError("500, for this object only"), record_key(GOOD[1]))
    claimed = [record.run_id for record in recovery.claim_due(store, found.interrupted, 20)]
    assert claimed == [GOOD[0], GOOD[2]]
    assert f"run {GOOD[1]} is not started again: 500, for this object only" in caplog.text
    assert store.url(record_key(GOOD[1])) in caplog.text


def test_a_lease_of_a_thousand_years_is_not_waited_for() -> None:
    store = memory_store()
    acquire(store, spec(), lease_seconds=60)
    fields = json.loads(store.get("runs/run.json")[0])
    del fields["sha256"]
    store.put("runs/run.json", changed("lease", "expires_at", to="2999-01-01T00:00:00Z")(fields))
    assert acquire(store, spec(), lease_seconds=60).token == 2


def test_a_record_that_others_always_change_first_ends_in_an_error(store: Store) -> None:
    held = acquire(store, spec(), lease_seconds=60)
    counting = Faulty(store)
    held.store = counting

    def change_it_too(record: RunRecord) -> RunRecord:
        """As a recoverer does, who takes the run for lost."""
        found, etag = read_record(store, "run")
        documents.write(store, "runs/run.json", found.changed(sequence=found.sequence + 1), etag)
        return record

    with pytest.raises(StorageError, match=r"runs/run\.json could not be changed: 100 times another write came first"):
        held.update(change_it_too)
    assert counting.calls["put", "runs"] == 100


def test_a_reference_to_a_checkpoint_does_not_lead_to_a_bad_record() -> None:
    store: MemoryStore = memory_store()
    fill(store)
    ref = CheckpointRef(run_id=BAD[0], step=1, epoch=0, key="checkpoints/x/1-1.pt", bytes=1, sha256="0" * 64, token=1)
    with pytest.raises(DocumentDamagedError), attached(store, ref, lease_seconds=60):
        pass
