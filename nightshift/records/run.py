"""The run record: one document a run, which decides what the run is. It is changed by compare-and-swap only."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Literal, Protocol, Self, TypeVar

from pydantic import Field

from nightshift import progress
from nightshift.config.train import TrainConfig
from nightshift.errors import ObjectNotFoundError, RunNotFoundError, StorageError, StorageUnreachableError
from nightshift.ids import FlowRunId, RunId, Sha256
from nightshift.records.curve import CurvePoint, kept_of
from nightshift.records.keys import RECORDS, place_of, record_key
from nightshift.records.parents import Parent
from nightshift.refs import CheckpointRef, DatasetRef, Verdict
from nightshift.storage import documents
from nightshift.storage.documents import Document, Part
from nightshift.storage.store import Store, Stored
from nightshift.values import Count, Line, Loss, Moment, Number, Seconds, Share, Text

Status = Literal["running", "interrupted", "finished", "failed", "cancelled"]
READERS = 8
"""How many objects of runs are read at a time."""


class Lease(Part):
    """Who may write, until when, and the fencing token under which."""

    owner: Line
    process: Line
    """The owner's `processes.identity`. On the same machine its death is seen at once, which only spares the
    wait for the expiry: the token guards against a mistake here too."""
    token: Count
    expires_at: Moment


class CheckpointMetrics(Part):
    """How the training stood when a checkpoint was made. What an older nightshift did not store has its default."""

    train_seconds: Seconds
    """Seconds trained so far, over all resumes."""
    stall_seconds: Seconds = 0.0
    """How long the loop stood still for this checkpoint."""
    loss: Number | None = None
    """Mean training loss of the epoch so far."""
    accuracy: Share | None = None
    """Share of the epoch's images so far that were classified correctly, 0 to 1."""
    epoch_loss: Number | None = None
    """Mean training loss of the last whole epoch; None if none is over."""
    skipped: Count = 0
    """Saves since the process began that were skipped, because the one before was still under way."""
    failed: Count = 0
    """Saves since the process began that could not be stored."""


class Checkpoint(Part):
    """A committed checkpoint."""

    step: Count
    epoch: Count
    key: Line
    bytes: Count
    sha256: Sha256
    written_at: Moment
    metrics: CheckpointMetrics


class Event(Part):
    """Something that happened to a run: started, resumed, recovered, skipped, unprotected, clock, or how it ended."""

    at: Moment
    what: Line
    step: Count
    owner: Line
    detail: Text = ""


class Origin(Part):
    """What started a run on a Prefect server, so that it can be started again the same way."""

    flow_run_id: FlowRunId | None = None
    """The flow run that held the run last."""
    deployment: Line | None = None
    """FLOW/DEPLOYMENT, if it was one that started it last."""
    promote: bool = True
    """Whether the gate is asked; not for a trial, of which the sweep sends the best there."""
    scheduled_at: Moment | None = None
    """When the flow run was to start, by Prefect's clock; None in the records of an older nightshift."""
    began_at: Moment | None = None
    """When it did, by the clock of its machine."""


class Attempt(Part):
    """One who has held the run: when it was wanted, began, took the lease, trained first and was last heard of."""

    scheduled_at: Moment | None = None
    began_at: Moment | None = None
    held_at: Moment
    trained_at: Moment | None = None
    """When its first step was done; None if it never did one."""
    heard_at: Moment
    """Its last write of the record."""
    from_step: Count = 0
    """The checkpoint that it went on from, and how long the run had trained by then."""
    from_seconds: Seconds = 0.0


class Result(Part):
    """What a finished run is worth."""

    test_accuracy: Share
    test_loss: Loss
    weights_sha256: Sha256
    model: Line
    """The published version's key prefix."""
    verdict: Verdict | None = None
    """The gate's; None if it was not asked."""


