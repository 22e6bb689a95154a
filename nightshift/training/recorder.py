"""What a run records while it trains: checkpoints, metrics, progress. Only rank 0 records anything."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from nightshift import progress
from nightshift.checkpoints.payload import Payload, read_payload
from nightshift.checkpoints.restore import restore_newest
from nightshift.config.train import TrainConfig
from nightshift.data.batches import Plan
from nightshift.data.datasets import Dataset
from nightshift.errors import CheckpointCorruptError, StorageError, TrainingInterrupted
from nightshift.hardware import Hardware
from nightshift.records.curve import CurvePoint, is_enough, kept_of
from nightshift.records.lease import Run
from nightshift.refs import CheckpointRef
from nightshift.tracking.metrics import MetricsLog
from nightshift.training import starts
from nightshift.training.clock import Clock, clock_of
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

    def save_is_due(self, state: TrainState) -> bool:
        """Whether the loop must call `save` at this step boundary."""
        return False

    def is_last(self, state: TrainState) -> bool:
        """Whether the clock ends the training with the last step done. Then the record has said so before this returns.

        The loop asks before its first step, and at each step boundary. Raises NoTimeError if there is no time for the
        first epoch.
        """
        return False

    def report(self, state: TrainState, means: Means) -> None:
        """Show how far the run is."""

    def save(self, state: TrainState, parts: list[Payload]) -> None:
        """Begin to save this step. `parts` are those of all ranks (`TrainState.part`)."""

    def finish(self, state: TrainState, parts: list[Payload]) -> CheckpointRef | None:
        """Save this step, the last that this process does. Returns the committed checkpoint whose weights are to be
        published, if they are to be; None on ranks other than 0."""
        return None

    def stop(self, state: TrainState, parts: list[Payload]) -> None:
        """Save this step, at which the loop must stop. On rank 0 this raises TrainingInterrupted."""

    def diverged(self) -> None:
        """The loss is not finite, and training ends. What is being saved is from before: it is waited for."""


class RunRecorder(Recorder):
    """The recorder of rank 0, which holds the run."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        plan: Plan,
        hardware: Hardware,
        workspace: Workspace,
        test_images: int,
    ) -> None:
        self._run, self._config, self._plan = run, config, plan
        self._hardware, self._workspace, self._test_images = hardware, workspace, test_images
        self._restored_step: int | None = None
        self._seconds_before = 0.0

    def restore(self, check: Callable[[Payload], None]) -> Payload | None:
        # Read before the restore adds events of its own.
        changes = self._run.record.events[-1].detail

        def check_all(payload: Payload) -> None:
            check(payload)
            self._check_kept(payload)

        found = restore_newest(self._run, self._workspace.save_retry_seconds, check_all)
        if not found:
            return None
        checkpoint, payload = found
        self._restored_step = checkpoint.step
        self._seconds_before = checkpoint.metrics.train_seconds
        progress.current().say(f"resumed from step {checkpoint.step} ({self._run.store.url(checkpoint.key)})")
        if changes:
            progress.current().warn(f"the environment has changed, so bits may differ from here: {changes}")
        return payload

    def _check_kept(self, payload: Payload) -> None:
        """Raise CheckpointCorruptError if the epoch that is best so far is lost: it has to be trained again."""
        kept = kept_of([CurvePoint(**point) for point in payload["curve"]], self._config.evaluation)
        if not kept or kept.step == payload["step"]:
            return
        stored = [checkpoint for checkpoint in self._run.record.checkpoints if checkpoint.step == kept.step]
        if not stored:
            raise CheckpointCorruptError(f"the checkpoint after epoch {kept.epoch}, the best so far, is gone")
        try:
            read_payload(self._run.store, stored[-1])
        except CheckpointCorruptError as error:
            raise CheckpointCorruptError(
                f"that after epoch {kept.epoch}, the best so far, is damaged: {error}"
            ) from error

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
        last = self._run.record.last_step
        self._clock: Clock | None = None
        if last is None:
            price = self._workspace.price_per_hour
            self._clock = clock_of(self._run, self._config, self._plan, self._test_images, price, state.step)
        ranks = int(self._run.record.environment["world_size"])
        where = f"{state.device}" if ranks == 1 else f"{ranks} processes ({state.device})"
        progress.current().say(
            f"training {self._config.model.name} on {where}, from step {state.step:,} to "
            f"{last or self._plan.total_steps:,}"
        )

    def stepped(self, state: TrainState) -> None:
        self._run.check()
        self._saver.check()
        if state.step == self._first_step + 1:
            self._saver.prepare(state)
            self._run.trains()

    def report_is_due(self, step: int) -> bool:
        return time.monotonic() - self._last_report >= _REPORT_SECONDS or self._plan.position(step)[1] == 0

    def save_is_due(self, state: TrainState) -> bool:
        steps, seconds = self._config.saving.checkpoint_every_steps, self._config.saving.checkpoint_every_seconds
        return (
            (steps is not None and state.step % steps == 0)
            or (seconds is not None and time.monotonic() - self._last_saved >= seconds)
            or self._is_kept(state)
        )

    def _is_kept(self, state: TrainState) -> bool:
        """Whether the weights of this very step would be published if training ended now."""
        kept = kept_of(state.curve, self._config.evaluation)
        return kept is not None and kept.step == state.step

    def is_last(self, state: TrainState) -> bool:
        if self._is_done(state):
            return False
        clock = self._clock if self._run.record.last_step is None else None
        if clock and (why := clock.reason(state.step, self._metrics.longest_save)):
            progress.current().say(f"the clock ends the training {why}")
            now = self._run.store.now()
            self._run.update(lambda record: record.ended_by_clock(state.step, now, why))
        last = self._run.record.last_step
        return last is not None and state.step >= last

    def _is_done(self, state: TrainState) -> bool:
        """Whether training ends here, whatever the time is."""
        return state.step >= self._plan.total_steps or is_enough(state.curve, self._config.evaluation)

    def report(self, state: TrainState, means: Means) -> None:
        step = state.step
        epoch, within = self._plan.position(step - 1)
        epoch_ended = within == self._plan.steps_per_epoch - 1
        now = time.monotonic()
        images = sum(self._plan.batch_of(done) for done in range(self._last_reported_step, step))
        rate = images / max(now - self._last_report, 1e-9)
        self._last_report, self._last_reported_step = now, step
        point = state.curve[-1] if epoch_ended else None
        is_enough_now = is_enough(state.curve, self._config.evaluation)
        self._metrics.trained(
            step,
            self._plan.batch_size,
            epoch_ended,
            train_seconds=self._train_seconds(),
            epoch=epoch + 1,
            loss=means.loss,
            accuracy=means.accuracy,
            learning_rate=learning_rate(self._config, step - 1, self._plan.total_steps),
            validation_loss=point.validation_loss if point else None,
            validation_accuracy=point.validation_accuracy if point else None,
        )
        progress.current().trained(
            progress.StepReport(
                step=step,
                total_steps=step if is_enough_now else self._run.record.last_step or self._plan.total_steps,
                epoch=epoch + 1,
                epochs=self._plan.epochs,
                loss=means.loss,
                accuracy=means.accuracy,
                images_per_second=rate,
                validation_accuracy=point.validation_accuracy if point else None,
            ),
            epoch_ended,
        )
        if is_enough_now:
            progress.current().say(
                f"no better epoch on the validation images in {self._config.evaluation.patience} looks: stops early"
            )

    def save(self, state: TrainState, parts: list[Payload]) -> None:
        self._saver.save(
            state, parts, self._finished_epochs(state), self._train_seconds(), is_needed=self._is_kept(state)
        )
        self._last_saved = time.monotonic()

    def finish(self, state: TrainState, parts: list[Payload]) -> CheckpointRef:
        if self._restored_step != state.step:
            self._saver.save_and_wait(state, parts, self._finished_epochs(state), self._train_seconds())
        chosen = self._run.record.chosen
        assert chosen
        return self._run.record.ref(chosen)

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

    def diverged(self) -> None:
        self._saver.settle()

    def _finished_epochs(self, state: TrainState) -> int:
        return self._plan.position(state.step)[0]

    def _train_seconds(self) -> float:
        """Seconds trained over all resumes."""
        return self._seconds_before + time.monotonic() - self._started
