"""Holding a run: its lease, its fencing token, and every write of its record by compare-and-swap.

A record names the holder of the run's lease by a fencing token, which each new holder raises by one. A write by a
holder whose token is no longer the record's fails, so a trainer that was thought dead can never damage its successor
(Kleppmann, "How to do distributed locking", 2016). Time is the store's, never the worker's.

Changes are functions of the record that may be applied twice without harm. That makes a lost response harmless: after
a failed condition the record is read again and the change is made again, on whatever stands there, as long as the
token is still ours.
"""

import contextvars
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from nightshift import processes, progress
from nightshift.config.train import TrainConfig
from nightshift.errors import (
    Interrupted,
    LeaseExpiredError,
    LeaseHeldError,
    LeaseLostError,
    NightshiftError,
    PreconditionFailedError,
    ResumeMismatchError,
    RunNotFoundError,
    StorageError,
)
from nightshift.records.keys import record_key
from nightshift.records.parents import Parent
from nightshift.records.run import Lease, Origin, Result, RunRecord, Status, read_record, write_record
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.storage import documents
from nightshift.storage.store import Store

LONGEST_LEASE = timedelta(days=1)
"""The longest a trainer can ask for. What claims to run longer was not written by one."""
_POLL_SECONDS = 2.0
_CLOCKS_DIFFER = timedelta(seconds=1)
"""By how much two processes may take the store's clock differently: it tells whole seconds."""

# The owners of this process' own leases. A lease whose owner is no longer here was left by a training that has ended.
_held: set[str] = set()
# Why such a training ended, by the owner of its lease, if the store could not record it. Resuming records it.
_unrecorded: dict[str, str] = {}


@dataclass(frozen=True)
class RunSpec:
    """What somebody wants to train. A new record is made of it, and a stored one has to agree with it."""

    run_id: str
    config: TrainConfig
    dataset: DatasetRef
    environment: dict[str, str]
    total_steps: int
    origin: Origin = field(default_factory=Origin)
    parent: Parent | None = None
    """What a new run's first weights come from; a stored one keeps its own."""
    process: str = field(default_factory=lambda: processes.identity(os.getpid()))
    """The process that answers for the training: this one, or the one that has started it as one of several."""


class Run:
    """A run this process holds the lease of. Safe to use from several threads."""

    def __init__(self, store: Store, record: RunRecord, etag: str, lease_seconds: float, asked_at: float) -> None:
        """`asked_at`: `time.monotonic()` from before the request that took the lease."""
        self.store = store
        self.record = record
        self._etag = etag
        self._lease_seconds = lease_seconds
        # By this machine's clock, which others need not share, and counted from before the request was sent.
        self._valid_until = asked_at + lease_seconds
        self._lock = threading.RLock()
        self._lost: LeaseLostError | None = None
        self._trained_at: datetime | None = None
        self._renewal_failure: StorageError | None = None
        self._stop_renewing = threading.Event()

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def token(self) -> int:
        return self.record.lease.token

    def update(self, change: Callable[[RunRecord], RunRecord]) -> RunRecord:
        """Apply `change`, which may be applied more than once, and write the record; this also renews the lease.

        Raises:
            LeaseLostError: another trainer holds the lease now.
            StorageError: the record may or may not have been written; the next update finds out.
        """
        with self._lock:
            if self._lost:
                raise self._lost
            return documents.settled(self.store.url(record_key(self.run_id)), lambda: self._update_once(change))

    def trains(self) -> None:
        """The first step is done; the next write of the record says when."""
        self._trained_at = self.store.now()

    def _update_once(self, change: Callable[[RunRecord], RunRecord]) -> RunRecord:
        asked_at, now = time.monotonic(), self.store.now()
        lease = self.record.lease.changed(expires_at=now + timedelta(seconds=self._lease_seconds))
        heard = self.record.heard(now, self._trained_at)
        renewed = heard.changed(lease=lease, sequence=self.record.sequence + 1, updated_at=now)
        changed = change(renewed)
        try:
            self._etag = write_record(self.store, changed, self._etag)
        except PreconditionFailedError:
            self._catch_up()
            raise
        self._valid_until = asked_at + self._lease_seconds
        self.record = changed
        return changed

    def _catch_up(self) -> None:
        """Read what stands there: our own write whose response was lost, a recoverer's note, or another's lease."""
        try:
            record, etag = read_record(self.store, self.run_id)
        except RunNotFoundError as error:
            self._lost = LeaseLostError(f"the record of run {self.run_id} was deleted: this process stops")
            raise self._lost from error
        if (record.lease.token, record.lease.owner) != (self.token, self.record.lease.owner):
            self._lost = LeaseLostError(
                f"run {self.run_id} was taken over by {record.lease.owner} (token {record.lease.token}, ours was "
                f"{self.token}). Nothing of it is damaged; this process stops"
            )
            raise self._lost
        self.record, self._etag = record, etag

    def check(self) -> None:
        """Raise LeaseLostError if the lease is lost, LeaseExpiredError if it is about to run out."""
        if not self._lost and time.monotonic() > self._valid_until - self._lease_seconds / 6:
            why = self._renewal_failure or "the store has not answered in time"
            self._lost = LeaseExpiredError(
                f"the lease of run {self.run_id} could not be renewed and may be taken over: {why}. "
                f"If nothing starts it again by itself: nightshift resume {self.run_id}"
            )
        if self._lost:
            raise self._lost

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """Renew the lease in the background, at a third of its time to live."""
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._renew,), name="lease renewal", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop_renewing.set()
            thread.join(1)  # a thread that hangs in a request is left behind: writes take turns, and carry the token

    def _renew(self) -> None:
        while not self._stop_renewing.wait(self._lease_seconds / 3):
            try:
                self.update(lambda record: record)
                self._renewal_failure = None
            except LeaseLostError:
                return
            except StorageError as error:
                if not self._renewal_failure:
                    progress.current().warn(f"the lease of run {self.run_id} could not be renewed yet: {error}")
                self._renewal_failure = error

    def end(self, status: Status, detail: str = "", result: Result | None = None) -> None:
        """Record how the run stopped and give the lease back. Nothing is written under it afterwards.

        A lease that has expired does not stand in the way, as long as nobody has taken the run over.
        """
        now = self.store.now()

        def give_back(record: RunRecord) -> RunRecord:
            lease = record.lease.changed(expires_at=now - _CLOCKS_DIFFER)
            return record.changed(status=status, result=result, lease=lease).with_event(status, now, detail)

        with self._lock:
            if isinstance(self._lost, LeaseExpiredError):
                self._lost = None
            self.update(give_back)
            # A save that is still under way would make the lease a live one again.
            self._lost = LeaseLostError(f"run {self.run_id} is {status}: this process has given it back")


