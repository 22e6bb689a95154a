"""Which published version of a model is the champion.

It is the last entry of a history in `models/<name>/champion.json`, which is only ever appended to, by
compare-and-swap. The history names nothing that is not published.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field

from nightshift import processes
from nightshift.errors import ModelNotFoundError, ObjectNotFoundError
from nightshift.ids import RunId, Sha256
from nightshift.records.keys import MODELS
from nightshift.records.versions import ModelCard, read_card
from nightshift.refs import ChampionRef, Comparison
from nightshift.storage import documents
from nightshift.storage.documents import Document, Part
from nightshift.storage.store import Store
from nightshift.values import Line, Moment, Share, Text


class Transition(Part):
    """A version became champion: when, how, in whose place and why."""

    id: Line
    """A decision that is repeated has the same one: it is found in the history and not made again."""
    at: Moment
    what: Literal["promoted", "promoted by hand", "rolled back"]
    version: RunId
    run_id: RunId
    test_accuracy: Share
    weights_sha256: Sha256 | None = None
    """None in histories that an older nightshift has written; so is `card_sha256`."""
    card_sha256: Sha256 | None = None
    """The sha256 in the version's card then."""
    previous: RunId | None
    by: Line
    reason: Text
    comparison: Comparison | None = None


class History(Document):
    """All transitions of a model, oldest first; the last one says who is champion."""

    title: ClassVar[str] = "history of champions"
    if_damaged: ClassVar[str] = "Bring an older version of the object back if the bucket keeps them"
    max_bytes: ClassVar[int] = 8 * documents.MIB

    format: Literal[1] = 1
    name: RunId
    transitions: list[Transition] = Field(default_factory=list)

    def check(self, key: str) -> None:
        if key != _champion_key(self.name):
            raise ValueError(f"it is the history of {self.name}, copied from elsewhere")

    @property
    def champion(self) -> ChampionRef | None:
        return self._ref(self.transitions[-1]) if self.transitions else None

    def find(self, decision: str) -> Transition | None:
        """The transition that this decision made."""
        return next((transition for transition in self.transitions if transition.id == decision), None)

    def card_sha256(self, version: str) -> str | None:
        """The sha256 in the card of a version when it went live last; None if it never did, or nobody wrote it down."""
        known = [entry.card_sha256 for entry in self.transitions if entry.version == version and entry.card_sha256]
        return known[-1] if known else None

    def before(self, version: str) -> str | None:
        """Which version was champion before this one was promoted last."""
        promotions = [entry for entry in self.transitions if entry.version == version and entry.what != "rolled back"]
        return promotions[-1].previous if promotions else None

    @property
    def rejected_by_hand(self) -> list[str]:
        """The versions from which somebody rolled back, and which nobody has promoted by hand since."""
        rejected: list[str] = []
        for entry in self.transitions:
            if entry.what == "rolled back" and entry.previous:
                rejected.append(entry.previous)
            elif entry.what == "promoted by hand":
                rejected = [version for version in rejected if version != entry.version]
        return rejected

    @property
    def since_last_change_by_hand(self) -> list[Transition]:
        """The newest transitions: the last one that a person has made, and all after it."""
        by_hand = [number for number, entry in enumerate(self.transitions) if entry.what != "promoted"]
        return self.transitions[by_hand[-1] if by_hand else 0 :]

    def next(self, card: ModelCard, **fields: Any) -> Transition:
        """The transition that makes the version with this card the champion; `fields`: the others of Transition."""
        return Transition(
            version=card.version,
            run_id=card.run_id,
            test_accuracy=card.test_accuracy,
            weights_sha256=card.weights_sha256,
            card_sha256=card.sha256,
            previous=self.champion.version if self.champion else None,
            by=processes.new_writer_id(),
            **fields,
        )

    def _ref(self, transition: Transition) -> ChampionRef:
        fields = transition.model_dump(include={"version", "run_id", "test_accuracy", "previous"})
        return ChampionRef(name=self.name, **fields)


def read_history(store: Store, name: str) -> History:
    """A model's history, empty if there never was a champion.

    Raises:
        StorageError: it cannot be read, is damaged, or is of a newer nightshift.
    """
    try:
        return documents.read(store, _champion_key(name), History)[0]
    except ObjectNotFoundError:
        return History(name=name)


def read_champion(store: Store, name: str) -> ChampionRef:
    """The champion.

    Raises:
        ModelNotFoundError: there is none yet.
    """
    return champion_of(read_history(store, name))


def read_card_of(store: Store, history: History, version: str) -> ModelCard:
    """The card of a version that is or was champion, if it is the one with which it went live.

    Raises:
        ModelNotFoundError, DocumentDamagedError, StorageError: as `read_card`.
    """
    return read_card(store, history.name, version, history.card_sha256(version))


def change_champion(store: Store, name: str, decision: str, decide: Callable[[History], Transition | None]) -> History:
    """Append what `decide` makes of the history, unless this decision is in it already; return the history after it.

    `decide` is asked again whenever somebody else has changed the history meanwhile: nothing is ever decided on
    one that is out of date. That also makes a lost response harmless, for the decision is found then.

    Raises:
        StorageError: it may or may not have been written; the same decision made again finds out.
    """

    def append(found: History | None) -> History | None:
        history = found or History(name=name)
        if history.find(decision) or not (transition := decide(history)):
            return found
        return history.changed(transitions=[*history.transitions, transition])

    return documents.change(store, _champion_key(name), History, append) or History(name=name)


def promote_by_hand(store: Store, name: str, version: str) -> ChampionRef:
    """Make a published version the champion, whatever the gate would say. Nothing happens if it is that already.

    If it is, but its card was changed since, the card is believed from now on.

    Raises:
        ModelNotFoundError: no such version is published.
    """
    card = read_card(store, name, version)
    return _change_by_hand(store, name, "promoted by hand", lambda history: card)


def roll_back(store: Store, name: str, version: str | None = None) -> ChampionRef:
    """Make an earlier champion the champion again: the named one, or the one before the present one.

    Raises:
        ModelNotFoundError: there is none, or the named one never was champion; the message lists those that were.
    """

    def earlier(history: History) -> ModelCard:
        champion = champion_of(history)
        earlier = version or history.before(champion.version)
        known = list(dict.fromkeys(entry.version for entry in history.transitions))
        if earlier is None:
            raise ModelNotFoundError(f"there is nothing to roll back to: {champion.version} was the first champion")
        if earlier not in known:
            raise ModelNotFoundError(f"{earlier!r} never was champion of {name}. Those that were: {', '.join(known)}")
        return read_card_of(store, history, earlier)

    return _change_by_hand(store, name, "rolled back", earlier)


def _change_by_hand(store: Store, name: str, what: str, choose: Callable[[History], ModelCard]) -> ChampionRef:
    decision = processes.new_writer_id()

    def decide(history: History) -> Transition | None:
        card = choose(history)
        is_known = history.card_sha256(card.version) in (None, card.sha256)
        if history.champion and history.champion.version == card.version and is_known:
            return None
        return history.next(card, id=decision, at=store.now(), what=what, reason="as told on the command line")

    champion = change_champion(store, name, decision, decide).champion
    assert champion is not None
    return champion


def champion_of(history: History) -> ChampionRef:
    """The champion; raises ModelNotFoundError if there is none yet."""
    if not history.champion:
        raise ModelNotFoundError(
            f"{history.name} has no champion yet: the first run that passes the gate becomes it (`nightshift train`), "
            "or promote one by hand (`nightshift promote RUN`)"
        )
    return history.champion


def _champion_key(name: str) -> str:
    return f"{MODELS}{name}/champion.json"
