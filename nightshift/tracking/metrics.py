"""The course of a training, line by line: `reports/<run_id>/metrics.jsonl`, and TensorBoard's event files if asked for.

An object cannot be appended to, so the whole file is put again with each checkpoint, in the thread that saves. A run
that goes on from a checkpoint drops the lines after that checkpoint and writes them again.
"""

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from nightshift import progress
from nightshift.errors import ObjectNotFoundError, ObjectTooLargeError, StorageError
from nightshift.records.keys import report_key
from nightshift.records.run import Checkpoint
from nightshift.storage.documents import MIB
from nightshift.storage.store import Store
from nightshift.values import FROZEN, Count, Moment, Number, Seconds, Share

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


_SECONDS = 5
_MAX_BYTES = 32 * MIB
"""More than a week's lines."""


class _Line(BaseModel):
    model_config = FROZEN

    at: Moment
    """The store's time."""
    step: Count
    epoch: Count


class TrainingLine(_Line):
    """How the training went: written every five seconds and at the end of each epoch."""

    kind: Literal["training"] = "training"
    loss: Number
    """Mean of the epoch so far."""
    accuracy: Share
    """Share of the epoch's images so far that were classified correctly, 0 to 1."""
    learning_rate: Number
    images_per_second: Number
    """Since the line before."""
    train_seconds: Seconds
    """Seconds trained so far, over all resumes."""
    validation_loss: Number | None = None
    """Of the validation images; None where they were not looked at after this step."""
    validation_accuracy: Share | None = None


class CheckpointLine(_Line):
    """A committed checkpoint. Its `epoch` is the number of finished epochs."""

    kind: Literal["checkpoint"] = "checkpoint"
    bytes: Count
    stall_seconds: Seconds
    """How long the loop stood still for it."""
    save_seconds: Seconds
    """How long the save took, beside the training."""


Line = TrainingLine | CheckpointLine
_LINE: TypeAdapter[Line] = TypeAdapter(Annotated[Line, Field(discriminator="kind")])


class MetricsLog:
    """The lines of a run so far, and what writes them. Nothing it does can stop the run."""

    def __init__(self, store: Store, run_id: str, step: int, tensorboard: Path | None = None) -> None:
        """Go on after the line of `step`; `tensorboard`: where its event files go."""
        self._store, self._run_id = store, run_id
        self.lines = [line for line in read_lines(store, run_id) if line.step <= step] if step else []
        saves = [line.save_seconds for line in self.lines if isinstance(line, CheckpointLine)]
        self.longest_save = max(saves, default=0.0)
        """Seconds that the longest save so far has taken, beside the training."""
        self._last = time.monotonic()
        self._step = step
        self._writer = _writer(tensorboard, step) if tensorboard else None

    def trained(
        self,
        step: int,
        images: int,
        epoch_ended: bool,
        train_seconds: float,
        epoch: int,
        loss: float,
        accuracy: float,
        learning_rate: float,
        validation_loss: float | None = None,
        validation_accuracy: float | None = None,
    ) -> None:
        """Add a line about a step, if it is time to. The arguments are those of TrainingLine, and:

        Args:
            images: in a step.
            epoch_ended: whether this step is an epoch's last.
        """
        now = time.monotonic()
        if not epoch_ended and now - self._last < _SECONDS:
            return
        line = TrainingLine(
            at=self._now(),
            step=step,
            epoch=epoch,
            loss=loss,
            accuracy=accuracy,
            learning_rate=learning_rate,
            images_per_second=images * (step - self._step) / max(now - self._last, 1e-9),
            train_seconds=train_seconds,
            validation_loss=validation_loss,
            validation_accuracy=validation_accuracy,
        )
        self._last, self._step = now, step
        self.lines.append(line)
        if self._writer:
            for name, value in line.model_dump(exclude={"kind", "at", "step"}, exclude_none=True).items():
                self._writer.add_scalar(name, value, step)

    def saved(self, checkpoint: Checkpoint, save_seconds: float) -> None:
        """Add a line about a committed checkpoint, and store all lines. If that fails, the next checkpoint does it."""
        self.longest_save = max(self.longest_save, save_seconds)
        self.lines.append(
            CheckpointLine(
                at=self._now(),
                step=checkpoint.step,
                epoch=checkpoint.epoch,
                bytes=checkpoint.bytes,
                stall_seconds=checkpoint.metrics.stall_seconds,
                save_seconds=save_seconds,
            )
        )
        if self._writer:
            self._writer.flush()
        body = "".join(line.model_dump_json() + "\n" for line in list(self.lines))
        try:
            self._store.put(report_key(self._run_id, "metrics.jsonl"), body.encode())
        except StorageError as error:
            progress.current().warn(f"the metrics of run {self._run_id} could not be stored yet: {error}")

    def _now(self) -> datetime:
        now = self._store.now()
        return now.replace(microsecond=now.microsecond // 1000 * 1000)


def read_lines(store: Store, run_id: str) -> list[Line]:
    """All lines that are stored of a run. Those that are wrong are dropped with a warning: no run depends on them.

    Raises:
        StorageError: the store fails.
    """
    try:
        body, _ = store.get(report_key(run_id, "metrics.jsonl"), _MAX_BYTES)
    except ObjectNotFoundError:
        return []
    except ObjectTooLargeError as error:
        progress.current().warn(f"the metrics of run {run_id} are left out: {error}")
        return []
    lines: list[Line] = []
    dropped = 0
    for line in body.splitlines():
        try:
            lines.append(_LINE.validate_json(line))
        except ValidationError:
            dropped += 1
    if dropped:
        progress.current().warn(f"metrics.jsonl of run {run_id} is damaged: {dropped} of its lines are left out")
    return lines


def _writer(folder: Path, step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
