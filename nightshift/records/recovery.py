"""Finding the runs that were interrupted, and taking each up once however many look for them.

Who starts a run again first writes that down in its record, by compare-and-swap: of two that want to, one
fails. Starting one too many would still do no harm, since the lease lets only one train.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from nightshift import processes, progress
from nightshift.errors import PreconditionFailedError, RunNotFoundError
from nightshift.records.keys import RECORDS
from nightshift.records.lease import is_live
from nightshift.records.run import RunRecord, read_record, read_records, write_record
from nightshift.storage.s3 import S3

FIRST_PAUSE = timedelta(minutes=2)
"""Between two starts of a run that makes no progress; it doubles each time."""
LONGEST_PAUSE = timedelta(hours=1)


@dataclass(frozen=True)
class Found:
    """The runs that changed lately and are not over."""

    live: list[str]
    """Their trainers hold a live lease."""
    interrupted: list["InterruptedRun"]


@dataclass(frozen=True)
class InterruptedRun:
    """A run nobody trains, and the version of its record that says so."""

    record: RunRecord
    etag: str

    @property
    def due(self) -> datetime:
        """Not before this moment is it to be started again."""
        recoveries = self.record.recoveries
        stuck = sum(event.step == self.record.step for event in recoveries)
        if not stuck:
            return self.record.updated_at
        doublings = min(stuck - 1, 16)  # 2 to the power of more does not fit a timedelta
        return recoveries[-1].at + min(FIRST_PAUSE * (1 << doublings), LONGEST_PAUSE)


def find(store: S3, within: timedelta) -> Found:
    """Look at the runs written to `within` this time: one listing, and only these records are read.

    Raises:
        StorageError: the store cannot be listed.
    """
    now = store.now()
    recent = [item for item in store.list(RECORDS) if item.modified > now - within]
    found = Found([], [])
    for record, etag in read_records(store, recent):
        if record.status == "running" and is_live(record.lease, now):
            found.live.append(record.run_id)
        elif record.status in ("running", "interrupted"):
            found.interrupted.append(InterruptedRun(record, etag))
    return found


def claims(store: S3, interrupted: Iterable[InterruptedRun], max_recoveries: int) -> Iterator[RunRecord]:
    """Those that are due, each written down as started again by us: whoever asks for the next one has started it.

    Raises:
        StorageError: a record cannot be written.
    """
    for run in interrupted:
        record, now = run.record, store.now()
        number = len(record.recoveries) + 1
        if number > max_recoveries:
            give_up(store, record.run_id, max_recoveries)
        elif now < run.due:
            progress.current().say(f"run {record.run_id} waits until {run.due:%H:%M:%S} UTC for its next start")
        elif _write(store, run, record.with_event("recovered", now, f"start {number} of at most {max_recoveries}")):
            yield record


def give_up(store: S3, run_id: str, max_recoveries: int) -> str:
    """Mark a run failed that was started again as often as is allowed; what to tell about it."""
    close(store, run_id, "failed", f"started again {max_recoveries} times")
    told = (
        f"run {run_id} was started again {max_recoveries} times and is given up (NIGHTSHIFT_MAX_RECOVERIES). Look at "
        f"it with `nightshift show {run_id}`; `nightshift resume {run_id}` goes on with it all the same"
    )
    progress.current().warn(told)
    return told


def close(store: S3, run_id: str, status: Literal["cancelled", "failed"], detail: str = "") -> None:
    """Write down that a run is never to be started again by itself; one that is live or over is left alone."""
    with suppress(RunNotFoundError):  # stopped before it was created
        record, etag = read_record(store, run_id)
        now = store.now()
        if record.status in ("running", "interrupted") and not is_live(record.lease, now):
            _write(store, InterruptedRun(record, etag), record.changed(status=status).with_event(status, now, detail))


def _write(store: S3, run: InterruptedRun, record: RunRecord) -> bool:
    """Whether the record still was what it had been when it was read."""
    # Signed, so that a write whose response was lost is known for ours, and no two writers write the same bytes.
    event = record.events[-1].changed(owner=processes.signature())
    ours = record.changed(sequence=record.sequence + 1, updated_at=event.at, events=[*record.events[:-1], event])
    try:
        write_record(store, ours, if_match=run.etag)
    except PreconditionFailedError:
        return read_record(store, record.run_id)[0] == ours
    return True
