"""The last nights, a line each: did it train, is it better, what did it cost."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from itertools import islice

from pydantic import BaseModel, ValidationError

from nightshift import progress
from nightshift.errors import (
    ConfigError,
    DocumentDamagedError,
    DocumentNewerError,
    ObjectNotFoundError,
    ObjectTooLargeError,
    StorageDeniedError,
)
from nightshift.ids import Sha256, parse_dataset_name
from nightshift.judging.goodput import account
from nightshift.records import history, snapshots
from nightshift.records.keys import report_key
from nightshift.records.lease import status_of
from nightshift.records.run import READERS, RunRecord, newest_records
from nightshift.records.times import cost
from nightshift.storage.store import Store
from nightshift.tracking.metrics import read_lines
from nightshift.values import FROZEN, LARGEST_EVALUATION, Count, Share


class Night(BaseModel):
    """A run that asked the gate, or was to."""

    run_id: str
    dataset: str
    at: datetime
    """When it began."""
    status: str
    promoted: bool | None
    """By the gate; None if it was not asked yet."""
    promoted_by_hand: str | None
    """Who has promoted it by hand last, and why; None: nobody."""
    reason: str
    """The gate's, or why the run stopped."""
    test_accuracy: float | None
    interval: tuple[float, float] | None
    """95 % interval of the accuracy; None in what an older nightshift has left."""
    test_images: int | None
    train_seconds: float
    last_step: int | None
    """The step with which the clock has ended the training; None if it did not."""
    goodput: float | None
    """Which share of the time from schedule to verdict went into steps that were kept; None if it was not noted."""
    cost: float | None
    """Of all its hours with a machine, in the currency of the price."""
    parent: str | None
    """What it began with; None: random weights."""
    snapshot: str


class Refused(BaseModel):
    """Images that broke a rule, so that no run was made of them. Nights that find the same again are not told apart."""

    dataset: str
    at: datetime
    """When a night first found them so."""
    reason: str
    snapshot: str


class _Measured(BaseModel):
    """What a night needs of `evaluation.json`."""

    model_config = FROZEN

    weights_sha256: Sha256
    images: Count
    interval: tuple[Share, Share]


def last_nights(store: Store, name: str | None, limit: int, price_per_hour: float | None) -> list[Night]:
    """The newest runs that were to ask the gate, newest first.

    Args:
        name: of a data set, or None for all.

    Raises:
        StorageError: the store cannot be read.
    """
    now = store.now()
    nights = (
        record
        for record in newest_records(store)
        if record.origin.promote and (name is None or record.dataset.name == name)
    )
    records = list(islice(nights, limit))
    by_hand: dict[str, str] = {}
    for model in {record.dataset.name for record in records}:
        with _left_out_if_unreadable():
            for entry in history.read_history(store, model).transitions:
                if entry.what == "promoted by hand":
                    by_hand[entry.run_id] = f"{entry.author}: {entry.reason}"
    return progress.in_threads(
        lambda record: _night(store, record, by_hand.get(record.run_id), now, price_per_hour), records, READERS
    )


def refused_nights(store: Store, name: str | None, nights: Sequence[Night], limit: int) -> list[Refused]:
    """What was refused since the oldest of these nights, newest first: of their data sets, and of that called `name`.

    Raises:
        StorageError: the store cannot be read.
    """
    names = {*(night.dataset for night in nights), *([name] if name else [])}
    since = nights[-1].at if len(nights) == limit else None
    refused: list[Refused] = []
    for dataset in names:
        with _left_out_if_unreadable():
            refused += [
                Refused(
                    dataset=dataset,
                    at=entry.at,
                    reason="; ".join(finding.detail for finding in entry.findings if not finding.ok),
                    snapshot=entry.digest,
                )
                for entry in snapshots.read_history(store, parse_dataset_name(dataset)).entries
                if not entry.ok and (since is None or entry.at > since)
            ]
    return sorted(refused, key=lambda refused: refused.at, reverse=True)[:limit]


@contextmanager
def _left_out_if_unreadable() -> Iterator[None]:
    try:
        yield
    except (DocumentDamagedError, DocumentNewerError, StorageDeniedError) as error:
        progress.current().warn(str(error))
    except ConfigError:
        pass  # no data set can be called so


def _night(store: Store, record: RunRecord, by_hand: str | None, now: datetime, price_per_hour: float | None) -> Night:
    verdict = record.result.verdict if record.result else None
    measured = _measured(store, record)
    spent = account(record, read_lines(store, record.run_id))
    stopped = record.events[-1].detail if record.status in ("failed", "cancelled", "interrupted") else ""
    return Night(
        run_id=record.run_id,
        dataset=record.dataset.name,
        at=record.created_at,
        status=status_of(record, now),
        promoted=verdict.promoted if verdict else None,
        promoted_by_hand=by_hand,
        reason=verdict.reason if verdict else stopped,
        test_accuracy=record.test_accuracy,
        interval=measured.interval if measured else None,
        test_images=measured.images if measured else None,
        train_seconds=record.train_seconds,
        last_step=record.last_step,
        goodput=spent.goodput if spent else None,
        cost=cost(record, price_per_hour),
        parent=str(record.parent) if record.parent else None,
        snapshot=record.dataset.digest,
    )


def _measured(store: Store, record: RunRecord) -> _Measured | None:
    """What was measured of the weights that the record names."""
    if not record.result:
        return None
    try:
        body, _ = store.get(report_key(record.run_id, "evaluation.json"), LARGEST_EVALUATION)
        found = _Measured.model_validate_json(body)
    except (ObjectNotFoundError, ObjectTooLargeError, ValidationError):
        return None
    return found if found.weights_sha256 == record.result.weights_sha256 else None
