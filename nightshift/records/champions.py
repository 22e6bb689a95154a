"""Which published version of a model is the champion, and who changes it.

It is the last entry of the model's history, which is only ever appended to, by compare-and-swap. The history names
nothing that is not published. Where it is missing or damaged, nothing is decided until it was made again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nightshift import processes
from nightshift.errors import DocumentDamagedError, HistoryLostError, ModelNotFoundError
from nightshift.records.history import History, Pin, Transition, history_key, keep_copy, read_history
from nightshift.records.rebuild import check_never_begun, clear_damaged
from nightshift.records.versions import ModelCard, card_key, read_card
from nightshift.refs import ChampionRef
from nightshift.storage import documents
from nightshift.storage.store import Store
from nightshift.text import plain

_LONGEST_REASON = 1000


@dataclass(frozen=True)
class State:
    """How a model's history of champions is, and a sentence about it that says what to do."""

    kind: Literal["whole", "not begun", "missing", "damaged"]
    detail: str

    @property
    def ok(self) -> bool:
        return self.kind in ("whole", "not begun")


def state_of(store: Store, name: str) -> State:
    """The state of the history. It is `missing` if something else names a champion, and no history is there.

    Raises:
        StorageError: it cannot be read, or is of a newer nightshift.
    """
    try:
        return State("whole", f"{read_champion(store, name).version} is the champion of {name}")
    except ModelNotFoundError as error:
        return State("not begun", str(error))
    except HistoryLostError as error:
        return State("missing", str(error))
    except DocumentDamagedError as error:
        return State("damaged", str(error))


def read_champion(store: Store, name: str) -> ChampionRef:
    """The champion.

    Raises:
        ModelNotFoundError: there is none yet.
        HistoryLostError: there was one, and its history is missing.
        StorageError: as `read_history`.
    """
    return champion_of(store, read_history(store, name))


def read_card_of(store: Store, history: History, version: str) -> ModelCard:
    """The card of a version that is or was champion, if it is the one with which it went live.

    Raises:
        DocumentDamagedError: it is gone, or as `read_card`.
        StorageError: as `read_card`.
    """
    try:
        return read_card(store, history.name, version, history.card_sha256(version))
    except ModelNotFoundError:
        raise DocumentDamagedError(
            f"{store.url(card_key(history.name, version))} is missing, though {version} went live. To make it again: "
            f"nightshift republish {version}"
        ) from None


def change_champion(store: Store, name: str, decision: str, decide: Callable[[History], Transition | None]) -> History:
    """Append what `decide` makes of the history, unless this decision is in it already; return the history after it.

    `decide` is asked again whenever somebody else has changed the history meanwhile: nothing is ever decided on
    one that is out of date. That also makes a lost response harmless, for the decision is found then.

    Raises:
        HistoryLostError: the history is missing, and there was one.
        DocumentDamagedError, DocumentNewerError: as `documents.read`.
        StorageError: it may or may not have been written; the same decision made again finds out.
    """

    def append(history: History) -> History | None:
        if history.find(decision) or not (transition := decide(history)):
            return None
        return history.then(transition)

    return _change(store, name, append)


def promote_by_hand(store: Store, name: str, version: str, reason: str = "") -> ChampionRef:
    """Make a published version the champion, whatever the gate would say. Nothing happens if it is that already.

    If it is, and its card has changed since, the new card is trusted from now on. A pin stays as it is. A damaged
    history that cannot be rebuilt is started anew.

    Raises:
        ModelNotFoundError: no such version is published.
        StorageError: as `change_champion`.
    """
    card = read_card(store, name, version)
    clear_damaged(store, name)
    return _change_by_hand(store, name, "promoted by hand", lambda history: card, reason)


