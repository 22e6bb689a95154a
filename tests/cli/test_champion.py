"""Which version is live, by the commands: shown with who did what and why, pinned, and made again."""

from collections.abc import Callable

import pytest

from nightshift.records.history import copy_key, history_key
from nightshift.storage.store import Store
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.judging.test_gate import promote, published

Run = Callable[..., Finished]
KEY = history_key("cifar10")


@pytest.fixture
def store(workspace: Workspace) -> Store:
    """Two versions that went live, one after the other."""
    for version, accuracy in (("monday", 0.50), ("tuesday", 0.55)):
        promote(workspace.store, published(workspace.store, accuracy, version))
    return workspace.store


def test_a_change_by_hand_is_shown_with_its_reason_and_who_made_it(store: Store, nightshift: Run) -> None:
    back = nightshift("rollback", "--reason", "sees cats everywhere", "--json").json
    assert (back["version"], back["history"][-1]["reason"]) == ("monday", "sees cats everywhere")
    assert "@" in back["history"][-1]["who"]
    pinned = nightshift("pin", "--reason", "the demo is on Friday", "--json").json["pinned"]
    shown = nightshift("champion").out
    for part in ("sees cats everywhere", back["history"][-1]["who"], "pinned", pinned["who"], "the demo is on Friday"):
        assert part in shown
    unpinned = nightshift("unpin", "--json").json
    assert (unpinned["pinned"], [pin["what"] for pin in unpinned["pins"]]) == (None, ["pinned", "unpinned"])


def test_a_long_history_is_shown_from_its_end_and_says_how_much_there_is(store: Store, nightshift: Run) -> None:
    shown = nightshift("champion", "--limit", "1").out
    assert "tuesday" in shown.partition("history")[2]
    assert "there was no champion" not in shown
    assert "\nthe newest 1 of 2; for more: --limit N\n" in shown


@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_lost_history_is_one_sentence_and_rebuilt_as_that_says(
    store: Store, nightshift: Run, is_deleted: bool
) -> None:
    before = nightshift("champion", "--json").json
    if is_deleted:
        store.delete(KEY)
    else:
        store.put(KEY, store.get(KEY)[0][:100])
    for command in (["champion"], ["promote", "monday"], ["rollback"], ["pin"], ["predict", "nothing.png"]):
        refused = nightshift(*command)
        assert (refused.exit_code, refused.out) == (1, "")
        assert refused.err.startswith(f"Error: {store.url(KEY)} is {'missing' if is_deleted else 'damaged'}")
        assert "nightshift champion --rebuild" in refused.err
        assert "Traceback" not in refused.err
    assert nightshift("champion", "--rebuild", "--json").json == before
    assert nightshift("champion", "--json").json == before


def test_where_nothing_tells_of_a_champion_rebuilding_is_a_mistake(store: Store, nightshift: Run) -> None:
    store.delete(KEY)
    store.delete(copy_key("cifar10"))
    refused = nightshift("champion", "--rebuild")
    assert refused.exit_code == 2
    assert "nightshift promote RUN" in refused.err
    assert nightshift("promote", "monday", "--json").json["version"] == "monday"


@pytest.mark.parametrize("body", [b"", b'{"format": 3, "name": "cif'])
def test_a_cut_card_is_one_sentence_that_says_what_to_do(store: Store, nightshift: Run, body: bytes) -> None:
    key = "models/cifar10/tuesday/card.json"
    store.put(key, body)
    for command in (["predict", "nothing.png"], ["promote", "tuesday"]):
        refused = nightshift(*command)
        assert (refused.exit_code, refused.out) == (1, "")
        assert refused.err.startswith(f"Error: {store.url(key)} is damaged")
        assert "nightshift republish RUN" in refused.err
        assert "Traceback" not in refused.err
    verified = nightshift("verify", "--published", "--json")
    assert verified.exit_code == 1
    assert [item["key"] for item in verified.json["bad"]] == [key]
    assert "1 bad: nightshift republish RUN" in nightshift("verify", "--published").out
    assert nightshift("verify", "--published", "monday", "--json").json == {"ok": True, "checked": 2, "bad": []}
    assert nightshift("verify", "--published", "nobody").exit_code == 2
    assert nightshift("republish", "nobody").exit_code == 2
