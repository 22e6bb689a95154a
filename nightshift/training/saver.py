"""Snapshot → upload, while it is serialized → commit.

A checkpoint exists once the run record names it, and not before. First the payload is uploaded under a key with the
step and the writer's fencing token, then the record is put by compare-and-swap. Whatever happens in between leaves an
orphan, never a damaged checkpoint. Retention drops a checkpoint from the record first, and deletes its payload after
that.
"""

import contextvars
import math
import threading
import time
from contextlib import suppress

import torch
from tenacity import Retrying

from nightshift import progress
from nightshift.checkpoints.payload import Payload
from nightshift.checkpoints.retention import retained
from nightshift.checkpoints.upload import upload_payload
from nightshift.config.sections import SavingConfig
from nightshift.errors import StorageError
from nightshift.records.curve import CurvePoint
from nightshift.records.keys import payload_key
from nightshift.records.lease import Run
from nightshift.records.run import Checkpoint, CheckpointMetrics, RunRecord
from nightshift.refs import CheckpointRef
from nightshift.storage.patience import patient
from nightshift.tracking.metrics import MetricsLog
from nightshift.training.snapshot import Snapshot
from nightshift.training.state import TrainState


class Saver:
    """Saves the state of a run while training goes on.

    At a step boundary the loop copies the state; a background thread does the rest. One save is in flight at a time:
    one that is due meanwhile is skipped and counted, never queued. A save that fails is retried for `retry_seconds`.
    Then training goes on, and the log and the record say that it is not protected. Only a save that is needed is never
    skipped; if it fails, training does not go on, for the run has to be taken up again from the checkpoint before.
    """

    def __init__(
        self,
        run: Run,
        config: SavingConfig,
        device: torch.device,
        retry_seconds: float,
        metrics: MetricsLog | None = None,
    ) -> None:
        """`metrics` gets each checkpoint, and stores its lines with it."""
        self._run, self._config, self._retry_seconds = run, config, retry_seconds
        self._metrics = metrics
        self._snapshot = Snapshot(device)
        self._thread: threading.Thread | None = None
        self._abandoned = threading.Event()
        self._saved: CheckpointRef | None = None
        self._error: Exception | None = None
        self._is_needed = False
        self._skipped = self._failed = self._failed_in_a_row = 0
        self._unprotected = ""
        self._told: set[tuple[str, type[BaseException]]] = set()

    def prepare(self, state: TrainState) -> None:
        """Allocate memory for the copies, in the background. The optimizer must have done a step, to have a state."""
        self._snapshot.prepare(state.capture())

    def check(self) -> None:
        """Raise the error that the last save has ended with, if training cannot go on without it."""
        if self._error and (self._is_needed or not isinstance(self._error, StorageError)):
            raise self._error

    def save(
        self, state: TrainState, parts: list[Payload], epoch: int, train_seconds: float, is_needed: bool = False
    ) -> None:
        """Begin to save this step, unless the previous save is still in flight.

        Args:
            parts: every rank's (`TrainState.part`), in order.
            epoch: finished epochs.
            train_seconds: seconds trained so far, over all resumes.
            is_needed: whether the run is of no use without this checkpoint. Then the previous save is waited for.

        Raises:
            LeaseLostError: the previous save found that another trainer has taken the run over.
            StorageError: the previous save was needed, and has failed.
        """
        if is_needed:
            self.settle()
        if self._thread and self._thread.is_alive():
            self._skipped += 1
            return
        self.check()
        self._is_needed = is_needed
        started = time.perf_counter()
        self._snapshot.take(state.capture(parts))
        stall_seconds = time.perf_counter() - started
        self._abandoned.clear()
        context = contextvars.copy_context()
        # A daemon, because a second signal stops at once and must not wait for it.
        self._thread = threading.Thread(
            target=context.run,
            args=(self._store_or_warn, epoch, train_seconds, stall_seconds),
            name="checkpoint",
            daemon=True,
        )
        self._thread.start()

    def save_and_wait(self, state: TrainState, parts: list[Payload], epoch: int, train_seconds: float) -> CheckpointRef:
        """Save this step and return its committed checkpoint; the arguments are those of `save`.

        Raises:
            LeaseLostError: another trainer has taken the run over; nothing was committed.
            StorageError: it could not be stored, or a needed one before it.
        """
        self.settle()
        self.check()
        if self._saved is None or self._saved.step != state.step:
            self.save(state, parts, epoch, train_seconds)
            self._wait()
            if self._error:
                raise self._error
        assert self._saved is not None
        assert self._saved.step == state.step
        return self._saved

    def settle(self) -> None:
        """Wait for the save in flight: for its current attempt, or if it is needed until it is given up."""
        if not self._is_needed:
            self._abandoned.set()
        self._wait()

    def _wait(self) -> None:
        if self._thread:
            self._thread.join()

    def _store_or_warn(self, epoch: int, train_seconds: float, stall_seconds: float) -> None:
        self._error = None
        try:
            self._store(self._snapshot.payload(), epoch, train_seconds, stall_seconds)
        except StorageError as error:
            self._error, self._unprotected = error, str(error)
            self._failed += 1
            self._failed_in_a_row += 1
            newest = f"of step {self._run.record.step:,}" if self._run.record.checkpoints else "none"
            self._warn("a checkpoint could not be stored", error, f"The newest one is {newest}")
        except Exception as error:
            self._error = error

    def _store(self, payload: Payload, epoch: int, train_seconds: float, stall_seconds: float) -> None:
        images, parts, curve = max(payload["epoch_images"], 1), payload["ranks"], payload["curve"]
        loss = sum(float(part["epoch_loss"]) for part in parts) / images
        if not math.isfinite(loss):
            return  # a diverged state is not worth keeping; the loop itself notices within a moment
        metrics = CheckpointMetrics(
            train_seconds=train_seconds,
            stall_seconds=stall_seconds,
            loss=loss,
            accuracy=sum(int(part["epoch_correct"]) for part in parts) / images,
            epoch_loss=curve[-1]["loss"] if curve else None,
            skipped=self._skipped,
            failed=self._failed,
        )
        run, step, started = self._run, payload["step"], time.perf_counter()
        key = payload_key(run.run_id, step, run.token)
        for attempt in self._attempts():
            with attempt:
                written = upload_payload(run.store, key, payload)
                checkpoint = Checkpoint(
                    step=step,
                    epoch=epoch,
                    key=key,
                    bytes=written.bytes,
                    sha256=written.sha256,
                    written_at=run.store.now(),
                    metrics=metrics,
                )
                self._commit(checkpoint, [CurvePoint(**point) for point in curve])
        self._saved = run.record.ref(checkpoint)
        if self._failed_in_a_row > 1:
            progress.current().say(f"checkpoints are stored again; {self._failed_in_a_row} could not be")
        self._failed_in_a_row = 0
        self._told.clear()
        if self._metrics:
            self._metrics.saved(checkpoint, time.perf_counter() - started)

    def _warn(self, problem: str, error: BaseException, advice: str) -> None:
        """Say it once, however often the same goes wrong until a save works again."""
        if (problem, type(error)) not in self._told:
            self._told.add((problem, type(error)))
            progress.current().warn(f"{problem}: {error}. {advice}")

    def _attempts(self) -> Retrying:
        def warn(error: BaseException) -> None:
            self._warn("a checkpoint is not stored yet", error, "Trying again")

        return patient(self._retry_seconds, given_up=self._abandoned, warn=warn)

    def _commit(self, checkpoint: Checkpoint, curve: list[CurvePoint]) -> None:
        """Commit the checkpoint, then delete what retention no longer keeps."""
        run, before = self._run, self._run.record.checkpoints

        def commit(record: RunRecord) -> RunRecord:
            others = [known for known in record.checkpoints if known.key != checkpoint.key]
            record = record.changed(checkpoints=[*others, checkpoint], curve=curve)
            record = record.changed(checkpoints=retained(record.checkpoints, self._config, record.chosen))
            if self._unprotected:
                record = record.with_event("unprotected", checkpoint.written_at, f"until here: {self._unprotected}")
            return record

        kept = {known.key for known in run.update(commit).checkpoints}
        self._unprotected = ""
        for known in before:
            if known.key not in kept:
                with suppress(StorageError):  # then it is an orphan, which gc finds
                    run.store.delete(known.key)
