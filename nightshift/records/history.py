"""What is written down of a model's champions: every change with its reason, and who has pinned which.

It lies in `models/<name>/champion.json`, and only grows. After each change a copy is put beside it. A history that was
deleted or damaged is made again from that (`rebuild`).
"""

from datetime import datetime
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from nightshift import processes, progress
from nightshift.errors import DocumentDamagedError, ObjectNotFoundError, StorageError
from nightshift.ids import RunId, Sha256
from nightshift.records.keys import MODELS
from nightshift.records.versions import ModelCard
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
    """The process that wrote it: HOST/PID and random characters."""
    who: Line = ""
    """The account it ran under: USER@HOST. Empty where nobody wrote it down."""
    reason: Text
    comparison: Comparison | None = None

    @property
    def author(self) -> str:
        """The account, or the host where nobody wrote that down."""
        return self.who or self.by.partition("/")[0]


class Pin(Part):
    """Somebody pinned the champion, or unpinned it: when, who, why, and which version was live then."""

    id: Line
    at: Moment
    what: Literal["pinned", "unpinned"]
    version: RunId
    who: Line
    reason: Text


class History(Document):
    """All transitions of a model, oldest first; the last one says who is champion. `pins` likewise.

    Format 1 has no pins, and format 2 no retired versions. A nightshift that would ignore these refuses a newer format.
    """

    title: ClassVar[str] = "history of champions"
    if_damaged: ClassVar[str] = (
        "Nothing goes live by itself meanwhile. `nightshift champion --rebuild` makes it again from its copy and the "
        "run records"
    )
    max_bytes: ClassVar[int] = 8 * documents.MIB

    format: Literal[3] = 3
    name: RunId
    transitions: list[Transition] = Field(default_factory=list)
    pins: list[Pin] = Field(default_factory=list)
    retired: list[RunId] = Field(default_factory=list)
    """The versions that `retention` has let go of: they may be gone, and nobody can make one live."""

    def check(self, key: str) -> None:
        if key not in (history_key(self.name), copy_key(self.name)):
            raise ValueError(f"it is the history of {self.name}, copied from elsewhere")

    @property
    def champion(self) -> ChampionRef | None:
        return self._ref(self.transitions[-1]) if self.transitions else None

    @property
    def pin(self) -> Pin | None:
        """The pin that holds automatic promotion now."""
        return self.pins[-1] if self.pins and self.pins[-1].what == "pinned" else None

    def find(self, decision: str) -> Transition | None:
        """The transition that this decision made. One about a version that is gone does not count: it may come anew."""
        made = (entry for entry in reversed(self.transitions) if entry.version not in self.retired)
        return next((transition for transition in made if transition.id == decision), None)

    def card_sha256(self, version: str) -> str | None:
        """The sha256 in the card of a version when it went live last; None if it never did, or nobody wrote it down."""
        known = [entry.card_sha256 for entry in self.transitions if entry.version == version and entry.card_sha256]
        return known[-1] if known else None

    def before(self, version: str) -> str | None:
        """Which version was champion before this one was promoted last."""
        promotions = [entry for entry in self.transitions if entry.version == version and entry.what != "rolled back"]
        return promotions[-1].previous if promotions else None

    @property
    def versions(self) -> list[str]:
        """The versions that are or were champion, each once, without those that are retired."""
        return [
            version
            for version in dict.fromkeys(entry.version for entry in self.transitions)
            if version not in self.retired
        ]

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

    def live_since(self, moment: datetime) -> list[Transition]:
        """The transitions of all versions that were live at a moment or later, oldest first.

        None is older than the last transition made by a person.
        """
        by_hand = [number for number, entry in enumerate(self.transitions) if entry.what != "promoted"]
        newest = self.transitions[by_hand[-1] if by_hand else 0 :]
        replaced_by = [*newest[1:], None]
        return [entry for entry, then in zip(newest, replaced_by, strict=False) if not then or then.at > moment]

    def then(self, transition: Transition) -> Self:
        """The history after this transition. What was retired under that name was published anew since."""
        retired = [version for version in self.retired if version != transition.version]
        return self.changed(transitions=[*self.transitions, transition], retired=retired)

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
            who=processes.user_at_host(),
            **fields,
        )

    def goes_on_from(self, other: "History") -> bool:
        """Whether this is the other one, or what it has grown to since."""
        return (
            self.transitions[: len(other.transitions)] == other.transitions
            and self.pins[: len(other.pins)] == other.pins
            and (len(self.transitions) > len(other.transitions) or len(self.retired) >= len(other.retired))
        )

    def _ref(self, transition: Transition) -> ChampionRef:
        fields = transition.model_dump(include={"version", "run_id", "test_accuracy", "previous"})
        return ChampionRef(name=self.name, **fields)


def read_history(store: Store, name: str) -> History:
    """A model's history, empty if none is stored. Whether there should be one says `champions.state_of`.

    Raises:
        StorageError: it cannot be read, is damaged, or is of a newer nightshift.
    """
    return _read(store, name, history_key(name))


def read_copy(store: Store, name: str) -> History:
    """The copy of a model's history; as `read_history`."""
    return _read(store, name, copy_key(name))


def keep_copy(store: Store, history: History) -> None:
    """Put a copy of the history beside it, unless a newer one lies there. If that fails, a warning is all."""

    def newer(found: History | None) -> History:
        return found if found and found.goes_on_from(history) else history

    key = copy_key(history.name)
    try:
        try:
            documents.change(store, key, History, newer)
        except DocumentDamagedError:
            store.put(key, documents.encoded(history))
    except StorageError as error:
        progress.current().warn(f"the copy of {store.url(history_key(history.name))} is out of date: {error}")


def _read(store: Store, name: str, key: str) -> History:
    try:
        return documents.read(store, key, History)[0]
    except ObjectNotFoundError:
        return History(name=name)


def history_key(name: str) -> str:
    return f"{MODELS}{name}/champion.json"


def copy_key(name: str) -> str:
    return f"{MODELS}{name}/champion.copy.json"
