"""A history of champions that was deleted or damaged: nothing goes live by itself, and it is made again as it was."""

from collections.abc import Callable

import pytest

from nightshift.errors import (
    DocumentDamagedError,
    DocumentNewerError,
    HistoryLostError,
    ModelNotFoundError,
    StorageError,
)
from nightshift.records import champions
from nightshift.records.history import copy_key, history_key, read_copy, read_history
from nightshift.records.keys import record_key
from nightshift.records.rebuild import rebuild
from nightshift.refs import Verdict
from nightshift.storage import documents
from nightshift.storage.store import Store
from tests.judging.test_gate import finish, promote, published
from tests.records.test_bad_records import sealed
from tests.stores import Faulty

KEY, COPY = history_key("cifar10"), copy_key("cifar10")


def a_night(store: Store, accuracy: float, version: str) -> Verdict:
    """A run that is published, judged and finished."""
    model = published(store, accuracy, version)
    verdict = promote(store, model, max_regression=0.1)
    finish(store, model, verdict)
    return verdict


def three_nights_and_a_rollback(store: Store) -> None:
    for accuracy, version in ((0.50, "monday"), (0.55, "tuesday"), (0.30, "wednesday")):
        a_night(store, accuracy, version)
    champions.roll_back(store, "cifar10", reason="tuesday sees cats everywhere")
    champions.pin(store, "cifar10", "until that is understood")


def deleted(store: Store) -> None:
    store.delete(KEY)


def cut(store: Store) -> None:
    store.put(KEY, store.get(KEY)[0][:-50])


def too_large(store: Store) -> None:
    store.put(KEY, b" " * (8 * documents.MIB + 1))


def emptied(store: Store) -> None:
    store.put(KEY, documents.encoded(read_history(store, "cifar10").changed(transitions=[], pins=[])))


@pytest.mark.parametrize("damage", [deleted, cut, too_large, emptied])
def test_a_history_is_made_again_from_its_copy_exactly(store: Store, damage: Callable[[Store], None]) -> None:
    three_nights_and_a_rollback(store)
    before = store.get(KEY)[0]
    damage(store)
    assert rebuild(store, "cifar10").champion == read_history(store, "cifar10").champion
    assert store.get(KEY)[0] == before
    assert a_night(store, 0.60, "thursday").champion == champions.read_champion(store, "cifar10")


@pytest.mark.parametrize("damage", [deleted, cut, too_large, emptied])
def test_nothing_goes_live_by_itself_or_by_hand_while_there_is_no_history(
    store: Store, damage: Callable[[Store], None]
) -> None:
    three_nights_and_a_rollback(store)
    damage(store)
    copy = store.get(COPY)[0]
    verdict = a_night(store, 0.37, "thursday")
    assert (verdict.promoted, verdict.champion) == (False, None)
    assert "nightshift champion --rebuild" in verdict.reason
    for change in (
        lambda: champions.promote_by_hand(store, "cifar10", "thursday"),
        lambda: champions.roll_back(store, "cifar10"),
        lambda: champions.pin(store, "cifar10"),
        lambda: champions.read_champion(store, "cifar10"),
    ):
        with pytest.raises((HistoryLostError, DocumentDamagedError), match="nightshift champion --rebuild"):
            change()
    assert store.get(COPY)[0] == copy


def test_without_a_copy_the_records_tell_the_promotions_and_the_newest_which_version_was_live(store: Store) -> None:
    for accuracy, version in ((0.50, "monday"), (0.55, "tuesday")):
        a_night(store, accuracy, version)
    before = read_history(store, "cifar10").transitions
    champions.roll_back(store, "cifar10")
    a_night(store, 0.30, "wednesday")  # rejected: its verdict names monday
    for key in (KEY, COPY):
        store.delete(key)
    assert not a_night(store, 0.37, "thursday").promoted
    made = rebuild(store, "cifar10").transitions
    told = [entry.model_dump(exclude={"at", "by", "who"}) for entry in made]
    assert told[:2] == [entry.model_dump(exclude={"at", "by", "who"}) for entry in before]
    assert [(entry.what, entry.version, entry.previous) for entry in made[2:]] == [("rolled back", "monday", "tuesday")]
    assert "it was live when the gate judged wednesday" in made[-1].reason
    assert read_copy(store, "cifar10") == read_history(store, "cifar10")


