"""The course of a training, line by line: `reports/<run_id>/metrics.jsonl`, and TensorBoard's event files if asked for.

An object cannot be appended to, so the whole file is put again with each checkpoint, in the thread that saves. Of a
run that goes on from a checkpoint, what was told after that checkpoint is dropped: it is told again.
"""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nightshift import progress
from nightshift.errors import ObjectNotFoundError, StorageError
from nightshift.records.keys import report_key
from nightshift.records.run import Checkpoint
from nightshift.storage.s3 import S3

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


_SECONDS = 5
Line = dict[str, Any]


class MetricsLog:
    """Lines of two kinds. `training`, every five seconds and at the end of each epoch: loss and accuracy of the epoch
    so far, learning rate, images per second since the line before, seconds trained. `checkpoint`: bytes, seconds the
    loop stood still, seconds the save took. All have `at` (the store's time), `step` and `epoch`.
    """

    def __init__(self, store: S3, run_id: str, step: int, tensorboard: Path | None = None) -> None:
        """Go on after the line of `step`; `tensorboard`: where its event files go."""
        self._store, self._run_id = store, run_id
        self.lines = [line for line in read_lines(store, run_id) if line["step"] <= step] if step else []
        self._last = time.monotonic()
        self._step = step
        self._writer = _writer(tensorboard, step) if tensorboard else None

    def trained(self, step: int, images: int, epoch_ended: bool, train_seconds: float, **values: float) -> None:
        """Tell of a step, if it is time to.

        Args:
            images: in a step.
            train_seconds: over all resumes.
            values: what else to tell.
        """
        now = time.monotonic()
        if not epoch_ended and now - self._last < _SECONDS:
            return
        rate = images * (step - self._step) / max(now - self._last, 1e-9)
        self._last, self._step = now, step
        values |= {"images_per_second": rate, "train_seconds": train_seconds}
        self._add("training", step, values)
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def saved(self, checkpoint: Checkpoint, save_seconds: float) -> None:
        """Tell of a committed checkpoint, and store all lines. If that fails, the next checkpoint's do it."""
        self._add(
            "checkpoint",
            checkpoint.step,
            {
                "epoch": checkpoint.epoch,
                "bytes": checkpoint.bytes,
                "stall_seconds": checkpoint.metrics["stall_seconds"],
                "save_seconds": save_seconds,
            },
        )
        if self._writer:
            self._writer.flush()
        body = "".join(json.dumps(line) + "\n" for line in list(self.lines))
        try:
            self._store.put(report_key(self._run_id, "metrics.jsonl"), body.encode())
        except StorageError as error:
            progress.current().warn(f"the metrics of run {self._run_id} could not be stored yet: {error}")

    def _add(self, kind: str, step: int, values: Line) -> None:
        at = self._store.now().isoformat(timespec="milliseconds")
        self.lines.append({"kind": kind, "at": at, "step": step, **values})


def read_lines(store: S3, run_id: str) -> list[Line]:
    """All lines that are stored of a run. A damaged file counts as none: it is not worth a run.

    Raises:
        StorageError: the store fails.
    """
    try:
        body, _ = store.get(report_key(run_id, "metrics.jsonl"))
        return [json.loads(line) for line in body.decode().splitlines()]
    except ObjectNotFoundError:
        return []
    except ValueError as error:
        progress.current().warn(f"metrics.jsonl of run {run_id} is damaged and begun anew: {error}")
        return []


def _writer(folder: Path, step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)
