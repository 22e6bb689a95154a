"""Rebuilding a history of champions that was deleted or damaged, and finding out whether there should be one.

The copy beside it has all of it, except a last change whose writer was killed before copying. Without a copy, the
verdicts in the run records show the promotions, and the newest verdict shows which version was live then. They show
neither what a person has changed since, nor pins.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from nightshift.records.run import READERS, Result, RunRecord, listed_records
from nightshift.records.versions import read_card
from nightshift.refs import Verdict
from nightshift.storage import documents
from nightshift.storage.store import Store, Stored


@dataclass(frozen=True)
class _Run:
    """What a record tells of the champions."""

    run_id: str
    name: str
    """Of the model."""
    ended: datetime
    owner: str
    result: Result | None

    @property
    def verdict(self) -> Verdict | None:
        return self.result.verdict if self.result else None


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
        if not store.head(copy_key(name)):
            _warn_of_copy(store, name, "missing")
        documents.write(store, key, history, etag)
        return history

    history = documents.settled(store.url(key), once)
    keep_copy(store, history)
    return history


def clear_damaged(store: Store, name: str) -> None:
    """Replace a damaged history with an empty one, so that somebody can begin anew. Only if nothing tells of champions.

    Raises:
        DocumentDamagedError: its copy or the run records tell of champions.
        StorageError: as `told`; or it may or may not have been written.
    """
    key = history_key(name)
    damaged = store.head(key)
    try:
        documents.read(store, key, History)
    except ObjectNotFoundError:
        return
    except DocumentDamagedError:
        if told(store, name) or not damaged:
            raise
        documents.write(store, key, History(name=name), damaged.etag)


def told(store: Store, name: str) -> History | None:
    """The history as its copy and the run records tell it; None if they tell of no champion.

    Raises:
        DocumentNewerError: a newer nightshift wrote the copy.
        StorageError: they cannot be read.
    """
    history = _copy(store, name)
    since = history.transitions[-1].at if history.transitions else None
    judged = sorted((run for run in _runs(store) if run.name == name and run.verdict), key=lambda run: run.ended)
    transitions, known = list(history.transitions), {entry.version for entry in history.transitions}
    for run in judged:
        if run.verdict and run.verdict.promoted and run.run_id not in known and (not since or run.ended > since):
            transitions.append(_promotion(store, run, transitions))
    if not since:
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
    """Raise HistoryLostError if a published version, not the candidate, has no readable record: it may have been live.

    Also if there is a copy, though damaged. Call this if no history is stored and `check_never_begun` found nothing.
    """
    if store.head(copy_key(name)):
        raise HistoryLostError(
            f"{store.url(history_key(name))} is missing, its copy is damaged, and no record tells of a champion. To "
            "begin anew with a champion of your choice: nightshift promote RUN"
        )
    known = {candidate, *(run.run_id for run in _runs(store))}
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
    except DocumentDamagedError:
        _warn_of_copy(store, name, "damaged")
        return History(name=name)


def _warn_of_copy(store: Store, name: str, state: str) -> None:
    progress.current().warn(
        f"{store.url(copy_key(name))} is {state}, so the run records alone tell who was champion: what people have "
        "promoted, rolled back or pinned is not in them"
    )


def _runs(store: Store) -> list[_Run]:
    """What all records but damaged and newer ones tell. A failed read is an error: that record may name a champion."""

    def read(item: Stored) -> _Run | None:
        try:
            documents.check_size(item.size, store.url(item.key), RunRecord)
            record, _ = documents.read(store, item.key, RunRecord)
        except ObjectNotFoundError:
            return None
        except (DocumentDamagedError, DocumentNewerError) as error:
            progress.current().warn(str(error))
            return None
        ended = [event.at for event in record.events if event.what == "finished"] or [record.updated_at]
        return _Run(record.run_id, record.dataset.name, ended[-1], record.lease.owner, record.result)

    with ThreadPoolExecutor(READERS) as pool:
        return list(filter(None, pool.map(read, listed_records(store))))


def _promotion(store: Store, run: _Run, before: list[Transition]) -> Transition:
    assert run.result
    assert run.verdict
    return Transition(
        id=f"gate/{run.run_id}",
        at=run.ended,
        what="promoted",
        version=run.run_id,
        run_id=run.run_id,
        test_accuracy=run.result.test_accuracy,
        weights_sha256=run.result.weights_sha256,
        card_sha256=_card_sha256(store, run.name, run.run_id, run.result.weights_sha256),
        previous=before[-1].version if before else None,
        by=run.owner,
        reason=run.verdict.reason,
        comparison=run.verdict.comparison,
    )


def _last_pointer(judged: list[_Run], before: list[Transition]) -> list[Transition]:
    """The change by hand, if there was one, after which a verdict names another champion than the last promoted."""
    named = [(run, run.verdict.champion) for run in judged if run.verdict and run.verdict.champion]
    if not named or (before and before[-1].version == named[-1][1].version):
        return []
    run, live = named[-1]
    was_live = any(entry.version == live.version for entry in before)
    return [
        Transition(
            id=f"rebuilt/{run.run_id}",
            at=run.ended,
            what="rolled back" if was_live else "promoted by hand",
            version=live.version,
            run_id=live.run_id,
            test_accuracy=live.test_accuracy,
            previous=before[-1].version if before else None,
            by=processes.new_writer_id(),
            reason=f"it was live when the gate judged {run.run_id}",
        )
    ]


def _card_sha256(store: Store, name: str, version: str, weights_sha256: str) -> str | None:
    """That of the card as it is now, if it is of these weights."""
    try:
        card = read_card(store, name, version)
    except (ModelNotFoundError, DocumentDamagedError, DocumentNewerError):
        return None
    return card.sha256 if card.weights_sha256 == weights_sha256 else None
