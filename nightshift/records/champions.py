"""Published versions of a model, and which of them is the champion.

A version is immutable files under `models/<name>/<version>/`. It is named after its run, so that publishing
twice writes the same files again. `card.json` is written last: a version without it is not published.

The champion is the last entry of a history in `models/<name>/champion.json`, which is only ever appended to,
by compare-and-swap. It names nothing that is not published.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from nightshift import processes
from nightshift.errors import ModelNotFoundError, ObjectNotFoundError, PreconditionFailedError, StorageError
from nightshift.ids import RunId
from nightshift.records.versions import MODELS, read_card
from nightshift.refs import ChampionRef, Comparison
from nightshift.storage.documents import sealed, unsealed
from nightshift.storage.s3 import S3


class Transition(BaseModel):
    """Someone became champion: when, how, in whose place and why."""

    model_config = ConfigDict(frozen=True)

    id: str
    """A decision that is repeated has the same one: it is found in the history and not made again."""
    at: AwareDatetime
    what: Literal["promoted", "promoted by hand", "rolled back"]
    version: str
    run_id: RunId
    test_accuracy: float
    previous: str | None
    by: str
    reason: str
    comparison: Comparison | None = None


class History(BaseModel):
    """All transitions of a model, oldest first; the last one says who is champion."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    name: str
    transitions: list[Transition] = Field(default_factory=list)

    @property
    def champion(self) -> ChampionRef | None:
        return self._ref(self.transitions[-1]) if self.transitions else None

    def find(self, decision: str) -> Transition | None:
        """The transition with this id."""
        return next((transition for transition in self.transitions if transition.id == decision), None)

    def before(self, version: str) -> str | None:
        """Which version was champion before this one was promoted last."""
        promotions = [entry for entry in self.transitions if entry.version == version and entry.what != "rolled back"]
        return promotions[-1].previous if promotions else None

    def next(self, card: Mapping[str, Any], **fields: Any) -> Transition:
        """The transition that makes the version with this card the champion."""
        return Transition(
            version=card["version"],
            run_id=card["run_id"],
            test_accuracy=card["test_accuracy"],
            previous=self.champion.version if self.champion else None,
            by=processes.signature(),
            **fields,
        )

    def _ref(self, transition: Transition) -> ChampionRef:
        fields = transition.model_dump(include={"version", "run_id", "test_accuracy", "previous"})
        return ChampionRef(name=self.name, **fields)


def read_history(store: S3, name: str) -> tuple[History, str | None]:
    """A model's history, empty if there never was a champion, and its ETag.

    Raises:
        StorageError: it cannot be read, or is damaged.
    """
    key = _champion_key(name)
    try:
        body, etag = store.get(key)
    except ObjectNotFoundError:
        return History(name=name), None
    try:
        return History.model_validate(unsealed(body)), etag
    except (ValueError, AttributeError) as error:  # of which ValidationError and JSONDecodeError are kinds
        raise StorageError(
            f"{store.url(key)} is damaged, or not of this version of nightshift: {error}. Bring an older version of "
            "the object back if the bucket keeps them"
        ) from error


def read_champion(store: S3, name: str) -> ChampionRef:
    """The champion.

    Raises:
        ModelNotFoundError: there is none yet.
    """
    return _champion_of(read_history(store, name)[0])


def change_champion(store: S3, name: str, decision: str, decide: Callable[[History], Transition | None]) -> History:
    """Append what `decide` makes of the history, unless this decision is in it already; the history after it.

    `decide` is asked again whenever somebody else has changed the history meanwhile: nothing is ever decided on
    one that is out of date. That also makes a lost response harmless, for the decision is found then.

    Raises:
        StorageError: it may or may not have been written; the same decision made again finds out.
    """
    while True:
        history, etag = read_history(store, name)
        if history.find(decision) or not (transition := decide(history)):
            return history
        after = history.model_copy(update={"transitions": [*history.transitions, transition]})
        condition: dict[str, Any] = {"if_match": etag} if etag else {"if_absent": True}
        try:
            store.put(_champion_key(name), sealed(after.model_dump(mode="json")), **condition)
        except PreconditionFailedError:
            continue
        return after


def promote_by_hand(store: S3, name: str, version: str) -> ChampionRef:
    """Make a published version the champion, whatever the gate would say; nothing happens if it is that already.

    Raises:
        ModelNotFoundError: no such version is published.
    """
    card = read_card(store, name, version)
    return _change_by_hand(store, name, "promoted by hand", lambda history: card)


def roll_back(store: S3, name: str, version: str | None = None) -> ChampionRef:
    """Make an earlier champion it again: the named one, or the one before the present.

    Raises:
        ModelNotFoundError: there is none, or the named one never was champion; the message lists those that were.
    """

    def earlier(history: History) -> dict[str, Any]:
        champion = _champion_of(history)
        earlier = version or history.before(champion.version)
        known = list(dict.fromkeys(entry.version for entry in history.transitions))
        if earlier is None:
            raise ModelNotFoundError(f"there is nothing to roll back to: {champion.version} was the first champion")
        if earlier not in known:
            raise ModelNotFoundError(f"{earlier!r} never was champion of {name}. Those that were: {', '.join(known)}")
        return read_card(store, name, earlier)

    return _change_by_hand(store, name, "rolled back", earlier)


def _change_by_hand(store: S3, name: str, what: str, choose: Callable[[History], Mapping[str, Any]]) -> ChampionRef:
    decision = processes.signature()

    def decide(history: History) -> Transition | None:
        card = choose(history)
        if history.champion and history.champion.version == card["version"]:
            return None
        return history.next(card, id=decision, at=store.now(), what=what, reason="as told on the command line")

    champion = change_champion(store, name, decision, decide).champion
    assert champion is not None
    return champion


def _champion_of(history: History) -> ChampionRef:
    if not history.champion:
        raise ModelNotFoundError(
            f"{history.name} has no champion yet: the first run that passes the gate becomes it (`nightshift train`), "
            "or promote one by hand (`nightshift promote RUN`)"
        )
    return history.champion


def _champion_key(name: str) -> str:
    return f"{MODELS}{name}/champion.json"
