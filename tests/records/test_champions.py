"""Who is champion: by hand and back again, once for each decision, and never on a history that is out of date."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from nightshift import processes
from nightshift.errors import DocumentDamagedError, ModelNotFoundError, PreconditionFailedError
from nightshift.records import champions
from nightshift.records.champions import State
from nightshift.records.history import History, Transition, history_key, read_history
from nightshift.records.versions import ModelCard, publish_version
from nightshift.storage import documents
from nightshift.storage.store import Store
from tests.records.test_versions import card_of, replace_card
from tests.stores import Faulty


def publish(store: Store, *versions: str) -> None:
    for version in versions:
        publish_version(store, card_of(version), {})


def promote(store: Store, card: ModelCard, decision: str) -> History:
    def decide(history: History) -> Transition | None:
        return history.next(card, id=decision, at=store.now(), what="promoted", reason="better")

    return champions.change_champion(store, "cifar10", decision, decide)


def transitions(store: Store, name: str = "cifar10") -> list[tuple[str, str, str | None]]:
    history = read_history(store, name)
    return [(entry.what, entry.version, entry.previous) for entry in history.transitions]


def test_a_person_may_promote_any_published_version_and_roll_back_to_any_earlier_champion(store: Store) -> None:
    publish(store, "a", "b", "c", "never")
    for version in ("a", "b", "c"):
        promote(store, card_of(version), version)
    assert champions.roll_back(store, "cifar10", "a").previous == "c"
    assert champions.promote_by_hand(store, "cifar10", "b").version == "b"
    assert champions.promote_by_hand(store, "cifar10", "b").version == "b"
    with pytest.raises(ModelNotFoundError, match="Those that were: a, b, c"):
        champions.roll_back(store, "cifar10", "never")
    with pytest.raises(ModelNotFoundError, match="nightshift runs"):
        champions.promote_by_hand(store, "cifar10", "nobody")
    assert [what for what, _, _ in transitions(store)][3:] == ["rolled back", "promoted by hand"]


def test_the_first_champion_has_nothing_before_it(store: Store) -> None:
    publish(store, "first")
    with pytest.raises(ModelNotFoundError, match="no champion yet"):
        champions.roll_back(store, "cifar10")
    promote(store, card_of("first"), "gate/first")
    with pytest.raises(ModelNotFoundError, match="first was the first champion"):
        champions.roll_back(store, "cifar10")


def test_a_decision_against_a_change_leaves_no_history(store: Store) -> None:
    assert champions.change_champion(store, "cifar10", "gate/a", lambda history: None) == History(name="cifar10")
    assert store.head("models/cifar10/champion.json") is None


def test_a_lost_answer_makes_no_second_transition(store: Store) -> None:
    publish(store, "first", "second")
    promote(store, card_of("first"), "gate/first")
    promote(store, card_of("second"), "gate/second")
    losing = Faulty(store)
    losing.lose_response("put", PreconditionFailedError("what boto3's own retry sees after its first try has landed"))
    assert champions.roll_back(losing, "cifar10").version == "first"
    assert not losing.planned
    assert len(transitions(store)) == 3


def test_of_many_that_promote_at_once_each_replaces_the_one_before(store: Store) -> None:
    versions = [f"v{number}" for number in range(12)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda version: promote(store, card_of(version), f"gate/{version}"), versions))
    made = transitions(store)
    assert sorted(version for _, version, _ in made) == sorted(versions)
    assert [previous for _, _, previous in made] == [None, *(version for _, version, _ in made[:-1])]


def test_a_damaged_history_is_not_decided_upon(store: Store) -> None:
    promote(store, card_of("first"), "gate/first")
    key = "models/cifar10/champion.json"
    body = store.get(key)[0].replace(b'"test_accuracy": 0.5', b'"test_accuracy": 0.1')
    store.put(key, body)
    with pytest.raises(DocumentDamagedError, match=r"champion\.json is damaged, or not a history of champions"):
        promote(store, card_of("second"), "gate/second")
    assert store.get(key)[0] == body


def test_a_champion_whose_card_was_changed_afterwards_is_not_believed_until_somebody_promotes_it_again(
    store: Store,
) -> None:
    publish(store, "a", "b")
    for version in ("a", "b"):
        champions.promote_by_hand(store, "cifar10", version)
    replace_card(store, card_of("a", classes=["dog", "cat"]))
    with pytest.raises(DocumentDamagedError) as refused:
        champions.roll_back(store, "cifar10")
    assert str(refused.value).startswith(f"{store.url('models/cifar10/a/card.json')} was changed after a went live")
    assert str(refused.value).endswith("nightshift promote a")
    champions.promote_by_hand(store, "cifar10", "a")
    assert champions.roll_back(store, "cifar10", "b").version == "b"
    assert champions.roll_back(store, "cifar10", "a").version == "a"


def test_a_champion_whose_card_is_believed_anew_is_promoted_by_hand_once(store: Store) -> None:
    publish(store, "a")
    champions.promote_by_hand(store, "cifar10", "a")
    replace_card(store, card_of("a", classes=["dog", "cat"]))
    for _ in range(2):
        champions.promote_by_hand(store, "cifar10", "a")
    assert transitions(store) == [("promoted by hand", "a", None), ("promoted by hand", "a", "a")]


def test_the_card_of_an_older_history_is_believed(store: Store) -> None:
    publish(store, "a", "b")
    for version in ("a", "b"):
        promote(store, card_of(version), version)
    assert [entry.card_sha256 for entry in read_history(store, "cifar10").transitions] == [None, None]
    assert champions.roll_back(store, "cifar10").version == "a"


def test_a_history_under_another_models_key_is_not_believed(store: Store) -> None:
    publish(store, "a")
    champions.promote_by_hand(store, "cifar10", "a")
    store.put("models/other/champion.json", store.get("models/cifar10/champion.json")[0])
    with pytest.raises(DocumentDamagedError, match="it is the history of cifar10, copied from elsewhere"):
        champions.read_champion(store, "other")


def test_each_change_by_hand_says_who_made_it_and_why(store: Store) -> None:
    publish(store, "a", "b")
    champions.promote_by_hand(store, "cifar10", "a", "the first that is good enough")
    champions.promote_by_hand(store, "cifar10", "b")
    champions.roll_back(store, "cifar10", reason="b sees\ncats \udcff everywhere")
    entries = read_history(store, "cifar10").transitions
    assert [entry.reason for entry in entries] == [
        "the first that is good enough",
        "as told on the command line",
        r"b sees\ncats \udcff everywhere",
    ]
    assert {entry.who for entry in entries} == {processes.user_at_host()}


def test_a_pin_is_kept_through_changes_by_hand_and_both_ends_of_it_are_written_down(store: Store) -> None:
    publish(store, "a", "b")
    with pytest.raises(ModelNotFoundError, match="no champion yet"):
        champions.pin(store, "cifar10")
    champions.promote_by_hand(store, "cifar10", "a")
    for _ in range(2):
        assert champions.pin(store, "cifar10", "holiday").pin
    champions.promote_by_hand(store, "cifar10", "b")
    pins = champions.unpin(store, "cifar10", "back again").pins
    assert [(pin.what, pin.version, pin.reason) for pin in pins] == [
        ("pinned", "a", "holiday"),
        ("unpinned", "b", "back again"),
    ]


def test_a_history_of_before_there_were_pins_is_read_and_written_on(store: Store) -> None:
    publish(store, "a", "b")
    champions.promote_by_hand(store, "cifar10", "a")
    key = history_key("cifar10")
    fields = json.loads(store.get(key)[0])
    del fields["sha256"], fields["pins"], fields["transitions"][0]["who"]
    fields["format"] = 1
    store.put(key, json.dumps({**fields, "sha256": documents._digest(fields)}).encode())
    champions.promote_by_hand(store, "cifar10", "b")
    assert [entry.version for entry in read_history(store, "cifar10").transitions] == ["a", "b"]
    assert json.loads(store.get(key)[0])["format"] == 3


def test_the_state_of_a_history_is_whole_not_begun_missing_or_damaged_and_says_what_to_do(store: Store) -> None:
    assert champions.state_of(store, "cifar10").kind == "not begun"
    publish(store, "a")
    champions.promote_by_hand(store, "cifar10", "a")
    assert champions.state_of(store, "cifar10") == State("whole", "a is the champion of cifar10")
    store.put(history_key("cifar10"), b"{")
    damaged = champions.state_of(store, "cifar10")
    assert (damaged.kind, damaged.ok) == ("damaged", False)
    store.delete(history_key("cifar10"))
    missing = champions.state_of(store, "cifar10")
    assert (missing.kind, missing.ok) == ("missing", False)
    for state in (damaged, missing):
        assert "nightshift champion --rebuild" in state.detail
