"""The run record: one small JSON object a run, overwritten by compare-and-swap only.

It holds its own sha256, so that a bit that flips in it, on the wire or at rest, is noticed and not believed.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from nightshift import progress
from nightshift.config.train import TrainConfig
from nightshift.errors import (
    ConfigError,
    ObjectNotFoundError,
    RunNotFoundError,
    StorageError,
    StorageUnreachableError,
)
from nightshift.ids import RunId, Sha256
from nightshift.records.keys import RECORDS, record_key
from nightshift.refs import CheckpointRef, DatasetRef, Verdict
from nightshift.storage.documents import sealed, unsealed
from nightshift.storage.s3 import S3
from nightshift.storage.store import Stored

Status = Literal["running", "interrupted", "finished", "failed", "cancelled"]
READERS = 8
"""How many records are read at a time."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)

    def changed(self, **fields: Any) -> Self:
        return self.model_copy(update=fields)


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
    """Something that happened to a run: started, resumed, recovered, skipped, unprotected, or how it ended."""

    at: AwareDatetime
    what: str
    step: int
    owner: str
    detail: str = ""


class Origin(_Part):
    """What started a run on a Prefect server, so that it can be started again the same way."""

    flow_run_id: str | None = None
    """The flow run that held the run last."""
    deployment: str | None = None
    """FLOW/DEPLOYMENT, if it ever was started by one."""
    promote: bool = True
    """Whether the gate is asked; not for a trial, of which the sweep sends the best there."""


class Result(_Part):
    """What a finished run is worth."""

    test_accuracy: float
    test_loss: float
    weights_sha256: Sha256
    model: str
    """The published version's key prefix."""
    verdict: Verdict | None = None
    """The gate's; None if it was not asked."""


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
    origin: Origin = Origin()
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

    @property
    def recoveries(self) -> list[Event]:
        """How often it was started again by `recovery`, and when."""
        return [event for event in self.events if event.what == "recovered"]

    def ref(self, checkpoint: Checkpoint) -> CheckpointRef:
        """One of its checkpoints, to hand on under the token the run is held with now."""
        fields = checkpoint.model_dump(include={"step", "epoch", "key", "bytes", "sha256"})
        return CheckpointRef(run_id=self.run_id, token=self.lease.token, **fields)

    def train_config(self) -> TrainConfig:
        return TrainConfig.parse(self.config)

    def with_event(self, what: str, at: datetime, detail: str = "") -> Self:
        event = Event(at=at, what=what, step=self.step, owner=self.lease.owner, detail=detail)
        if self.events and self.events[-1].changed(at=at) == event:
            return self
        return self.changed(events=[*self.events, event])

    def summary(self) -> dict[str, Any]:
        """The run as `nightshift train --json` tells it."""
        result = self.result
        verdict = result.verdict if result else None
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
            "champion": verdict.champion and verdict.champion.model_dump(mode="json") if verdict else None,
            "verdict": verdict and verdict.model_dump(mode="json", exclude={"champion"}),
            "model": result and result.model,
            "data_source": self.dataset.source,
        }


def read_record(store: S3, run_id: str) -> tuple[RunRecord, str]:
    """A run's record and its ETag.

    Raises:
        RunNotFoundError: there is no such run.
        StorageError: the record cannot be read, or is damaged.
    """
    key = record_key(run_id)
    try:
        body, etag = store.get(key)
    except ObjectNotFoundError:
        raise RunNotFoundError(
            f"there is no run {run_id!r} in {store.url(RECORDS)}: `nightshift runs` lists those there are"
        ) from None
    try:
        return RunRecord.model_validate(unsealed(body)), etag
    except (ValueError, AttributeError) as error:  # of which ValidationError and JSONDecodeError are kinds
        raise StorageError(
            f"{store.url(key)} is damaged, or not a run record of this version of nightshift: {error}. If it stays so, "
            "bring an older version of the object back if the bucket keeps them, or start under another run id"
        ) from error


def write_record(store: S3, record: RunRecord, **condition: Any) -> str:
    """Put the record under a condition of `S3.put`, and return its ETag."""
    return store.put(record_key(record.run_id), sealed(record.model_dump(mode="json")), **condition)


def read_records(store: S3, stored: Iterable[Stored]) -> Iterator[tuple[RunRecord, str]]:
    """The records behind some listed objects, with their ETags; damaged ones are skipped with a warning."""

    def read(item: Stored) -> tuple[RunRecord, str] | None:
        try:
            return read_record(store, item.key.removeprefix(RECORDS).removesuffix(".json"))
        except StorageUnreachableError:
            raise
        except (StorageError, RunNotFoundError, ConfigError) as error:
            progress.current().warn(str(error))
            return None

    with ThreadPoolExecutor(READERS) as pool:
        yield from filter(None, pool.map(read, stored))


def list_records(store: S3, limit: int | None = None) -> list[RunRecord]:
    """The records of the `limit` runs last written to, newest first; hardly more are read."""
    stored = sorted(store.list(RECORDS), key=lambda item: item.modified, reverse=True)
    if limit is not None and len(stored) > limit:
        # The store's times are cut to the second: of those written in the same one, the records themselves decide.
        stored = [item for item in stored if item.modified >= stored[limit - 1].modified]
    records = [record for record, _ in read_records(store, stored)]
    return sorted(records, key=lambda record: record.updated_at, reverse=True)[:limit]