@contextmanager
def hold(store: Store, spec: RunSpec, lease_seconds: float, patience: float = 0) -> Iterator[Run]:
    """Create the run or take it up again, and hold its lease; write into its record how it stops.

    A run that is left without an error stays `running`: evaluation and publication are still to come. A run that is
    stopped by something that can pass by itself is `interrupted`, any other is `failed`.

    Args:
        patience: how many seconds to wait for a lease that may be one of a trainer that was lost.

    Raises:
        ResumeMismatchError: the stored run has another config or data set.
        LeaseHeldError: another trainer, not known to be dead, holds it.
    """
    waiting = Retrying(
        retry=retry_if_exception_type(LeaseHeldError),
        stop=stop_after_delay(patience),
        wait=wait_fixed(_POLL_SECONDS),
        reraise=True,
    )
    run = waiting(acquire, store, spec, lease_seconds)
    try:
        with run.renewed():
            yield run
    except BaseException as error:
        if isinstance(error, LeaseLostError) and not isinstance(error, LeaseExpiredError):
            raise
        passes = isinstance(error, Interrupted) or getattr(error, "transient", not isinstance(error, Exception))
        why = str(error) or type(error).__name__
        try:
            run.end("interrupted" if passes else "failed", why)
        except NightshiftError as unrecorded:
            if isinstance(error, LeaseExpiredError) and isinstance(unrecorded, LeaseLostError):
                raise unrecorded from error  # taken over, not only late: trying again would be refused
            _unrecorded[run.record.lease.owner] = why
            progress.current().warn(f"how run {run.run_id} ended could not be recorded: {unrecorded}")
        raise
    finally:
        _held.discard(run.record.lease.owner)


@contextmanager
def attached(store: Store, checkpoint: CheckpointRef, lease_seconds: float) -> Iterator[Run]:
    """Go on holding the run a checkpoint belongs to, under the token it was handed on with.

    Raises:
        LeaseLostError: another trainer has taken the run over since.
    """
    asked_at = time.monotonic()
    record, etag = read_record(store, checkpoint.run_id)
    if record.lease.token != checkpoint.token:
        raise LeaseLostError(f"run {record.run_id} was taken over by {record.lease.owner}; it will finish it")
    run = Run(store, record, etag, lease_seconds, asked_at)
    if record.status == "finished":
        yield run
        return
    ours = processes.identity(os.getpid())  # it may have been trained by a process that has ended
    run.update(lambda record: record.changed(lease=record.lease.changed(process=ours)))
    with run.renewed():
        yield run


