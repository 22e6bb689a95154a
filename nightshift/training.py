"""Build state → loop → step edge. A retry is the same call: where to go on from lies in the store."""

import ctypes
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import deterministic

from models import build_model, known_models
from nightshift import __version__, batches, progress, records, runs
from nightshift.batches import Plan
from nightshift.checkpoints import Saver, restore
from nightshift.datasets import Dataset, get_spec, open_dataset
from nightshift.errors import (
    ConfigError,
    RankLostError,
    RunNotFoundError,
    StorageError,
    TrainingDivergedError,
    TrainingInterrupted,
)
from nightshift.metrics import MetricsLog
from nightshift.optim import build_optimizer, learning_rate, set_learning_rates
from nightshift.ranks import ALONE, Ranks
from nightshift.records import Checkpoint, Origin
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.runs import Run, RunSpec
from nightshift.settings import TrainConfig
from nightshift.signals import StopSignals
from nightshift.state import TrainState, seed_everything, seed_step
from nightshift.workspace import Workspace

_REPORT_SECONDS = 0.25
_INITIAL_IMAGES = 5000
"""So many training images a network may see to set its first weights."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_COMPILATION_STEPS = 2000
"""A training of so many steps takes minutes on a GPU, and a compilation half a one."""


def train(
    workspace: Workspace,
    run_id: str,
    config: TrainConfig,
    dataset_ref: DatasetRef,
    origin: Origin | None = None,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> CheckpointRef:
    """Train a run to its end in this process, from wherever it stands, and return its last checkpoint.

    Args:
        origin: what started it, for its record.
        should_stop: asked after each step with the number of steps done, besides SIGTERM and SIGINT.

    Raises:
        TrainingInterrupted: stopped by a signal or `should_stop`; the last step done is saved, or the message
            says that it could not be.
        LeaseLostError: another trainer has taken the run over.
        LeaseHeldError, ResumeMismatchError: as `runs.hold`.
        ConfigError: the model or the device does not exist.
        TrainingDivergedError: the loss is not finite; the last good checkpoint stands.
    """
    finished = find_finished(workspace, run_id, config, dataset_ref)
    if finished:
        return finished
    with StopSignals() as signals:
        done = train_as(
            ALONE,
            workspace,
            run_id,
            config,
            dataset_ref,
            RankOrders(lambda step: signals.received is not None or should_stop(step)),
            origin,
        )
    assert done is not None
    return done


@dataclass(frozen=True)
class RankOrders:
    """What is asked of a rank while it trains; all ranks do what is asked of any."""

    should_stop: Callable[[int], bool]
    """Save after this step, and end."""
    should_restart: Callable[[], bool] = lambda: False
    """Save after this step, and leave to be started again, for machines have come or gone."""
    process: str | None = None
    """Who answers for the run, if not this process."""


def train_as(
    ranks: Ranks,
    workspace: Workspace,
    run_id: str,
    config: TrainConfig,
    dataset_ref: DatasetRef,
    orders: RankOrders,
    origin: Origin | None = None,
) -> CheckpointRef | None:
    """What one rank does of `train`, which tells what is raised; its last checkpoint on rank 0, None elsewhere.

    Raises:
        RankLostError: another rank is gone, or `orders` are to start again.
    """
    device = pick_device(config)
    if device.type == "cpu":
        _keep_freed_memory()
    with ranks.lost_is_told(), _numerics(config, device):
        with ranks.first_on_each_machine():
            dataset = open_dataset(workspace, dataset_ref).resident_on(device)
        plan = batches.make_plan(config, dataset)
        ranks.check_batches(plan.smallest_batch)
        if not ranks.leads:
            return _Loop(ranks, None, config, dataset, plan, device, workspace).run_to_end(orders)
        environment = describe_environment(device, ranks.world_size) | {
            "precision": pick_precision(config, device),
            "compile": pick_compile(config, device, plan.total_steps),
        }
        spec = RunSpec(run_id, config, dataset_ref, environment, plan.total_steps, origin or Origin())
        if orders.process:
            spec = replace(spec, process=orders.process)
        # A rank 0 that was lost with its machine has left a lease behind, which has to run out.
        patience = 1.5 * workspace.lease_seconds if ranks.nodes > 1 else 0
        with runs.hold(workspace.store, spec, workspace.lease_seconds, patience) as run, ranks.lost_is_told():
            return _Loop(ranks, run, config, dataset, plan, device, workspace).run_to_end(orders)


def find_finished(workspace: Workspace, run_id: str, config: TrainConfig, dataset: DatasetRef) -> CheckpointRef | None:
    """The last checkpoint of a run that is finished; finds out before any work is done what stands in its way.

    Raises:
        ConfigError, ResumeMismatchError, StorageError: as `train`.
    """
    check_config(config)
    with suppress(RunNotFoundError):
        record, _ = records.read_record(workspace.store, run_id)
        if record.status == "finished":
            runs.check_matches(record, config, dataset)
            progress.current().say(f"run {run_id} is finished: nothing to train")
            return record.ref(record.checkpoints[-1])
    workspace.store.check_fencing()
    return None


def check_config(config: TrainConfig) -> None:
    """Raise ConfigError if the model, the data set or the device a config names does not exist."""
    get_spec(config.dataset)
    if config.model not in known_models():
        raise ConfigError(f"there is no model {config.model!r}. The models are: {', '.join(known_models())}")
    if config.tensorboard and not find_spec("tensorboard"):
        raise ConfigError("tensorboard=true needs a package that is not here: install nightshift[tensorboard]")
    pick_device(config)


def pick_device(config: TrainConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device='cuda', but torch finds no GPU here. Allowed here are 'auto' and 'cpu'")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def pick_precision(config: TrainConfig, device: torch.device) -> str:
    """float32 or bfloat16. Where the hardware lacks bfloat16 it is emulated, many times slower than float32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    return "bfloat16" if native else "float32"


