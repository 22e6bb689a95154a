"""DOC."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nightshift import progress
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.batches import Plan
from nightshift.data.datasets import Dataset
from nightshift.errors import (
    RankLostError,
    StorageError,
    TrainingDivergedError,
    TrainingInterrupted,
)
from nightshift.hardware import pick_compile, pick_precision
from nightshift.records.lease import Run
from nightshift.refs import CheckpointRef
from nightshift.tracking.metrics import MetricsLog
from nightshift.training.optimizers import apply_schedule, learning_rate
from nightshift.training.ranks import Ranks
from nightshift.training.saver import Saver
from nightshift.training.state import build_state, seed_step
from nightshift.workspace import Workspace

_REPORT_SECONDS = 0.25


@dataclass(frozen=True)
class RankOrders:
    """What is asked of a rank while it trains; all ranks do what is asked of any."""

    should_stop: Callable[[int], bool]
    """Save after this step, and end."""
    should_restart: Callable[[], bool] = lambda: False
    """Save after this step, and leave to be started again, for machines have come or gone."""
    process: str | None = None
    """Who answers for the run, if not this process."""


class _Loop:
    """The training loop of one process: steps, and what has to happen at their edges."""

    def __init__(
        self,
        ranks: Ranks,
        run: Run | None,
        config: TrainConfig,
        dataset: Dataset,
        plan: Plan,
        device: torch.device,
        workspace: Workspace,
    ) -> None:
        """`run`: on rank 0, which alone saves and tells."""
        self.ranks, self.run, self.config, self.dataset, self.plan = ranks, run, config, dataset, plan
        self.state, restored = build_state(ranks, run, config, dataset, device)
        self.bfloat16 = pick_precision(config, device) == "bfloat16"
        compiled = pick_compile(config, device, plan.total_steps) == "on"
        model = self.state.model
        self.forward = ranks.parallel(torch.compile(model) if compiled else model, device)  # type: ignore[arg-type]
        self.scale, self.shift = (part.to(device) for part in batches.normalizer(dataset, config.normalization))
        self.started = self.last_saved = self.last_report = time.monotonic()
        self.images_since_report = 0
        if run:
            events = workspace.home / "tensorboard" / run.run_id if config.tensorboard else None
            self.metrics = MetricsLog(run.store, run.run_id, self.state.step, events)
            self.saver = Saver(run, config, device, workspace.save_retry_seconds, self.metrics)
            self.restored = run.record.ref(restored) if restored else None
            self.seconds_before = restored.metrics["train_seconds"] if restored else 0.0

    def run_to_end(self, orders: RankOrders) -> CheckpointRef | None:
        state, plan, first = self.state, self.plan, self.state.step
        if self.run:
            progress.current().say(
                f"training {self.config.model} on {self.where()}, from step {state.step:,} to {plan.total_steps:,}"
            )
        state.model.train()
        while state.step < plan.total_steps:
            share = self.ranks.share_of(plan.batch_of(state.step))
            self.train_step(*batches.training_batch(self.dataset, self.config, plan, state.step, share))
            if self.run:
                self.run.check()
                if state.step == first + 1:
                    self.saver.prepare(state)
            report, restart, stop, save = self.ranks.any(
                self.report_is_due(), orders.should_restart(), orders.should_stop(state.step), self.checkpoint_is_due()
            )
            if report:
                self.report()
            if restart:
                self.save_and_wait()
                raise RankLostError(f"stopped after step {state.step}, to be started again with other machines")
            if stop:
                self.epoch_means()  # a diverged state is not worth keeping
                break
            if save:
                parts = self.ranks.gather(state.part())
                if self.run:
                    self.saver.save(state, parts, *self.saved_with())
                self.last_saved = time.monotonic()
        if state.step == plan.total_steps or not self.run:
            return self.save_and_wait()
        raise self.interrupted()

    def where(self) -> str:
        count = self.ranks.world_size
        return f"{self.state.device}" if count == 1 else f"{count} processes ({self.state.device})"

    def save_and_wait(self) -> CheckpointRef | None:
        """On rank 0 the checkpoint of this step, which is saved if it was not restored from one."""
        parts = self.ranks.gather(self.state.part())
        if not self.run:
            return None
        if self.restored and self.restored.step == self.state.step:
            return self.restored
        return self.saver.save_and_wait(self.state, parts, *self.saved_with())

    def interrupted(self) -> TrainingInterrupted:
        """Save the last step, and say whether that worked."""
        assert self.run is not None
        saved = "is saved"
        try:
            self.save_and_wait()
        except StorageError as error:
            saved = f"could not be saved ({error}); step {self.run.record.step} is the newest that is"
        return TrainingInterrupted(
            f"stopped after step {self.state.step} of {self.plan.total_steps}, which {saved}. "
            f"To go on: nightshift resume {self.run.run_id}"
        )

    def saved_with(self) -> tuple[int, float]:
        """What a checkpoint tells besides the state: finished epochs, and seconds trained over all resumes."""
        epoch, _ = self.plan.position(self.state.step)
        return epoch, self.seconds_before + time.monotonic() - self.started

    def train_step(self, images: Tensor, labels: Tensor) -> None:
        """Forward, backward, update; this rank's images, uint8 (share, 32, 32, 3), and labels, int64 (share,)."""
        state, config, batch = self.state, self.config, self.plan.batch_of(self.state.step)
        epoch, within = self.plan.position(state.step)
        if within == 0:
            state.begin_epoch()
        seed_step(config.seed, state.step)
        apply_schedule(state.optimizer, config, state.step, self.plan.total_steps)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.forward(batches.to_input(images, self.scale, self.shift))
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        state.optimizer.zero_grad()
        # What the ranks' mean gradient has to become is the gradient of the mean over the whole batch.
        weight = len(labels) * self.ranks.world_size / batch
        (loss if weight == 1 else loss * weight).backward()  # type: ignore[no-untyped-call]
        state.advance()
        state.epoch_images += batch
        state.epoch_loss += loss.detach().double() * len(labels)
        state.epoch_correct += (logits.detach().argmax(1) == labels).sum()
        self.images_since_report += batch
        if within == self.plan.steps_per_epoch - 1:
            loss_mean, accuracy = self.epoch_means()
            state.curve.append({"epoch": epoch + 1, "step": state.step, "loss": loss_mean, "accuracy": accuracy})

    def epoch_means(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far, over all ranks; on a GPU this waits for the step to be done.

        Raises:
            TrainingDivergedError: the loss is not finite.
        """
        state = self.state
        loss_sum, correct = self.ranks.total(state.epoch_loss, state.epoch_correct).tolist()
        loss = loss_sum / state.epoch_images
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss is {loss} at step {state.step}: lower the learning rate "
                f"(it is {self.config.lr}) or raise the batch size. The last checkpoint before is kept"
            )
        return loss, correct / state.epoch_images

    def checkpoint_is_due(self) -> bool:
        """Rank 0 decides, since it is its clock that counts."""
        steps, seconds = self.config.checkpoint_every_steps, self.config.checkpoint_every_seconds
        return self.ranks.leads and (
            (steps is not None and self.state.step % steps == 0)
            or (seconds is not None and time.monotonic() - self.last_saved >= seconds)
        )

    def report_is_due(self) -> bool:
        return self.ranks.leads and (
            time.monotonic() - self.last_report >= _REPORT_SECONDS or self.plan.position(self.state.step)[1] == 0
        )

    def report(self) -> None:
        epoch, within = self.plan.position(self.state.step - 1)
        epoch_ended = within == self.plan.steps_per_epoch - 1
        loss, accuracy = self.epoch_means()
        if not self.run:
            return
        now = time.monotonic()
        rate = self.images_since_report / max(now - self.last_report, 1e-9)
        self.last_report, self.images_since_report = now, 0
        self.metrics.trained(
            self.state.step,
            self.plan.batch_size,
            epoch_ended,
            train_seconds=self.saved_with()[1],
            epoch=epoch + 1,
            loss=loss,
            accuracy=accuracy,
            learning_rate=learning_rate(self.config, self.state.step - 1, self.plan.total_steps),
        )
        progress.current().trained(
            progress.StepReport(
                step=self.state.step,
                total_steps=self.plan.total_steps,
                epoch=epoch + 1,
                epochs=self.config.epochs,
                loss=loss,
                accuracy=accuracy,
                images_per_second=rate,
            ),
            epoch_ended,
        )
