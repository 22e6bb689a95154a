"""What a run records while it trains: checkpoints, metrics, progress. Only rank 0 records anything."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from nightshift import progress
from nightshift.checkpoints.payload import Payload
from nightshift.checkpoints.restore import restore_newest
from nightshift.config.train import TrainConfig
from nightshift.data.batches import Plan
from nightshift.data.datasets import Dataset
from nightshift.errors import StorageError, TrainingInterrupted
from nightshift.hardware import Hardware
from nightshift.records.lease import Run
from nightshift.refs import CheckpointRef
from nightshift.tracking.metrics import MetricsLog
from nightshift.training import starts
from nightshift.training.optimizers import learning_rate
from nightshift.training.saver import Saver
from nightshift.training.state import TrainState
from nightshift.workspace import Workspace

_REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class Means:
    """Over the images of an epoch up to a step: mean loss, and the share classified correctly."""

    loss: float
    accuracy: float


class Recorder:
    """The null variant, for every rank but rank 0: it restores, reports, saves and decides nothing.

    The loop calls `restore` once, `start` if that finds nothing, then `begin`, then the rest at step boundaries.
    """

    def restore(self, check: Callable[[Payload], None]) -> Payload | None:
        """The payload of the newest whole checkpoint; None if there is none. `check` as of `restore_newest`."""
        return None

    def start(self, model: nn.Module, dataset: Dataset) -> None:
        """Give the model of a run that has no checkpoint the weights it begins with, if it has a parent."""

    def begin(self, state: TrainState) -> None:
        """The loop is about to take its first step."""

    def stepped(self, state: TrainState) -> None:
        """A step is done. Raises LeaseLostError if another trainer may hold the run by now."""

    def report_is_due(self, step: int) -> bool:
        """Whether the loop must call `report` at this step boundary. Rank 0's clock decides."""
        return False

    def save_is_due(self, step: int) -> bool:
        """Whether the loop must call `save` at this step boundary."""
        return False

    def report(self, step: int, means: Means) -> None:
        """Show how far the run is after `step` steps."""

    def save(self, state: TrainState, parts: list[Payload]) -> None:
        """Begin to save this step. `parts` are those of all ranks (`TrainState.part`)."""

    def finish(self, state: TrainState, parts: list[Payload]) -> CheckpointRef | None:
        """The committed checkpoint of this step, the last that this process does; None on ranks other than 0."""
        return None

    def stop(self, state: TrainState, parts: list[Payload]) -> None:
        """Save this step, at which the loop must stop. On rank 0 this raises TrainingInterrupted."""


class RunRecorder(Recorder):
    """The recorder of rank 0, which holds the run."""

    def __init__(self, run: Run, config: TrainConfig, plan: Plan, hardware: Hardware, workspace: Workspace) -> None:
        self._run, self._config, self._plan = run, config, plan
        self._hardware, self._workspace = hardware, workspace
        self._restored: CheckpointRef | None = None
        self._seconds_before = 0.0

    def restore(self, check: Callable[[Payload], None]) -> Payload | None:
        # Read before the restore adds events of its own.
        changes = self._run.record.events[-1].detail
        found = restore_newest(self._run, self._workspace.save_retry_seconds, check)
        if not found:
            return None
        checkpoint, payload = found
        self._restored = self._run.record.ref(checkpoint)
        self._seconds_before = checkpoint.metrics.train_seconds
        progress.current().say(f"resumed from step {checkpoint.step} ({self._run.store.url(checkpoint.key)})")
        if changes:
            progress.current().warn(f"the environment has changed, so bits may differ from here: {changes}")
        return payload

    def start(self, model: nn.Module, dataset: Dataset) -> None:
        parent = self._run.record.parent
        if not parent:
            return
        if parent.kind != "scratch":
            starts.begin(self._run.store, parent, self._config, dataset, model)
        progress.current().say(
            f"begins with {parent}" + (f" ({parent.detail})" if parent.sha256 and parent.detail else "")
        )

    def begin(self, state: TrainState) -> None:
        self._started = self._last_saved = self._last_report = time.monotonic()
        self._first_step = self._last_reported_step = state.step
        events = self._workspace.home / "tensorboard" / self._run.run_id
        self._metrics = MetricsLog(
            self._run.store, self._run.run_id, state.step, events if self._config.tracking.tensorboard else None
        )
        self._saver = Saver(
            self._run, self._config.saving, self._hardware.device, self._workspace.save_retry_seconds, self._metrics
        )
        ranks = int(self._run.record.environment["world_size"])
        where = f"{state.device}" if ranks == 1 else f"{ranks} processes ({state.device})"
        progress.current().say(
            f"training {self._config.model.name} on {where}, from step {state.step:,} to {self._plan.total_steps:,}"
        )

    def stepped(self, state: TrainState) -> None:
        self._run.check()
        if state.step == self._first_step + 1:
            self._saver.prepare(state)
            self._run.trains()

    def report_is_due(self, step: int) -> bool:
        return time.monotonic() - self._last_report >= _REPORT_SECONDS or self._plan.position(step)[1] == 0

    def save_is_due(self, step: int) -> bool:
        steps, seconds = self._config.saving.checkpoint_every_steps, self._config.saving.checkpoint_every_seconds
        return (steps is not None and step % steps == 0) or (
            seconds is not None and time.monotonic() - self._last_saved >= seconds
        )

    def report(self, step: int, means: Means) -> None:
        epoch, within = self._plan.position(step - 1)
        epoch_ended = within == self._plan.steps_per_epoch - 1
        now = time.monotonic()
        images = sum(self._plan.batch_of(done) for done in range(self._last_reported_step, step))
        rate = images / max(now - self._last_report, 1e-9)
        self._last_report, self._last_reported_step = now, step
        self._metrics.trained(
            step,
            self._plan.batch_size,
            epoch_ended,
            train_seconds=self._train_seconds(),
            epoch=epoch + 1,
            loss=means.loss,
            accuracy=means.accuracy,
            learning_rate=learning_rate(self._config, step - 1, self._plan.total_steps),
        )
        progress.current().trained(
            progress.StepReport(
                step=step,
                total_steps=self._plan.total_steps,
                epoch=epoch + 1,
                epochs=self._plan.epochs,
                loss=means.loss,
                accuracy=means.accuracy,
                images_per_second=rate,
            ),
            epoch_ended,
        )

    def save(self, state: TrainState, parts: list[Payload]) -> None:
        self._saver.save(state, parts, self._finished_epochs(state), self._train_seconds())
        self._last_saved = time.monotonic()

    def finish(self, state: TrainState, parts: list[Payload]) -> CheckpointRef:
        if self._restored and self._restored.step == state.step:
            return self._restored
        return self._saver.save_and_wait(state, parts, self._finished_epochs(state), self._train_seconds())

    def stop(self, state: TrainState, parts: list[Payload]) -> NoReturn:
        """Save the last step, and say whether that worked."""
        saved = "is saved"
        try:
            self.finish(state, parts)
        except StorageError as error:
            saved = f"could not be saved ({error}); step {self._run.record.step} is the newest that is"
        raise TrainingInterrupted(
            f"stopped after step {state.step} of {self._plan.total_steps}, which {saved}. "
            f"To go on: nightshift resume {self._run.run_id}"
        )

    def _finished_epochs(self, state: TrainState) -> int:
        return self._plan.position(state.step)[0]

    def _train_seconds(self) -> float:
        """Seconds trained over all resumes."""
        return self._seconds_before + time.monotonic() - self._started