class RunRecord(Document):
    """Everything the store knows of a run. `sequence` makes every write differ, and with it every ETag.

    Records of format 3 have no guards in their verdict. Those of format 2 do not say how many classes the data set has,
    and how large its images are.
    """

    title: ClassVar[str] = "run record"
    if_damaged: ClassVar[str] = (
        "If it stays so, bring an older version of the object back if the bucket keeps them, or start under another "
        "run id"
    )
    max_bytes: ClassVar[int] = 8 * documents.MIB

    format: Literal[4] = 4
    run_id: RunId
    sequence: Count = 0
    status: Status = "running"
    config: dict[str, Any]
    config_digest: Sha256
    dataset: DatasetRef
    environment: dict[Line, Line]
    origin: Origin = Origin()
    parent: Parent | None = None
    """None where the config says scratch."""
    lease: Lease
    checkpoints: list[Checkpoint] = Field(default_factory=list)
    curve: list[CurvePoint] = Field(default_factory=list)
    total_steps: Count
    last_step: Annotated[Count, Field(ge=1)] | None = None
    """The step at which the clock ended the training early. If steps are trained again, they end there too."""
    resumed_from_step: Count | None = None
    result: Result | None = None
    events: list[Event] = Field(default_factory=list)
    attempts: list[Attempt] = Field(default_factory=list)
    """Oldest first; an older nightshift has noted none."""
    created_at: Moment
    updated_at: Moment

    def check(self, key: str) -> None:
        if key != record_key(self.run_id):
            raise ValueError(f"it is the record of run {self.run_id}, copied from elsewhere")
        self.train_config()
        for checkpoint in self.checkpoints:
            place = place_of(checkpoint.key)
            if not place or (place.kind, place.run_id) != ("payload", self.run_id):
                raise ValueError(f"it names the checkpoint {checkpoint.key!r}, which is not one of this run's")
        if not self.events or not self.total_steps or (self.status == "finished" and not self.result):
            raise ValueError("it says too little: a run has events and steps, and a finished one a result")

    @property
    def step(self) -> int:
        """The step of the newest checkpoint."""
        return self.checkpoints[-1].step if self.checkpoints else 0

    @property
    def chosen(self) -> Checkpoint | None:
        """Whose weights would be published now: the newest, or with `evaluation.keep=best` that of the best epoch.

        None if there is none.
        """
        kept = kept_of(self.curve, self.train_config().evaluation)
        fitting = [checkpoint for checkpoint in self.checkpoints if not kept or checkpoint.step == kept.step]
        return fitting[-1] if fitting else None

    @property
    def train_seconds(self) -> float:
        return self.checkpoints[-1].metrics.train_seconds if self.checkpoints else 0.0

    @property
    def test_accuracy(self) -> float | None:
        return self.result.test_accuracy if self.result else None

    @property
    def clock(self) -> str:
        """Why the clock has ended the training; empty if it did not."""
        return next((event.detail for event in self.events if event.what == "clock"), "")

    @property
    def recoveries(self) -> list[Event]:
        """The events that say when `recovery` started it again."""
        return [event for event in self.events if event.what == "recovered"]

    def ref(self, checkpoint: Checkpoint) -> CheckpointRef:
        """A checkpoint of this run, to hand on under the token the run is held with now."""
        fields = checkpoint.model_dump(include={"step", "epoch", "key", "bytes", "sha256"})
        return CheckpointRef(run_id=self.run_id, token=self.lease.token, clock=self.clock, **fields)

    def train_config(self) -> TrainConfig:
        """The config the run is trained with; raises ConfigError if this nightshift cannot read it."""
        return TrainConfig.parse(self.config)

    def with_event(self, what: str, at: datetime, detail: str = "", step: int | None = None) -> Self:
        """The record with this event, by default at its own step, unless the last one says the same at another time."""
        event = Event(at=at, what=what, step=self.step if step is None else step, owner=self.lease.owner, detail=detail)
        if self.events and self.events[-1].changed(at=at) == event:
            return self
        return self.changed(events=[*self.events, event])

    def ended_by_clock(self, step: int, at: datetime, why: str) -> Self:
        """The record that says with which step the training ends; the one that says so already stays as it is."""
        if self.last_step is not None:
            return self
        return self.with_event("clock", at, why, step).changed(last_step=step)

    def held_anew(self, now: datetime) -> Self:
        """The record with another attempt, by its origin, which goes on from the newest checkpoint."""
        attempt = Attempt(
            scheduled_at=self.origin.scheduled_at,
            began_at=self.origin.began_at,
            held_at=now,
            heard_at=now,
            from_step=self.step,
            from_seconds=self.train_seconds,
        )
        return self.changed(attempts=[*self.attempts, attempt])

    def heard(self, now: datetime, trained_at: datetime | None) -> Self:
        """The record with a sign of life from its last attempt; `trained_at`: of its first step, if done."""
        if not self.attempts:
            return self
        last = self.attempts[-1].changed(heard_at=now)
        if trained_at:
            last = last.changed(trained_at=trained_at)
        return self.changed(attempts=[*self.attempts[:-1], last])

    def summary(self) -> dict[str, Any]:
        """The run as `nightshift train --json` prints it."""
        result, chosen = self.result, self.chosen
        verdict = result.verdict if result else None
        return {
            "run_id": self.run_id,
            "status": self.status,
            "step": self.step,
            "last_step": self.last_step,
            "epochs": self.train_config().schedule.epochs,
            "kept_epoch": chosen and chosen.epoch,
            "test_accuracy": self.test_accuracy,
            "train_seconds": round(self.train_seconds, 3),
            "weights_sha256": result and result.weights_sha256,
            "checkpoints": [checkpoint.model_dump(mode="json") for checkpoint in self.checkpoints],
            "resumed_from_step": self.resumed_from_step,
            "champion": verdict.champion and verdict.champion.model_dump(mode="json") if verdict else None,
            "verdict": verdict and verdict.model_dump(mode="json", exclude={"champion"}),
            "model": result and result.model,
            "data_source": self.dataset.source,
            "dataset": self.dataset.name,
            "snapshot": self.dataset.digest,
            "parent": self.parent and self.parent.model_dump(mode="json"),
        }