def roll_back(store: Store, name: str, version: str | None = None, reason: str = "") -> ChampionRef:
    """Make an earlier champion the champion again: the named one, or the one before the present one.

    Raises:
        ModelNotFoundError: there is none, or the named one never was champion; the message lists those that were.
        StorageError: as `change_champion`.
    """

    def earlier(history: History) -> ModelCard:
        champion = champion_of(store, history)
        earlier = version or history.before(champion.version)
        if earlier is None:
            raise ModelNotFoundError(f"there is nothing to roll back to: {champion.version} was the first champion")
        if earlier in history.retired:
            raise ModelNotFoundError(_gone(history, earlier))
        if earlier not in history.versions:
            known = ", ".join(history.versions)
            raise ModelNotFoundError(f"{earlier!r} never was champion of {name}. Those that were: {known}")
        return read_card_of(store, history, earlier)

    return _change_by_hand(store, name, "rolled back", earlier, reason)


def pin(store: Store, name: str, reason: str = "") -> History:
    """Let no candidate go live by itself until `unpin`; a person still may change the champion. Returns the history.

    Raises:
        ModelNotFoundError: there is no champion to pin.
        StorageError: as `change_champion`.
    """
    return _pin(store, name, "pinned", reason)


def unpin(store: Store, name: str, reason: str = "") -> History:
    """Take the pin away; as `pin`."""
    return _pin(store, name, "unpinned", reason)


def _pin(store: Store, name: str, what: Literal["pinned", "unpinned"], reason: str) -> History:
    decision = processes.new_writer_id()

    def append(history: History) -> History | None:
        champion = champion_of(store, history)
        if bool(history.pin) == (what == "pinned"):
            return None
        made = Pin(
            id=decision,
            at=store.now(),
            what=what,
            version=champion.version,
            who=processes.user_at_host(),
            reason=_reason(reason),
        )
        return history.changed(pins=[*history.pins, made])

    return _change(store, name, append)


def _change_by_hand(
    store: Store,
    name: str,
    what: Literal["promoted by hand", "rolled back"],
    choose: Callable[[History], ModelCard],
    reason: str,
) -> ChampionRef:
    decision = processes.new_writer_id()

    def decide(history: History) -> Transition | None:
        card = choose(history)
        if card.version in history.retired:
            raise ModelNotFoundError(_gone(history, card.version))
        is_known = history.card_sha256(card.version) in (None, card.sha256)
        if history.champion and history.champion.version == card.version and is_known:
            return None
        return history.next(card, id=decision, at=store.now(), what=what, reason=_reason(reason))

    champion = change_champion(store, name, decision, decide).champion
    assert champion is not None
    return champion


def _gone(history: History, version: str) -> str:
    return (
        f"{version} of {history.name} is gone: it was older than NIGHTSHIFT_KEEP__NIGHTS or NIGHTSHIFT_KEEP__MODELS "
        f"allow. Those that are left: {', '.join(history.versions)}"
    )


def _reason(given: str) -> str:
    return plain(given)[:_LONGEST_REASON] or "as told on the command line"


def _change(store: Store, name: str, append: Callable[[History], History | None]) -> History:
    """Store what `append` makes of the history, None where nothing is to change, and then its copy."""

    def change(found: History | None) -> History | None:
        history = found or History(name=name)
        if not history.transitions:
            check_never_begun(store, name)
        return append(history) or found

    history = documents.change(store, history_key(name), History, change) or History(name=name)
    if history.transitions:
        keep_copy(store, history)
    return history


def champion_of(store: Store, history: History) -> ChampionRef:
    """The champion that a stored history names.

    Raises:
        ModelNotFoundError: there is none yet.
        HistoryLostError: there was one, and the history is missing.
        StorageError: it cannot be found out.
    """
    if not history.champion:
        check_never_begun(store, history.name)
        raise ModelNotFoundError(
            f"{history.name} has no champion yet: the first run that passes the gate becomes it (`nightshift train`), "
            "or promote one by hand (`nightshift promote RUN`)"
        )
    return history.champion
