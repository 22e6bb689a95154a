"""The run record: one small JSON object a run, the only object that is ever overwritten.

Every write is a compare-and-swap on the ETag last seen. A record names the holder of the run's lease by a
fencing token; each new holder raises it by one. A write by a holder whose token is no longer the record's
fails, so a trainer that was thought dead can never damage its successor (Kleppmann, "How to do distributed
locking", 2016). Time is the server's, never the worker's.

Changes are functions of the record that may be applied twice without harm. That is what makes a lost
response harmless: after a failed condition the record is read again and the change is made again, on
whatever stands there, as long as the token is still ours.
"""

import contextvars
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from nightshift import processes, progress
from nightshift.errors import (
    Interrupted,
    LeaseHeldError,
    LeaseLostError,
    NightshiftError,
    ObjectNotFoundError,
    PreconditionFailedError,
    ResumeMismatchError,
    RunNotFoundError,
    StorageError,
)
from nightshift.refs import CheckpointRef, DatasetRef, RunId, Sha256, parse_run_id
from nightshift.s3 import S3
from nightshift.settings import TrainConfig

# Owners of this process' own leases. One that is no longer here was left by a training that has ended.
_held: set[str] = set()

Status = Literal["running", "interrupted", "finished", "failed", "cancelled"]
PREFIX = "runs/"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Lease(_Part):
    """Who may write, until when, and the fencing token under which."""

    owner: str
    process: str
    """The owner's `processes.identity`. On the same machine its death is seen at once, which only spares the
    wait for the expiry: the token guards against a mistake here too."""
    token: int
    expires_at: AwareDatetime


class Checkpoint(_Part):
    """A committed checkpoint. `metrics`: `loss` and `accuracy` of the epoch so far, `train_seconds` in all."""

    step: int
    epoch: int
    key: str
    bytes: int
    sha256: Sha256
    written_at: AwareDatetime
    metrics: dict[str, float]


class Event(_Part):
    """Something that happened to a run: it was started, resumed, interrupted, finished, or failed."""

    at: AwareDatetime
    what: str
    step: int
    owner: str
    detail: str = ""


class Result(_Part):
    """What a finished run is worth."""

    test_accuracy: float
    test_loss: float
    weights_sha256: Sha256
    model: str
    """The published version's key prefix."""


class RunRecord(_Part):
    """Everything the store knows of a run. `sequence` makes every write differ, and with it every ETag."""

    format: Literal[1] = 1
    run_id: RunId
    sequence: int = 0
    status: Status = "running"
    config: dict[str, Any]
    config_digest: Sha256
    dataset: DatasetRef
    environment: dict[str, str]
    lease: Lease
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    curve: list[dict[str, float]] = Field(default_factory=list)
    total_steps: int
    resumed_from_step: int | None = None
    result: Result | None = None
    events: list[Event] = Field(default_factory=list)
    created_at: AwareDatetime
    updated_at: AwareDatetime

    @property
    def step(self) -> int:
        """The step of the newest checkpoint."""
        return self.checkpoints[-1].step if self.checkpoints else 0

    @property
    def train_seconds(self) -> float:
        return self.checkpoints[-1].metrics["train_seconds"] if self.checkpoints else 0.0

    @property
    def test_accuracy(self) -> float | None:
        return self.result.test_accuracy if self.result else None

    def ref(self, checkpoint: Checkpoint) -> CheckpointRef:
        """One of its checkpoints, to hand on under the token the run is held with now."""
        fields = checkpoint.model_dump(include={"step", "epoch", "key", "bytes", "sha256"})
        return CheckpointRef(run_id=self.run_id, token=self.lease.token, **fields)

    def train_config(self) -> TrainConfig:
        return TrainConfig.parse(self.config)

    def changed(self, **fields: Any) -> Self:
        return self.model_copy(update=fields)

    def with_event(self, what: str, at: datetime, detail: str = "") -> Self:
        event = Event(at=at, what=what, step=self.step, owner=self.lease.owner, detail=detail)
        if self.events and self.events[-1].model_copy(update={"at": at}) == event:
            return self
        return self.changed(events=[*self.events, event])

    def summary(self) -> dict[str, Any]:
        """The run as `nightshift train --json` tells it."""
        result = self.result
        return {
            "run_id": self.run_id,
            "status": self.status,
            "step": self.step,
            "epochs": self.config["epochs"],
            "test_accuracy": self.test_accuracy,
            "train_seconds": round(self.train_seconds, 3),
            "weights_sha256": result and result.weights_sha256,
            "checkpoints": [checkpoint.model_dump(mode="json") for checkpoint in self.checkpoints],
            "resumed_from_step": self.resumed_from_step,
            "champion": None,
            "model": result and result.model,
            "data_source": self.dataset.source,
        }


