"""A year of nights on one store: it stays as small as the settings say, and nothing that is needed is gone."""

import hashlib
import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from nightshift.errors import ModelNotFoundError, RunNotFoundError
from nightshift.judging import gate
from nightshift.records import champions, rebuild, retention, snapshots
from nightshift.records.history import history_key, read_copy, read_history
from nightshift.records.keys import payload_key, place_of, report_key
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import newest_records, read_record
from nightshift.records.snapshots import Entry, Manifest
from nightshift.records.versions import read_card, read_file
from nightshift.refs import DatasetRef
from nightshift.settings import GateSettings, KeepSettings
from nightshift.storage import documents
from nightshift.storage.memory import MemoryStore
from nightshift.sweeps import stored as sweeps
from nightshift.sweeps.study import ask
from tests.judging.test_gate import published, result_of
from tests.records.test_lease import spec
from tests.records.test_orphans import commit

DAY = timedelta(days=1)
KEEP = KeepSettings(nights=60, snapshots=20)


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, 2, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def sha256(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def snapshot(store: MemoryStore, night: int) -> str:
    """Tonight's images: those of the last nights, in a shard each, and a new one."""
    digest, shards = sha256("snapshot", night), [sha256("shard", number) for number in range(max(0, night - 5), night)]
    for shard in shards:
        store.put(snapshots.shard_key(shard), b"images" * 100)
    store.put(snapshots.rows_key("photos", digest), b"rows")
    manifest = Manifest(
        name="photos",
        digest=digest,
        test_digest=digest,
        image_size=32,
        resize="stretch",
        images=100,
        splits={"train": 90, "test": 10},
        classes={"cat": 100},
        refused=0,
        shards=shards,
    )
    snapshots.write_manifest(store, manifest)
    counts: dict[str, Any] = dict.fromkeys(("added", "removed", "relabelled", "refused", "read"), 0)
    snapshots.append(store, "photos", Entry(digest=digest, at=store.now(), images=100, classes=1, **counts))
    return digest


def night(store: MemoryStore, name: str, accuracy: float, digest: str, ends: str = "finished") -> None:
    """A run of tonight's images, with a checkpoint, a report and a version that the gate has judged."""
    dataset = DatasetRef(name="photos", digest=digest, key=snapshots.manifest_key("photos", digest), source="snapshot")
    with hold_run(store, replace(spec(name), dataset=dataset), 60) as run:
        commit(run, payload_key(name, 1, run.token))
        store.put(report_key(name, "report.html"), b"report")
        if ends == "finished":
            model = published(store, accuracy, name, name="photos")
            verdict = gate.promote(store, model, GateSettings())
            run.end("finished", result=result_of(model, verdict))
        else:
            run.end("failed", "it diverged")


def kinds(store: MemoryStore) -> Counter[str]:
    return Counter(place.kind for item in store.list("") if (place := place_of(item.key)))


@pytest.mark.parametrize("nights", [90, pytest.param(400, marks=pytest.mark.soak)])
def test_after_so_many_nights_the_store_holds_what_the_settings_keep_and_all_that_is_needed(nights: int) -> None:
    chance, clock = random.Random(0), Clock()
    store = MemoryStore(clock=clock)
    largest = 0
    for number in range(nights):
        clock.now = datetime(2026, 1, 1, 2, tzinfo=UTC) + number * DAY
        name = f"night-{number}"
        night(store, name, 0.5 + number / 2000 + chance.uniform(-0.01, 0.01), snapshot(store, number))
        if number % 20 == 7:
            night(store, f"failed-{number}", 0, sha256("snapshot", number), ends="failed")
        if number % 30 == 29:
            champions.roll_back(store, "photos")
        if number % 50 == 0:
            study = sweeps.begin(store, sweeps.plan(f"sweep-{number}", "quick", {"lr": [0.1, 0.2]}))
            ask(store, study, {})
        retention.tidy(store, KEEP, DAY)
        largest = max(largest, sum(item.size for item in store.list("")))
        if number == 70:
            after_seventy = largest

    found = kinds(store)
    history = read_history(store, "photos")
    kept = {record.run_id for record in newest_records(store)}
    too_old = {run for run in kept if int(run.rpartition("-")[2]) < nights - 62}
    assert too_old <= set(history.versions[-retention.CHAMPIONS - 1 :])
    assert found["record"] == found["payload"] == found["report"] <= 61 + 4 + len(too_old)
    assert found["sweep"] == sum(number >= nights - 61 for number in range(0, nights, 50))
    named = {record.dataset.digest for record in newest_records(store)}
    assert {entry.digest for entry in snapshots.read_history(store, "photos").entries} == named
    assert found["shard"] == len(
        {shard for digest in named for shard in snapshots.read_manifest(store, "photos", digest).shards}
    )
    for version in history.versions:
        card = read_card(store, "photos", version, history.card_sha256(version))
        for file_name in card.files:
            read_file(store, card, file_name)
    assert largest < 1.5 * after_seventy, "but for the histories it does not grow"


def three_nights(store: MemoryStore, clock: Clock) -> None:
    for number, accuracy in enumerate((0.5, 0.6, 0.7)):
        night(store, f"night-{number}", accuracy, snapshot(store, number + 1))
        clock.now += DAY


def champions_enough(store: MemoryStore, clock: Clock) -> None:
    """Three nights of long ago, and then so many champions that the first need not stay."""
    three_nights(store, clock)
    clock.now += 100 * DAY
    for number in range(retention.CHAMPIONS):
        night(store, f"later-{number}", 0.71 + number / 100, snapshot(store, 50 + number))
        clock.now += DAY
    clock.now += 40 * DAY


def test_without_a_setting_nothing_of_a_finished_night_goes() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    before = [item.key for item in store.list("")]
    clock.now += 1000 * DAY
    spent, found = retention.tidy(store, KeepSettings(), DAY)
    assert (spent, found.objects) == (retention.Spent(), [])
    assert [item.key for item in store.list("")] == before


def test_a_dry_run_deletes_nothing_and_names_what_would_go() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    before = {item.key: item.etag for item in store.list("")}
    spent, would_go = retention.tidy(store, KEEP, DAY, dry_run=True)
    assert {item.key: item.etag for item in store.list("")} == before
    assert set(spent.runs) == {"night-0", "night-1", "night-2"}
    _, gone = retention.tidy(store, KEEP, DAY)
    assert sorted(would_go.keys) == sorted(gone.keys)
    assert before.keys() - {item.key for item in store.list("")} == set(gone.keys)


def test_while_nobody_can_say_who_was_champion_no_run_goes_and_none_is_said_to() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    clock.now += 100 * DAY
    for item in store.list("models/"):  # also those files that would tell of a version
        store.delete(item.key)
    store.delete(history_key("photos"))
    for dry_run in (True, False):
        spent, _ = retention.tidy(store, KEEP, DAY, dry_run)
        assert spent.runs == {}
    assert read_record(store, "night-0")


def test_one_that_is_live_interrupted_or_champion_stays_however_old() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    three_nights(store, clock)
    with hold_run(store, spec("live"), 60):
        retention.tidy(store, KeepSettings(nights=1, models=1, snapshots=1), DAY)
        assert read_record(store, "live")
    assert champions.read_champion(store, "photos").version == "night-2"
    assert {record.run_id for record in newest_records(store)} == {"live", "night-0", "night-1", "night-2"}


def test_nobody_rolls_back_to_a_champion_that_is_gone_and_it_is_said_which_are_left() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    retention.tidy(store, KEEP, DAY)
    with pytest.raises(RunNotFoundError):
        read_record(store, "night-0")
    with pytest.raises(ModelNotFoundError, match=r"night-0 of photos is gone.*later-0"):
        champions.roll_back(store, "photos", "night-0")
    assert champions.roll_back(store, "photos", "later-0").version == "later-0"
    store.delete(history_key("photos"))
    assert "night-0" not in rebuild.rebuild(store, "photos").versions


def test_one_who_is_killed_after_retiring_a_champion_is_followed_by_one_who_deletes_it() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    retention._retire(store, "photos", ["night-0"])
    with pytest.raises(ModelNotFoundError, match="is gone"):
        champions.promote_by_hand(store, "photos", "night-0")
    retention.tidy(store, KEEP, DAY)
    assert not any("night-0" in item.key for item in store.list(""))
    assert read_copy(store, "photos") == read_history(store, "photos")


def test_a_champion_of_that_moment_is_not_retired_though_it_was_found_spent() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    spent = retention.find(store, KEEP)
    champions.roll_back(store, "photos", "night-1")
    retention._let_go(store, spent)
    card = read_card(store, "photos", "night-1")
    assert read_file(store, card, "predictions.safetensors")
    assert {"night-0", "night-2"} <= set(read_history(store, "photos").retired)


def test_a_name_that_is_published_anew_is_retired_no_more() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    retention.tidy(store, KEEP, DAY)
    night(store, "night-0", 0.95, snapshot(store, 99))
    assert champions.read_champion(store, "photos").version == "night-0"
    assert champions.roll_back(store, "photos").version == "later-9"


def test_of_each_data_set_the_newest_runs_stay() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    clock.now += 40 * DAY
    for number in range(5):
        night(store, f"worse-{number}", 0.1, snapshot(store, 70 + number))
        clock.now += DAY
    retention.tidy(store, KeepSettings(models=3), DAY)
    kept = {record.run_id for record in newest_records(store)}
    assert kept == {*(f"later-{number}" for number in range(10)), "worse-2", "worse-3", "worse-4"}


def test_a_history_that_yesterdays_main_has_written_is_read_and_retires() -> None:
    clock = Clock()
    store = MemoryStore(clock=clock)
    champions_enough(store, clock)
    history = read_history(store, "photos")
    store.put(history_key("photos"), documents.encoded(history.changed(format=2)))
    retention.tidy(store, KEEP, DAY)
    assert set(read_history(store, "photos").retired) == {"night-0", "night-1", "night-2"}
