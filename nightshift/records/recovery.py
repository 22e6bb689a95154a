"""Finding interrupted runs, and starting each again once, however many processes look for them.

Whoever starts a run again first notes that in its record, by compare-and-swap: if two try, one fails. Even an extra
start would do no harm, since the lease lets only one train. A problem with one run does not keep the others from being
started.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from nightshift import processes, progress
from nightshift.errors import Interrupted, PreconditionFailedError, RunNotFoundError, StorageUnreachableError
from nightshift.records.index import Known
from nightshift.records.keys import record_key
from nightshift.records.lease import is_live
from nightshift.records.run import RunRecord, listed_records, read_record, read_records, write_record
from nightshift.storage.store import Store

FIRST_PAUSE = timedelta(minutes=2)
"""The pause between two starts of a run that makes no progress; it doubles each time."""
LONGEST_PAUSE = timedelta(hours=1)


@dataclass(frozen=True)
class Found:
    """The runs that were written to lately and are not over."""

    live: list[str]
    """Run ids; a trainer holds the lease of each."""
    interrupted: list["InterruptedRun"]


@dataclass(frozen=True)
class InterruptedRun:
    """A run nobody trains, and the version of its record that says so."""

    record: RunRecord
    etag: str

    @property
    def due(self) -> datetime:
        """The earliest moment at which it is to be started again."""
        recoveries = self.record.recoveries
        stuck = sum(event.step == self.record.step for event in recoveries)
        if not stuck:  # at once, and not when it was written to last: that may lie a moment ahead of the store's clock
            return self.record.created_at
        doublings = min(stuck - 1, 16)  # 2 to the power of more does not fit a timedelta
        return recoveries[-1].at + min(FIRST_PAUSE * (1 << doublings), LONGEST_PAUSE)


def find(store: Store, within: timedelta) -> Found:
    """The runs that were written to `within` this time and are not over.

    One listing; of the records it names, those that the index knows to be over are not read.

    Raises:
        StorageError: the store cannot be listed.
    """
    now = store.now()
    recent = [item for item in listed_records(store) if now - item.modified < within]
    _, unknown = Known(store).split(recent)
    found = Found([], [])
    for record, etag in read_records(store, unknown):
        if record.status == "running" and is_live(record.lease, now):
            found.live.append(record.run_id)
        elif record.status in ("running", "interrupted"):
            found.interrupted.append(InterruptedRun(record, etag))
    return found


def claim_due(store: Store, interrupted: Iterable[InterruptedRun], max_recoveries: int) -> Iterator[RunRecord]:
    """The runs that are due, each after it was written down as started again by us.

    Whoever takes a record from here starts that run before taking the next. A run that was started again
    `max_recoveries` times is given up, and one that another has claimed meanwhile is left out.

    Raises:
        StorageUnreachableError: the store does not answer.
    """
    for run in interrupted:
        is_ours = False
        with apart(store, run.record.run_id):
            is_ours = _claim(store, run, max_recoveries)
        if is_ours:
            yield run.record


@contextmanager
def apart(
    store: Store, run_id: str, is_everybodys: Callable[[Exception], bool] = lambda error: False
) -> Iterator[None]:
    """Turn an error with one run into a warning that names its record, so that the next run has its turn.

    Raises:
        StorageUnreachableError: the store does not answer.
        Interrupted: this process is to stop.
        Exception: `is_everybodys` says of it that the next run would meet it too.
    """
    try:
        yield
    except (StorageUnreachableError, Interrupted):
        raise
    except Exception as error:
        if is_everybodys(error):
            raise
        why = str(error) or type(error).__name__
        progress.current().warn(f"run {run_id} is not started again: {why} ({store.url(record_key(run_id))})")


def _claim(store: Store, run: InterruptedRun, max_recoveries: int) -> bool:
    record, now = run.record, store.now()
    number = len(record.recoveries) + 1
    if number > max_recoveries:
        give_up(store, record.run_id, max_recoveries)
    elif now < run.due:
        progress.current().say(f"run {record.run_id} waits until {run.due:%H:%M:%S} UTC for its next start")
    else:
        detail = f"start {number} of at most {max_recoveries}"
        return _written(store, run, record.with_event("recovered", now, detail))
    return False


def give_up(store: Store, run_id: str, max_recoveries: int) -> str:
    """Mark a run failed that was started again as often as is allowed; return a message for people."""
    close(store, run_id, "failed", f"started again {max_recoveries} times")
    message = (
        f"run {run_id} was started again {max_recoveries} times and is given up (NIGHTSHIFT_MAX_RECOVERIES). Look at "
        f"it with `nightshift show {run_id}`; `nightshift resume {run_id}` goes on with it all the same"
    )
    progress.current().warn(message)
    return message


def close(store: Store, run_id: str, status: Literal["cancelled", "failed"], detail: str = "") -> None:
    """Write down that a run is never to be started again by itself. One that is live or over is left alone."""
    with suppress(RunNotFoundError):  # it was stopped before it was created
        record, etag = read_record(store, run_id)
        now = store.now()
        if record.status in ("running", "interrupted") and not is_live(record.lease, now):
            _written(store, InterruptedRun(record, etag), record.changed(status=status).with_event(status, now, detail))


@contextmanager
def closed_if_it_fails(store: Store, run_id: str) -> Iterator[None]:
    """Mark the run failed if the block ends with an error that will always come: nothing is to start it again then."""
    try:
        yield
    except Exception as error:
        if not getattr(error, "transient", False) and not isinstance(error, Interrupted):
            close(store, run_id, "failed", str(error) or type(error).__name__)
        raise


def _written(store: Store, run: InterruptedRun, record: RunRecord) -> bool:
    """Put `record`, and return whether that worked: nobody else has written to the run since it was read."""
    # Signed, so that a write whose response was lost is known for ours, and no two writers write the same bytes.
    event = record.events[-1].changed(owner=processes.new_writer_id())
    ours = record.changed(sequence=record.sequence + 1, updated_at=event.at, events=[*record.events[:-1], event])
    try:
        write_record(store, ours, run.etag)
    except PreconditionFailedError:
        return read_record(store, record.run_id)[0] == ours
    return True