def read_record(store: S3, run_id: str) -> tuple[RunRecord, str]:
    """A run's record and its ETag.

    Raises:
        RunNotFoundError: there is no such run.
        StorageError: the record cannot be read or understood.
    """
    key = f"{PREFIX}{parse_run_id(run_id)}.json"
    try:
        body, etag = store.get(key)
    except ObjectNotFoundError:
        raise RunNotFoundError(
            f"there is no run {run_id!r} in {store.url(PREFIX)}: `nightshift runs` lists those there are"
        ) from None
    try:
        return RunRecord.model_validate_json(body), etag
    except ValidationError as error:
        raise StorageError(f"{store.url(key)} is not a run record of this version of nightshift: {error}") from error


def list_records(store: S3, limit: int | None = None) -> list[RunRecord]:
    """The records of the `limit` runs last written to, newest first; hardly more are read."""
    stored = sorted(store.list(PREFIX), key=lambda item: item.modified, reverse=True)
    if limit is not None and len(stored) > limit:
        # The store's times are cut to the second: of those written in the same one, the records themselves decide.
        stored = [item for item in stored if item.modified >= stored[limit - 1].modified]
    records = [read_record(store, item.key.removeprefix(PREFIX).removesuffix(".json"))[0] for item in stored]
    return sorted(records, key=lambda record: record.updated_at, reverse=True)[:limit]


class Run:
    """A run this process holds the lease of. Safe to use from several threads."""

    def __init__(self, store: S3, record: RunRecord, etag: str, lease_seconds: float) -> None:
        self.store = store
        self.record = record
        self._etag = etag
        self._lease_seconds = lease_seconds
        self._lock = threading.Lock()
        self._lost: LeaseLostError | None = None
        self._stop_renewing = threading.Event()

    @property
    def run_id(self) -> str:
        return self.record.run_id

    @property
    def token(self) -> int:
        return self.record.lease.token

    def update(self, change: Callable[[RunRecord], RunRecord]) -> RunRecord:
        """Apply `change`, which may be applied more than once, and write the record.

        Raises:
            LeaseLostError: another trainer holds the lease now.
            StorageError: the record may or may not have been written; the next update finds out.
        """
        with self._lock:
            while True:
                changed = change(self.record)
                changed = changed.changed(sequence=self.record.sequence + 1, updated_at=self.store.now())
                try:
                    self._etag = _write(self.store, changed, if_match=self._etag)
                except PreconditionFailedError:
                    self._catch_up()
                    continue
                self.record = changed
                return changed

    def _catch_up(self) -> None:
        """Read what stands there: our own write whose response was lost, or somebody else's."""
        record, etag = read_record(self.store, self.run_id)
        if (record.lease.token, record.lease.owner) != (self.token, self.record.lease.owner):
            raise LeaseLostError(
                f"run {self.run_id} was taken over by {record.lease.owner} (token {record.lease.token}, ours was "
                f"{self.token}). Nothing of it is damaged; this process stops"
            )
        self.record, self._etag = record, etag

    def check(self) -> None:
        """Raise LeaseLostError if the lease is known to be lost or could not be renewed in time."""
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
            thread.join()

    def _renew(self) -> None:
        # On this machine's clock, which others need not share, and from before the request was sent.
        valid_until = time.monotonic() + self._lease_seconds
        while not self._stop_renewing.wait(self._lease_seconds / 3):
            asked_at = time.monotonic()
            try:
                self.update(lambda record: record.changed(lease=self._extended(record.lease)))
            except LeaseLostError as error:
                self._lost = error
                return
            except StorageError as error:
                if time.monotonic() > valid_until - self._lease_seconds / 3:
                    self._lost = LeaseLostError(
                        f"the lease of run {self.run_id} could not be renewed and may be taken over: {error}. "
                        f"When the store answers again: nightshift resume {self.run_id}"
                    )
                    return
                progress.current().warn(f"the lease of run {self.run_id} could not be renewed yet: {error}")
            else:
                valid_until = asked_at + self._lease_seconds

    def _extended(self, lease: Lease) -> Lease:
        return lease.model_copy(update={"expires_at": self.store.now() + timedelta(seconds=self._lease_seconds)})

    def end(self, status: Status, detail: str = "", result: Result | None = None) -> None:
        """Record how the run stopped and give the lease back."""
        now = self.store.now()
        self.update(
            lambda record: record.changed(
                status=status, result=result, lease=record.lease.model_copy(update={"expires_at": now})
            ).with_event(status, now, detail)
        )