def check_matches(record: RunRecord, config: TrainConfig, dataset: DatasetRef) -> None:
    """Raise ResumeMismatchError, listing the fields that differ, unless both would end with the same bits."""
    ours = {**config.decisive(), "dataset digest": dataset.digest}
    theirs = {**record.train_config().decisive(), "dataset digest": record.dataset.digest}
    differing = [
        f"  {name}: stored {theirs.get(name)!r}, now {value!r}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differing:
        raise ResumeMismatchError(
            f"run {record.run_id} was made with another config:\n" + "\n".join(differing) + "\n"
            f"Go on with the stored one by `nightshift resume {record.run_id}`, or choose another run id."
        )


def is_live(lease: Lease, now: datetime, process: str | None = None) -> bool:
    """Whether somebody may still be training: the lease has not expired, and its owner is not known to be gone.

    A lease that runs longer than any can is none, so that nobody waits for it for ever.

    An owner is gone if it is a process of this machine that is dead, or if it is `process`, by default this one, and
    no longer trains the run.
    """
    if not now < lease.expires_at <= now + LONGEST_LEASE + _CLOCKS_DIFFER:
        return False
    if lease.process == (process or processes.identity(os.getpid())):
        return lease.owner in _held
    return processes.state_of(lease.process) != "dead"


def status_of(record: RunRecord, now: datetime) -> Status | Literal["lost"]:
    """How a run stands, for people: as its record says, or `lost` if that says `running` and nobody trains it."""
    return "lost" if record.status == "running" and not is_live(record.lease, now) else record.status


def wait_until_free(store: Store, run_id: str) -> None:
    """Wait until nobody trains the run: it is over, or its trainer's lease has run out."""
    waiting = False
    with suppress(RunNotFoundError):
        while (record := read_record(store, run_id)[0]).status == "running" and is_live(record.lease, store.now()):
            if not waiting:
                progress.current().say(f"run {run_id} is being trained by {record.lease.owner}: waiting for it")
            waiting = True
            time.sleep(_POLL_SECONDS)


def acquire(store: Store, spec: RunSpec, lease_seconds: float) -> Run:
    """Take the lease, without renewing it: a new run's, or that of one nobody trains any more."""
    owner, asked_at = processes.new_writer_id(), time.monotonic()
    _held.add(owner)

    def once() -> Run:
        now = store.now()
        expires_at = now + timedelta(seconds=lease_seconds)
        lease = Lease(owner=owner, process=spec.process, token=1, expires_at=expires_at)
        etag: str | None = None
        try:
            found, etag = read_record(store, spec.run_id)
        except RunNotFoundError:
            record = _new_record(spec, lease, now)
        else:
            if found.lease.owner == owner:  # our own write, whose response was lost
                return Run(store, found, etag, lease_seconds, asked_at)
            record = _taken_over(found, spec, lease, now)
        return Run(store, record, write_record(store, record, etag), lease_seconds, asked_at)

    try:
        return documents.settled(store.url(record_key(spec.run_id)), once)
    except BaseException:
        _held.discard(owner)
        raise


def _new_record(spec: RunSpec, lease: Lease, now: datetime) -> RunRecord:
    return (
        RunRecord(
            run_id=spec.run_id,
            config=spec.config.model_dump(),
            config_digest=spec.config.digest,
            dataset=spec.dataset,
            environment=spec.environment,
            origin=spec.origin,
            parent=spec.parent,
            lease=lease,
            total_steps=spec.total_steps,
            created_at=now,
            updated_at=now,
        )
        .held_anew(now)
        .with_event("started", now, f"with {spec.parent}" if spec.parent else "")
    )


def _taken_over(found: RunRecord, spec: RunSpec, lease: Lease, now: datetime) -> RunRecord:
    check_matches(found, spec.config, spec.dataset)
    if is_live(found.lease, now, spec.process):
        raise LeaseHeldError(
            f"run {found.run_id} is being trained by {found.lease.owner} until "
            f"{found.lease.expires_at:%Y-%m-%d %H:%M:%S} UTC at least. Wait for it, or if it is dead, "
            "try again after that time"
        )
    if why := _unrecorded.get(found.lease.owner):
        found = found.with_event("interrupted", now, why)
    changes = [
        f"{name} {found.environment.get(name)} → {value}"
        for name, value in spec.environment.items()
        if found.environment.get(name) != value
    ]
    return (
        found.changed(
            sequence=found.sequence + 1,
            status="running",
            config=spec.config.model_dump(),
            config_digest=spec.config.digest,
            environment=spec.environment,
            origin=spec.origin,
            lease=lease.changed(token=found.lease.token + 1),
            updated_at=now,
        )
        .held_anew(now)
        .with_event("resumed", now, ", ".join(changes))
    )
