"""A run is deleted with all that belongs to it and nothing else, whoever dies when; never a live one or a champion."""

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest

from nightshift.errors import (
    DocumentDamagedError,
    HistoryLostError,
    LeaseLostError,
    RunInUseError,
    RunNotFoundError,
    StorageError,
)
from nightshift.records import champions, deletion, orphans
from nightshift.records.history import history_key
from nightshift.records.keys import Place, place_of
from nightshift.records.run import read_record
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store, Stored
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.judging.test_gate import finish, promote, published
from tests.records.test_lease import acquire, hold
from tests.records.test_orphans import commit
from tests.stores import Faulty, begin_upload, memory_store

OBJECTS = [
    "models/cifar10/night/card.json",
    "runs/night.json",
    "checkpoints/night/1-1.pt",
    "checkpoints/night/2-1.pt",
    "models/cifar10/night/predictions.safetensors",
    "reports/night/drift.json",
    "reports/night/metrics.jsonl",
    "reports/night/plots/night.svg",
    "reports/night/report.html",
]


def fill(store: Store) -> None:
    """A champion, and the finished run `night`, which the gate has rejected."""
    promote(store, published(store, 0.55, "champion"))
    model = published(store, 0.40, "night")
    with hold(store, "night") as run:
        commit(run, "checkpoints/night/1-1.pt")
    store.put("checkpoints/night/2-1.pt", b"of an attempt that was lost")
    for name in ("drift.json", "metrics.jsonl", "plots/night.svg", "report.html"):
        store.put(f"reports/night/{name}", b"of its course")
    run.end("interrupted")
    finish(store, model, promote(store, model))
    store.put("checkpoints/night-2/1-1.pt", b"of another run")


def keys(store: Store) -> list[str]:
    return [item.key for item in store.list("")]


def of_the_run(store: Store) -> list[str]:
    return [key for key in keys(store) if key in OBJECTS]


def test_all_that_belongs_to_a_run_is_deleted_and_nothing_else(store: Store) -> None:
    fill(store)
    begin_upload(store, "checkpoints/night/3-1.pt")
    others = [key for key in keys(store) if key not in OBJECTS]
    assert deletion.belongings(store, "night").keys == [*OBJECTS, "checkpoints/night/3-1.pt"]
    assert deletion.delete(store, "night").keys == [*OBJECTS, "checkpoints/night/3-1.pt"]
    assert keys(store) == others
    assert not list(store.list_uploads(""))
    with pytest.raises(RunNotFoundError, match="there is nothing of a run 'night'"):
        deletion.delete(store, "night")


class LateWriter(MemoryStore):
    """A store into which somebody publishes for the run at the last instant before it is marked."""

    def __init__(self) -> None:
        super().__init__()
        self.listed: list[str] = []

    def list(self, prefix: str) -> Iterator[Stored]:
        self.listed.append(prefix)
        return super().list(prefix)

    def put(self, key: str, body: bytes, *, if_match: str | None = None, if_absent: bool = False) -> str:
        if key == "runs/night.json" and b'"deleted"' in body:
            super().put("models/cifar10/night/weights.pth", b"late")
        return super().put(key, body, if_match=if_match, if_absent=if_absent)


def test_what_is_published_until_the_run_is_marked_goes_too_and_all_versions_are_listed_once() -> None:
    store = LateWriter()
    fill(store)
    store.listed.clear()
    assert "models/cifar10/night/weights.pth" in deletion.delete(store, "night").keys
    assert store.listed.count("models/") == 1
    assert [key for key in keys(store) if place_of(key) == Place("version", "night")] == []


@pytest.mark.parametrize("key", OBJECTS)
def test_an_interrupted_deletion_leaves_what_a_second_one_or_gc_finds(key: str) -> None:
    for finish_it in (
        lambda store: deletion.delete(store, "night"),
        lambda store: orphans.collect(store, orphans.find(store, timedelta(0))),
    ):
        store = memory_store()
        fill(store)
        failing = Faulty(store)
        failing.fail("delete", StorageError("the plug was pulled"), key)
        with pytest.raises(StorageError, match="the plug"):
            deletion.delete(failing, "night")
        left = of_the_run(store)
        assert left == sorted(OBJECTS[OBJECTS.index(key) :])
        finish_it(store)
        if "runs/night.json" in of_the_run(store):  # gc leaves what a record names
            assert read_record(store, "night")[0].events[-1].what == "deleted"
            deletion.delete(store, "night")
        assert of_the_run(store) == []


def test_a_live_run_is_not_deleted(store: Store) -> None:
    with hold(store) as run:
        commit(run, "checkpoints/run/1-1.pt")
        before = keys(store)
        with pytest.raises(RunInUseError, match=f"is being trained by {run.record.lease.owner}.*stop it first"):
            deletion.delete(store, "run")
        run.check()
    assert keys(store) == before


def test_a_trainer_that_was_thought_dead_cannot_go_on_with_a_run_that_is_being_deleted() -> None:
    store = memory_store()
    asleep = acquire(store, lease_seconds=0)
    failing = Faulty(store)
    failing.fail("delete", StorageError("the plug was pulled"))
    with pytest.raises(StorageError, match="the plug"):
        deletion.delete(failing, "run")
    with pytest.raises(LeaseLostError):
        asleep.update(lambda record: record)
    assert read_record(store, "run")[0].events[-1].what == "deleted"


@pytest.mark.parametrize("is_known", [True, False], ids=["in the history", "by its record"])
def test_a_champion_whose_published_files_are_lost_keeps_the_checkpoint_that_makes_them_again(
    store: Store, is_known: bool
) -> None:
    fill(store)
    champions.promote_by_hand(store, "cifar10", "night")
    for key in of_the_run(store):
        if key.startswith("models/"):
            store.delete(key)
    if not is_known:
        store.delete(history_key("cifar10"))
    with pytest.raises((RunInUseError, HistoryLostError)):
        deletion.delete(store, "night")
    assert "checkpoints/night/1-1.pt" in keys(store)


def test_what_is_or_was_champion_is_not_deleted_and_nothing_is_while_the_history_is_lost(store: Store) -> None:
    fill(store)
    champions.promote_by_hand(store, "cifar10", "night")
    with pytest.raises(RunInUseError, match="night is champion of cifar10"):
        deletion.delete(store, "night")
    champions.roll_back(store, "cifar10")
    with pytest.raises(RunInUseError, match="night was champion of cifar10"):
        deletion.delete(store, "night")
    for damage in (lambda: store.put(history_key("cifar10"), b"{"), lambda: store.delete(history_key("cifar10"))):
        damage()
        with pytest.raises((DocumentDamagedError, HistoryLostError), match="nightshift champion --rebuild"):
            deletion.delete(store, "night")
    assert of_the_run(store) == sorted(OBJECTS)
    assert read_record(store, "night")[0].status == "finished"


def test_delete_needs_yes_where_nobody_can_be_asked(workspace: Workspace, nightshift: Callable[..., Finished]) -> None:
    fill(workspace.store)
    for arguments in ([], ["--json"]):
        refused = nightshift("delete", "night", *arguments)
        assert refused.exit_code == 2
        assert "nightshift delete night --yes" in refused.err
    refused = nightshift("delete", "champion", "--yes")
    assert (refused.exit_code, "a champion is never deleted" in refused.err) == (2, True)
    done = nightshift("delete", "night", "--yes", "--json")
    assert (done.exit_code, done.json["run_id"], done.json["deleted"]) == (0, "night", len(OBJECTS))
    assert of_the_run(workspace.store) == []
    assert nightshift("delete", "night", "--yes").exit_code == 2