@contextmanager
def hold(
    store: S3,
    run_id: str,
    config: TrainConfig,
    dataset: DatasetRef,
    environment: dict[str, str],
    total_steps: int,
    lease_seconds: float,
) -> Iterator[Run]:
    """Create the run or take it up again, and hold its lease; how it stops goes into its record.

    A run left without an error stays `running`: evaluation and publication are still to come.

    Raises:
        ResumeMismatchError: the stored run has another config or data set.
        LeaseHeldError: another trainer, not known to be dead, holds it.
    """
    run = _acquire(store, run_id, config, dataset, environment, total_steps, lease_seconds)
    try:
        with run.renewed():
            yield run
    except LeaseLostError:
        raise
    except BaseException as error:
        stopped = isinstance(error, Interrupted) or not isinstance(error, Exception)
        try:
            run.end("interrupted" if stopped else "failed", str(error) or type(error).__name__)
        except NightshiftError as unrecorded:
            progress.current().warn(f"how run {run_id} ended could not be recorded: {unrecorded}")
        raise
    finally:
        _held.discard(run.record.lease.owner)


def attach(store: S3, checkpoint: CheckpointRef, lease_seconds: float) -> Run:
    """The run a checkpoint belongs to, under the token it was handed on with.

    Raises:
        LeaseLostError: another trainer has taken the run over since.
    """
    record, etag = read_record(store, checkpoint.run_id)
    if record.lease.token != checkpoint.token:
        raise LeaseLostError(f"run {record.run_id} was taken over by {record.lease.owner}; it will finish it")
    return Run(store, record, etag, lease_seconds)


def check_matches(record: RunRecord, config: TrainConfig, dataset: DatasetRef) -> None:
    """Raise ResumeMismatchError, listing the fields that differ, unless both would end with the same bits."""
    ours = {**config.decisive(), "dataset digest": dataset.digest}
    theirs = {**record.config, "dataset digest": record.dataset.digest}
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


def _acquire(
    store: S3,
    run_id: str,
    config: TrainConfig,
    dataset: DatasetRef,
    environment: dict[str, str],
    total_steps: int,
    lease_seconds: float,
) -> Run:
    owner = f"{socket.gethostname()}/{os.getpid()}/{secrets.token_hex(4)}"
    _held.add(owner)
    while True:
        now = store.now()
        lease = Lease(
            owner=owner,
            process=processes.identity(os.getpid()),
            token=1,
            expires_at=now + timedelta(seconds=lease_seconds),
        )
        try:
            found, etag = read_record(store, run_id)
        except RunNotFoundError:
            record = RunRecord(
                run_id=run_id,
                config=config.model_dump(),
                config_digest=config.digest,
                dataset=dataset,
                environment=environment,
                lease=lease,
                total_steps=total_steps,
                created_at=now,
                updated_at=now,
            ).with_event("started", now)
            condition: dict[str, Any] = {"if_absent": True}
        else:
            if found.lease.owner == owner:  # our own write, whose response was lost
                return Run(store, found, etag, lease_seconds)
            check_matches(found, config, dataset)
            if found.lease.expires_at > now and not _is_over(found.lease):
                raise LeaseHeldError(
                    f"run {run_id} is being trained by {found.lease.owner} until "
                    f"{found.lease.expires_at:%Y-%m-%d %H:%M:%S} UTC at least. Wait for it, or if it is dead, "
                    "try again after that time"
                )
            record = found.changed(
                sequence=found.sequence + 1,
                status="running",
                config=config.model_dump(),
                environment=environment,
                lease=lease.model_copy(update={"token": found.lease.token + 1}),
                updated_at=now,
            ).with_event("resumed", now, _differences(found.environment, environment))
            condition = {"if_match": etag}
        try:
            return Run(store, record, _write(store, record, **condition), lease_seconds)
        except PreconditionFailedError:
            continue


def _is_over(lease: Lease) -> bool:
    """Whether the owner is known to be gone: its process is dead, or is this one, which no longer trains the run."""
    if lease.process == processes.identity(os.getpid()):
        return lease.owner not in _held
    return processes.state_of(lease.process) == "dead"


def _differences(before: dict[str, str], after: dict[str, str]) -> str:
    return ", ".join(
        f"{name} {before.get(name)} → {value}" for name, value in after.items() if before.get(name) != value
    )


def _write(store: S3, record: RunRecord, **condition: Any) -> str:
    return store.put(f"{PREFIX}{record.run_id}.json", record.model_dump_json(indent=1).encode(), **condition)
