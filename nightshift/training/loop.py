"""The training loop of one process: steps, and what happens at the boundaries between them."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.batches import Batches, Plan
from nightshift.data.datasets import Dataset
from nightshift.errors import RankLostError, TrainingDivergedError
from nightshift.hardware import Hardware, sent
from nightshift.records.curve import CurvePoint, is_enough, is_validated
from nightshift.refs import CheckpointRef
from nightshift.training.layers import freeze_statistics
from nightshift.training.losses import build_loss
from nightshift.training.optimizers import apply_schedule, frozen_steps
from nightshift.training.ranks import Ranks
from nightshift.training.recorder import Means, Recorder
from nightshift.training.state import build_state, seed_step
from nightshift.training.validation import validate


@dataclass(frozen=True)
class RankOrders:
    """What a rank may be asked to do while it trains. What one rank is asked to do, all ranks do."""

    should_stop: Callable[[int], bool]
    """Save after this step, and end. Called with the number of steps done."""
    should_restart: Callable[[], bool] = lambda: False
    """Save after this step, and exit to be started again, because machines have come or gone."""
    process: str | None = None
    """The identity of the process that answers for the run, if it is not this one."""


class Loop:
    """Trains in one process: from the state it restores to the last step, or to the step at which it must stop."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        plan: Plan,
        hardware: Hardware,
        ranks: Ranks,
        recorder: Recorder,
    ) -> None:
        self._config, self._dataset, self._plan = config, dataset, plan
        self._hardware, self._ranks, self._recorder = hardware, ranks, recorder
        self._batches = Batches(dataset, config, plan, ranks.share_of)
        self._is_last = False
        self._state = build_state(config, dataset, hardware.device, ranks, recorder.restore, recorder.start)
        self._forward = ranks.parallel(hardware.compile(self._state.model), hardware.device)
        labels = dataset.train_labels[: plan.images]
        self._loss = build_loss(config.loss, labels, len(dataset.classes), hardware.device)
        scale, shift = batches.normalizer(dataset, config)
        self._scale, self._shift = scale.to(hardware.device), shift.to(hardware.device)

    def run(self, orders: RankOrders) -> CheckpointRef | None:
        """Train to the end. Returns the checkpoint to publish on rank 0, None elsewhere.

        Raises:
            TrainingInterrupted: `orders` say stop. Only rank 0 raises it, the others return.
            RankLostError: `orders` say restart.
            TrainingDivergedError, LeaseLostError, StorageError: as `train_alone`.
        """
        self._recorder.begin(self._state)
        try:
            return self._train(orders)
        except TrainingDivergedError:
            self._recorder.diverged()
            raise

    def _train(self, orders: RankOrders) -> CheckpointRef | None:
        state, ranks, recorder = self._state, self._ranks, self._recorder
        state.model.train()
        (self._is_last,) = ranks.any(recorder.is_last(state))
        while not self._is_over():
            self._train_step(*self._batches.batch(state.step))
            recorder.stepped(state)
            report, restart, stop, save, self._is_last = ranks.any(
                recorder.report_is_due(state.step),
                orders.should_restart(),
                orders.should_stop(state.step),
                recorder.save_is_due(state),
                recorder.is_last(state),
            )
            if report or self._is_last:
                recorder.report(state, self._epoch_means())
            if stop or restart:
                self._epoch_means()  # a diverged state is not worth keeping
            if restart:
                recorder.finish(state, ranks.gather(state.part()))
                raise RankLostError(f"stopped after step {state.step}, to be started again with other machines")
            if stop:
                break
            if save:
                recorder.save(state, ranks.gather(state.part()))
        parts = ranks.gather(state.part())
        if not self._is_over():
            recorder.stop(state, parts)
            return None
        return recorder.finish(state, parts)

    def _is_over(self) -> bool:
        """Whether all steps are done, or the validation images or the clock say that it is enough.

        But for the clock it is a function of the state.
        """
        is_done = self._state.step >= self._plan.total_steps or is_enough(self._state.curve, self._config.evaluation)
        return is_done or self._is_last

    def _train_step(self, images: Tensor, targets: Tensor) -> None:
        """Forward, backward, update, on this rank's images and targets, as `training_batch` returns them."""
        state, plan, batch = self._state, self._plan, self._plan.batch_of(self._state.step)
        epoch, within = plan.position(state.step)
        if within == 0:
            state.begin_epoch()
        seed_step(self._config.seed, state.step)
        apply_schedule(state.optimizer, self._config, state.step, plan.total_steps)
        if self._config.schedule.frozen_epochs:
            freeze_statistics(state.model, state.step < frozen_steps(self._config, plan.total_steps))
        state.optimizer.zero_grad()
        parts = self._ranks.parts_of(batch, self._config.optimizer.accumulate)
        for number, part in enumerate(zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)):
            is_last = number == parts - 1
            with nullcontext() if is_last else self._ranks.unaveraged(self._forward):
                self._add_gradients(*part, batch)
        if self._config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(state.model.parameters(), self._config.optimizer.clip_norm)
        state.advance()
        state.epoch_images += batch
        if within == plan.steps_per_epoch - 1:
            state.curve.append(self._finished_epoch(epoch + 1))

    def _finished_epoch(self, epoch: int) -> CurvePoint:
        means = self._epoch_means()
        point = CurvePoint(epoch=epoch, step=self._state.step, loss=means.loss, accuracy=means.accuracy)
        if not is_validated(epoch, self._plan.epochs, self._config.evaluation):
            return point
        network = self._state.network
        loss, accuracy = validate(network, self._dataset, (self._scale, self._shift), self._ranks).tolist()
        self._check_finite(loss)
        return point.changed(validation_loss=loss, validation_accuracy=accuracy)

    def _add_gradients(self, images: Tensor, targets: Tensor, batch: int) -> None:
        """Forward and backward on some of the images of a batch, and their part of the epoch's sums.

        An image counts as classified correctly by its label; a mixed one by that of its two classes which it shows more
        of. So the training accuracy of mixed images is low, even if that of the model is not.
        """
        state, device = self._state, self._hardware.device
        images, targets = sent(images, device), sent(targets, device)
        with self._hardware.autocast():
            logits = self._forward(batches.to_input(images, self._scale, self._shift))
            loss = self._loss(logits, targets)
        # The ranks' gradients are averaged. The result must be the gradient of the mean loss over the whole batch.
        weight = len(images) * self._ranks.world_size / batch
        (loss if weight == 1 else loss * weight).backward()  # type: ignore[no-untyped-call]
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        state.epoch_loss += loss.detach().double() * len(images)
        state.epoch_correct += (logits.detach().argmax(1) == labels).sum()

    def _epoch_means(self) -> Means:
        """Means over the epoch so far and over all ranks. On a GPU this waits until the step is done.

        Raises:
            TrainingDivergedError: the loss is not finite.
        """
        state = self._state
        loss_sum, correct = self._ranks.total(state.epoch_loss, state.epoch_correct).tolist()
        loss = loss_sum / state.epoch_images
        self._check_finite(loss)
        return Means(loss, correct / state.epoch_images)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss is {loss} at step {self._state.step}: lower the learning rate "
                f"(it is {self._config.optimizer.lr}) or raise the batch size. The checkpoints from before, if there "
                "are any, are kept"
            )
