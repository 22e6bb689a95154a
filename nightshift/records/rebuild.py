"""Making a history of champions again that was deleted or damaged, and telling that there should be one.

The copy beside it has all of it, but for a last change whose writer was killed before the copy. Without a copy the
verdicts in the run records tell the promotions, and the newest of them which version was live then. What a person has
changed since, and pins, they do not tell.
"""

from datetime import datetime

from nightshift import processes, progress
from nightshift.errors import (
    DocumentDamagedError,
    DocumentNewerError,
    HistoryLostError,
    ModelNotFoundError,
    ObjectNotFoundError,
)
from nightshift.records.history import History, Transition, copy_key, history_key, keep_copy, read_copy
from nightshift.records.keys import MODELS, place_of
from nightshift.records.run import RunRecord, newest_records
from nightshift.records.versions import read_card
from nightshift.refs import Verdict
from nightshift.storage import documents
from nightshift.storage.store import Store

_Judged = tuple[datetime, RunRecord, Verdict]
"""When a run was finished, its record, and the gate's verdict in it."""


def rebuild(store: Store, name: str) -> History:
    """Make the history of a model again, and store it. One that is whole stays as it is.

    Raises:
        ModelNotFoundError: neither a copy nor a record tells of a champion.
        DocumentNewerError: a newer nightshift wrote it.
        StorageError: it may or may not have been written.
    """
    key = history_key(name)

    def once() -> History:
        etag: str | None = None
        try:
            found, etag = documents.read(store, key, History)
            if found.transitions:
                return found
        except ObjectNotFoundError:
            pass
        except DocumentDamagedError:
            damaged = store.head(key)
            etag = damaged.etag if damaged else None
        history = told(store, name)
        if not history:
            raise ModelNotFoundError(
                f"nothing tells which version of {name} was live: there is no whole {store.url(copy_key(name))}, and "
                "no run record names a champion. To begin anew: nightshift promote RUN"
            )
        documents.write(store, key, history, etag)
        return history

    history = documents.settled(store.url(key), once)
    keep_copy(store, history)
    return history


def told(store: Store, name: str) -> History | None:
    """The history as its copy and the run records tell it; None if they tell of no champion.

    Raises:
        DocumentNewerError: a newer nightshift wrote the copy.
        StorageError: they cannot be read.
    """
    history = _copy(store, name)
    since = history.transitions[-1].at if history.transitions else None
    judged = _judged(store, name)
    transitions = list(history.transitions)
    known = set(history.versions)
    for at, record, verdict in judged:
        if verdict.promoted and record.run_id not in known and (since is None or at > since):
            transitions.append(_promotion(store, name, at, record, verdict, transitions))
    if since is None:
        transitions += _last_pointer(judged, transitions)
    return history.changed(transitions=transitions) if transitions else None


def check_never_begun(store: Store, name: str) -> None:
    """Raise HistoryLostError if something tells of a champion: for where no history is stored."""
    if told(store, name):
        raise HistoryLostError(
            f"{store.url(history_key(name))} is missing, though its copy or the run records tell of champions: nobody "
            "can say which version is live, and none goes live by itself. To make it again: "
            "nightshift champion --rebuild"
        )


def check_explained(store: Store, name: str, candidate: str) -> None:
    """Raise HistoryLostError if a published version but the candidate has no readable record: it may have been live.

    For where no history is stored, and `check_never_begun` has found nothing.
    """
    known = {candidate, *(record.run_id for record in newest_records(store))}
    for item in store.list(f"{MODELS}{name}/"):
        place = place_of(item.key)
        if place and item.key.endswith("/card.json") and place.run_id not in known:
            raise HistoryLostError(
                f"{store.url(history_key(name))} is missing, {place.run_id} is published, and no readable record says "
                "whether it was live. To begin anew with a champion of your choice: nightshift promote RUN"
            )


def _copy(store: Store, name: str) -> History:
    try:
        return read_copy(store, name)
    except DocumentDamagedError as error:
        progress.current().warn(f"the copy is damaged too, so the run records decide: {error}")
        return History(name=name)


def _judged(store: Store, name: str) -> list[_Judged]:
    """In the order in which they were finished."""
    found: list[_Judged] = []
    for record in newest_records(store):
        verdict = record.result.verdict if record.result else None
        if verdict and record.dataset.name == name:
            ended = [event.at for event in record.events if event.what == "finished"]
            found.append((ended[-1] if ended else record.updated_at, record, verdict))
    return sorted(found, key=lambda judged: judged[0])


def _promotion(
    store: Store, name: str, at: datetime, record: RunRecord, verdict: Verdict, before: list[Transition]
) -> Transition:
    assert record.result
    return Transition(
        id=f"gate/{record.run_id}",
        at=at,
        what="promoted",
        version=record.run_id,
        run_id=record.run_id,
        test_accuracy=record.result.test_accuracy,
        weights_sha256=record.result.weights_sha256,
        card_sha256=_card_sha256(store, name, record.run_id, record.result.weights_sha256),
        previous=before[-1].version if before else None,
        by=record.lease.owner,
        reason=verdict.reason,
        comparison=verdict.comparison,
    )


def _last_pointer(judged: list[_Judged], before: list[Transition]) -> list[Transition]:
    """The change by hand, if there was one, after which a verdict names another champion than the last promoted."""
    named = [(at, record, verdict.champion) for at, record, verdict in judged if verdict.champion]
    if not named or (before and before[-1].version == named[-1][2].version):
        return []
    at, record, live = named[-1]
    was_live = any(entry.version == live.version for entry in before)
    return [
        Transition(
            id=f"rebuilt/{record.run_id}",
            at=at,
            what="rolled back" if was_live else "promoted by hand",
            version=live.version,
            run_id=live.run_id,
            test_accuracy=live.test_accuracy,
            previous=before[-1].version if before else None,
            by=processes.new_writer_id(),
            reason=f"it was live when the gate judged {record.run_id}",
        )
    ]


def _card_sha256(store: Store, name: str, version: str, weights_sha256: str) -> str | None:
    """That of the card as it is now, if it is of these weights."""
    try:
        card = read_card(store, name, version)
    except (ModelNotFoundError, DocumentDamagedError, DocumentNewerError):
        return None
    return card.sha256 if card.weights_sha256 == weights_sha256 else None