def pick_compile(config: TrainConfig, device: torch.device, total_steps: int) -> str:
    """on or off. Compiled code is faster on a GPU only, and only many steps repay the compilation."""
    if config.compile != "auto":
        return config.compile
    return "on" if device.type == "cuda" and total_steps >= _COMPILATION_STEPS else "off"


def build_state(
    ranks: Ranks, run: Run | None, config: TrainConfig, dataset: Dataset, device: torch.device
) -> tuple[TrainState, Checkpoint | None]:
    """The state of a run: as its newest whole checkpoint has it, or else freshly initialized from the seed.

    Rank 0, which holds the run, decides; the others get what it has.

    Returns:
        The state, and on rank 0 the checkpoint it was restored from.
    """
    seed_everything(config.seed)
    model = build_model(config.model, len(dataset.classes))
    model = ranks.synchronized(model, device).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState(model, build_optimizer(model, config), device, config.ema_decay)
    changes = run.record.events[-1].detail if run else ""
    found = restore(run) if run else None
    if not found:
        show_first_images(model, config, dataset)
    checkpoint, payload = found or (None, state.capture())
    payload = ranks.share(payload)
    seed_everything(config.seed, ranks.rank)
    state.restore(payload, ranks.rank, ranks.world_size)
    if run and checkpoint:
        progress.current().say(f"resumed from step {checkpoint.step} ({run.store.url(checkpoint.key)})")
        if changes:
            progress.current().warn(f"the environment has changed, so bits may differ from here: {changes}")
    return state, checkpoint


def show_first_images(model: nn.Module, config: TrainConfig, dataset: Dataset) -> None:
    """Let a network that sets its first weights by training images (`initialize_from`) do so."""
    if hasattr(model, "initialize_from"):
        images = dataset.train_images[:_INITIAL_IMAGES].cpu()  # so that every device begins with the same weights
        model.initialize_from(batches.to_input(images, *batches.normalizer(dataset, config.normalization)))  # type: ignore[operator]


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
            self.train_step(*batches.training_batch(self.dataset, self.config, plan, state.step, self.ranks))
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
        set_learning_rates(state.optimizer, config, state.step, self.plan.total_steps)
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


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the next step needs it again, and the kernel hands it out page by page.

    Tensors of more than 32 MiB, the most mallopt(3) accepts, still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, -1)


@contextmanager
def _numerics(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for the time of a training, then whatever was set before."""
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if config.deterministic and device.type == "cuda":
        # cuBLAS reads it once, when it is first used; without it deterministic mode refuses to multiply.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    # Else each output is first filled with NaN, at 3 % of the speed, for models that read what they never wrote.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]


def describe_environment(device: torch.device, world_size: int = 1) -> dict[str, str]:
    """What decides bits besides config and data, and which code it was."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "world_size": str(world_size),
        "python": platform.python_version(),
        "code": _code_version(),
    }


def _code_version() -> str:
    """Nightshift's version, and the commit if it runs from a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{__version__}+{commit}" if commit else __version__