def test_a_promotion_whose_writer_was_killed_before_the_copy_is_taken_from_its_record(store: Store) -> None:
    a_night(store, 0.50, "monday")
    behind = store.get(COPY)[0]
    a_night(store, 0.55, "tuesday")
    store.put(COPY, behind)
    deleted(store)
    assert [entry.version for entry in rebuild(store, "cifar10").transitions] == ["monday", "tuesday"]


@pytest.mark.parametrize("is_damaged", [True, False])
def test_a_copy_that_is_damaged_or_gone_is_written_anew_by_the_next_night_whatever_its_verdict(
    store: Store, is_damaged: bool
) -> None:
    a_night(store, 0.55, "monday")
    if is_damaged:
        store.put(COPY, b"{")
    else:  # as in a store of before there was one
        store.delete(COPY)
    assert not a_night(store, 0.30, "tuesday").promoted
    assert read_copy(store, "cifar10") == read_history(store, "cifar10")


def test_a_copy_that_cannot_be_written_is_a_warning_and_the_change_stands(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Faulty(store)
    failing.fail("put", StorageError("500"), COPY)
    model = published(store, 0.50, "monday")
    assert promote(failing, model).promoted
    assert champions.read_champion(store, "cifar10").version == "monday"
    assert f"the copy of {store.url(KEY)} is out of date: 500" in caplog.text


def test_an_older_history_that_somebody_brought_back_is_copied_once_it_is_changed(store: Store) -> None:
    a_night(store, 0.50, "monday")
    older = store.get(KEY)[0]
    a_night(store, 0.55, "tuesday")
    store.put(KEY, older)
    a_night(store, 0.60, "wednesday")
    assert [entry.version for entry in read_copy(store, "cifar10").transitions] == ["monday", "wednesday"]


def test_a_whole_history_is_not_made_again(store: Store) -> None:
    three_nights_and_a_rollback(store)
    before = store.get(KEY)
    assert rebuild(store, "cifar10") == read_history(store, "cifar10")
    assert store.get(KEY) == before


def test_where_nothing_tells_of_a_champion_none_is_made_up(store: Store) -> None:
    with pytest.raises(ModelNotFoundError, match="To begin anew: nightshift promote RUN"):
        rebuild(store, "cifar10")
    assert store.head(KEY) is None


def test_a_history_of_a_newer_nightshift_is_never_written_over(store: Store) -> None:
    a_night(store, 0.50, "monday")
    body = sealed({"format": 4})
    store.put(KEY, body)
    with pytest.raises(DocumentNewerError, match="update nightshift"):
        rebuild(store, "cifar10")
    assert not a_night(store, 0.60, "tuesday").promoted
    assert store.get(KEY)[0] == body


def test_a_record_that_cannot_be_read_just_now_lets_no_first_champion_go_live(store: Store) -> None:
    """It may tell of an earlier one; the gate is asked again."""
    a_night(store, 0.55, "monday")
    deleted(store)
    store.delete(COPY)
    failing = Faulty(store)
    failing.fail("get", StorageError("500"), record_key("monday"))
    candidate = published(store, 0.37, "tuesday")
    with pytest.raises(StorageError, match="500"):
        promote(failing, candidate)
    assert store.head(KEY) is None
    assert not promote(failing, candidate).promoted


@pytest.mark.parametrize("damage", [deleted, cut])
def test_where_nothing_whole_is_left_only_a_person_begins_anew(store: Store, damage: Callable[[Store], None]) -> None:
    """As after a sweep, whose best version went live and whose records have no verdict."""
    promote(store, published(store, 0.55, "trial"))
    finish(store, published(store, 0.55, "trial"), None)
    damage(store)
    store.put(COPY, b"{")
    candidate = published(store, 0.37, "tuesday")
    verdict = promote(store, candidate)
    assert not verdict.promoted
    with pytest.raises(ModelNotFoundError, match="To begin anew: nightshift promote RUN"):
        rebuild(store, "cifar10")
    assert champions.promote_by_hand(store, "cifar10", "trial").version == "trial"
    assert read_copy(store, "cifar10") == read_history(store, "cifar10")
    assert not promote(store, candidate).promoted
