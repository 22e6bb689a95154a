"""Build state → loop → step edge. A retry is the same call: where to go on from lies in the store."""

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import build_model, known_models
from nightshift import __version__, batches, progress, records, runs
from nightshift.batches import Plan
from nightshift.checkpoints import Saver, restore
from nightshift.datasets import Dataset, get_spec, open_dataset
from nightshift.errors import (
    ConfigError,
    RunNotFoundError,
    StorageError,
    TrainingDivergedError,
    TrainingInterrupted,
)
from nightshift.metrics import MetricsLog
from nightshift.optim import build_optimizer, learning_rate, set_learning_rates
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
    """Train a run to its end, from wherever it stands, and return its last checkpoint.

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
    check_config(config)
    finished = _finished(workspace, run_id, config, dataset_ref)
    if finished:
        progress.current().say(f"run {run_id} is finished: nothing to train")
        return finished
    workspace.store.check_fencing()
    device = pick_device(config)
    dataset = open_dataset(workspace, dataset_ref).resident_on(device)
    plan = batches.make_plan(config, dataset)
    environment = describe_environment(device) | {
        "precision": pick_precision(config, device),
        "compile": pick_compile(config, device, plan.total_steps),
    }
    spec = RunSpec(run_id, config, dataset_ref, environment, plan.total_steps, origin or Origin())
    with (
        _numerics(config, device),
        runs.hold(workspace.store, spec, workspace.lease_seconds) as run,
        StopSignals() as signals,
    ):
        events = workspace.home / "tensorboard" / run_id if config.tensorboard else None
        return _Loop(run, config, dataset, plan, device, workspace.save_retry_seconds, events).run_to_end(
            lambda step: signals.received is not None or should_stop(step)
        )


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
    run: Run, config: TrainConfig, dataset: Dataset, device: torch.device
) -> tuple[TrainState, Checkpoint | None]:
    """The state of a run: as its newest whole checkpoint has it, or else freshly initialized from the seed.

    Returns:
        The state, and the checkpoint it was restored from.
    """
    seed_everything(config.seed)
    model = build_model(config.model, len(dataset.classes))
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    state = TrainState(model, build_optimizer(model, config), device)
    changes = run.record.events[-1].detail
    restored = restore(run, state)
    if not restored:
        show_first_images(model, config, dataset)
    if restored:
        progress.current().say(f"resumed from step {restored.step} ({run.store.url(restored.key)})")
        if changes:
            progress.current().warn(f"the environment has changed, so bits may differ from here: {changes}")
    return state, restored


def show_first_images(model: nn.Module, config: TrainConfig, dataset: Dataset) -> None:
    """Let a network that sets its first weights by training images (`initialize_from`) do so."""
    if hasattr(model, "initialize_from"):
        images = dataset.train_images[:_INITIAL_IMAGES].cpu()  # so that every device begins with the same weights
        model.initialize_from(batches.to_input(images, *batches.normalizer(dataset, config.normalization)))  # type: ignore[operator]


class _Loop:
    """The training loop of one process: steps, and what has to happen at their edges."""

    def __init__(
        self,
        run: Run,
        config: TrainConfig,
        dataset: Dataset,
        plan: Plan,
        device: torch.device,
        retry_seconds: float,
        tensorboard: Path | None,
    ) -> None:
        self.run, self.config, self.dataset, self.plan = run, config, dataset, plan
        self.state, restored = build_state(run, config, dataset, device)
        self.metrics = MetricsLog(run.store, run.run_id, self.state.step, tensorboard)
        self.saver = Saver(run, config, device, retry_seconds, self.metrics)
        model = self.state.model
        self.bfloat16 = pick_precision(config, device) == "bfloat16"
        compiled = pick_compile(config, device, plan.total_steps) == "on"
        self.forward: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
        self.scale, self.shift = (part.to(device) for part in batches.normalizer(dataset, config.normalization))
        self.restored = run.record.ref(restored) if restored else None
        self.seconds_before = restored.metrics["train_seconds"] if restored else 0.0
        self.started = self.last_saved = self.last_report = time.monotonic()
        self.images_since_report = 0

    def run_to_end(self, should_stop: Callable[[int], bool]) -> CheckpointRef:
        state, plan, first = self.state, self.plan, self.state.step
        progress.current().say(
            f"training {self.config.model} on {state.device}, from step {state.step:,} to {plan.total_steps:,}"
        )
        state.model.train()
        while state.step < plan.total_steps:
            self.train_step(*batches.training_batch(self.dataset, self.config, plan, state.step))
            self.run.check()
            self.report()
            if state.step == first + 1:
                self.saver.prepare(state)
            if should_stop(state.step):
                break
            if self.checkpoint_is_due():
                self.saver.save(state, *self.saved_with())
                self.last_saved = time.monotonic()
        if self.restored and self.restored.step == state.step:
            return self.restored
        if state.step == plan.total_steps:
            return self.saver.save_and_wait(state, *self.saved_with())
        raise self.interrupted()

    def interrupted(self) -> TrainingInterrupted:
        """Save the last step, and say whether that worked."""
        self.epoch_means()  # a diverged state is not worth keeping
        try:
            self.saver.save_and_wait(self.state, *self.saved_with())
            saved = "is saved"
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
        """Forward, backward, update; images uint8 (batch, 32, 32, 3), labels int64 (batch,)."""
        state, config = self.state, self.config
        epoch, within = self.plan.position(state.step)
        if within == 0:
            state.begin_epoch()
        seed_step(config.seed, state.step)
        set_learning_rates(state.optimizer, config, state.step, self.plan.total_steps)
        with torch.autocast(state.device.type, torch.bfloat16, enabled=self.bfloat16):
            logits = self.forward(batches.to_input(images, self.scale, self.shift))
            loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        state.optimizer.step()
        state.step += 1
        state.epoch_images += len(labels)
        state.epoch_loss += loss.detach().double() * len(labels)
        state.epoch_correct += (logits.detach().argmax(1) == labels).sum()
        self.images_since_report += len(labels)
        if within == self.plan.steps_per_epoch - 1:
            loss_mean, accuracy = self.epoch_means()
            state.curve.append({"epoch": epoch + 1, "step": state.step, "loss": loss_mean, "accuracy": accuracy})

    def epoch_means(self) -> tuple[float, float]:
        """Mean loss and accuracy of the epoch so far; on a GPU this waits for the step to be done.

        Raises:
            TrainingDivergedError: the loss is not finite.
        """
        state = self.state
        loss = float(state.epoch_loss) / state.epoch_images
        if not math.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss of run {self.run.run_id} is {loss} at step {state.step}: lower the learning rate "
                f"(it is {self.config.lr}) or raise the batch size. The last checkpoint before is kept"
            )
        return loss, int(state.epoch_correct) / state.epoch_images

    def checkpoint_is_due(self) -> bool:
        steps, seconds = self.config.checkpoint_every_steps, self.config.checkpoint_every_seconds
        return (steps is not None and self.state.step % steps == 0) or (
            seconds is not None and time.monotonic() - self.last_saved >= seconds
        )

    def report(self) -> None:
        epoch, within = self.plan.position(self.state.step - 1)
        epoch_ended = within == self.plan.steps_per_epoch - 1
        now = time.monotonic()
        if now - self.last_report < _REPORT_SECONDS and not epoch_ended:
            return
        loss, accuracy = self.epoch_means()
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


@contextmanager
def _numerics(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for the time of a training, then whatever was set before."""
    before = torch.are_deterministic_algorithms_enabled()
    if config.deterministic and device.type == "cuda":
        # cuBLAS reads it once, when it is first used; without it deterministic mode refuses to multiply.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def describe_environment(device: torch.device) -> dict[str, str]:
    """What decides bits besides config and data, and which code it was."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "world_size": "1",
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


def _finished(workspace: Workspace, run_id: str, config: TrainConfig, dataset: DatasetRef) -> CheckpointRef | None:
    try:
        record, _ = records.read_record(workspace.store, run_id)
    except RunNotFoundError:
        return None
    if record.status != "finished":
        return None
    runs.check_matches(record, config, dataset)
    return record.ref(record.checkpoints[-1])