def read_record(store: Store, run_id: str) -> tuple[RunRecord, str]:
    """A run's record and its ETag.

    Raises:
        RunNotFoundError: there is no such run.
        StorageError: the record cannot be read, is damaged, or is of a newer nightshift.
    """
    try:
        return documents.read(store, record_key(run_id), RunRecord)
    except ObjectNotFoundError:
        raise RunNotFoundError(
            f"there is no run {run_id!r} in {store.url(RECORDS)}: `nightshift runs` lists those there are"
        ) from None


def dataset_of(store: Store, run_id: str) -> DatasetRef | None:
    """The data set that a run was begun with; None if there is no such run yet. Raises as `read_record` otherwise."""
    try:
        return read_record(store, run_id)[0].dataset
    except RunNotFoundError:
        return None


def write_record(store: Store, record: RunRecord, etag: str | None) -> str:
    """Put a record over the version with this ETag, or with None where there is none yet; return its new ETag.

    Raises:
        PreconditionFailedError: the run has another record by now.
        StorageError: it may or may not have been written.
    """
    return documents.write(store, record_key(record.run_id), record, etag)


def read_records(store: Store, stored: Iterable[Stored]) -> Iterator[tuple[RunRecord, str]]:
    """The records behind some listed objects, with their ETags. Those that cannot be read are left out with a warning.

    Raises:
        StorageUnreachableError: the store does not answer.
    """

    def read(item: Stored) -> tuple[RunRecord, str] | None:
        try:
            documents.check_size(item.size, store.url(item.key), RunRecord)
            return documents.read(store, item.key, RunRecord)
        except StorageUnreachableError:
            raise
        except StorageError as error:
            progress.current().warn(str(error))
            return None

    with ThreadPoolExecutor(READERS) as pool:
        yield from filter(None, pool.map(read, stored))


def listed_records(store: Store) -> list[Stored]:
    """The objects that should be run records, of which none is read. Others below the prefix are somebody else's.

    Raises:
        StorageError: the store cannot be listed.
    """
    return [item for item in store.list(RECORDS) if (place := place_of(item.key)) and place.kind == "record"]


class _Dated(Protocol):
    @property
    def updated_at(self) -> datetime: ...


T = TypeVar("T", bound=_Dated)


def newest_first(stored: list[Stored], read: Callable[[list[Stored]], Iterable[T]]) -> Iterator[T]:
    """What `read` makes of some listed records, the run last written to first. It is given few of them at a time."""
    stored = sorted(stored, key=lambda item: item.modified, reverse=True)
    while stored:
        # The store's times are cut to the second. Among runs written to in the same one, their records decide.
        oldest = stored[: 4 * READERS][-1].modified
        batch = list(takewhile(lambda item: item.modified >= oldest, stored))  # noqa: B023
        del stored[: len(batch)]
        yield from sorted(read(batch), key=lambda found: found.updated_at, reverse=True)


def newest_records(store: Store) -> Iterator[RunRecord]:
    """All records, the run last written to first, read as they are asked for. Bad ones are left out with a warning.

    Raises:
        StorageError: the store cannot be listed.
    """
    return newest_first(listed_records(store), lambda batch: (record for record, _ in read_records(store, batch)))
