"""TrainState: all that makes the next step what it is."""

import random
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import build_model
from nightshift import progress
from nightshift.checkpoints.payload import Payload
from nightshift.checkpoints.restore import restore_newest
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import Dataset
from nightshift.records.lease import Run
from nightshift.records.run import Checkpoint
from nightshift.training.optimizers import build_optimizer
from nightshift.training.ranks import Ranks


@dataclass
class TrainState:
    """Owned by the training loop of one process; it never crosses a task boundary.

    The learning-rate schedule, the order of an epoch and the augmentation are functions of the step and
    need no state (`optim`, `batches`).
    """

    model: nn.Module
    optimizer: optim.Optimizer
    device: torch.device
    ema_decay: float = 0.0
    """Share of itself that the moving average of the weights keeps at a step; 0: there is none."""
    average: AveragedModel | None = field(init=False, default=None)
    """That average, of buffers too; after the first step it is the model itself."""
    step: int = 0
    """Steps done; the next one has this number."""
    epoch_images: int = 0
    """Images seen since the epoch began, by all ranks together."""
    epoch_loss: Tensor = field(init=False)
    """Sum of the losses of this rank's share of them, float64 scalar."""
    epoch_correct: Tensor = field(init=False)
    """How many of its share were classified correctly, int64 scalar."""
    curve: list[dict[str, float]] = field(default_factory=list)
    """For each finished epoch: `epoch`, `step`, `loss`, `accuracy`."""

    def __post_init__(self) -> None:
        if self.ema_decay:
            average = get_ema_multi_avg_fn(self.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.epoch_images = 0
        self.epoch_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.epoch_correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def advance(self) -> None:
        """Take the step whose gradients are there: the weights, and then their moving average."""
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.step += 1

    def part(self) -> Payload:
        """What is this rank's own: its share of the epoch's sums, and its generators."""
        return {
            "epoch_loss": self.epoch_loss,
            "epoch_correct": self.epoch_correct,
            "rng": _capture_rng(self.device),
        }

    def capture(self, parts: list[Payload] | None = None) -> Payload:
        """Everything, as tensors and plain values that `torch.load(weights_only=True)` accepts.

        Tensors are the live ones, not copies: they change with the next step.

        Args:
            parts: every rank's, in order; by default this rank is the only one.
        """
        return {
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch_images": self.epoch_images,
            "curve": self.curve,
            "ranks": [self.part()] if parts is None else parts,
        }

    def restore(self, payload: Payload, rank: int = 0, world_size: int = 1) -> None:
        """Take over what `capture` returned. The generators come last: nothing may draw from them after.

        With as many ranks as before each takes its own part, and all goes on with the same bits. With another number,
        rank 0 takes the sums of all, and a rank that was not there before keeps the generators it has.
        """
        self.model.load_state_dict(payload["model"])
        self.optimizer.load_state_dict(payload["optimizer"])
        self.step = payload["step"]
        if self.average:
            self.average.module.load_state_dict(payload["average"])
            self.average.n_averaged.fill_(self.step)
        self.begin_epoch()
        self.epoch_images = payload["epoch_images"]
        self.curve = payload["curve"]
        parts = payload["ranks"]
        for part in [parts[rank]] if len(parts) == world_size else parts if rank == 0 else []:
            self.epoch_loss += part["epoch_loss"].to(self.device)
            self.epoch_correct += part["epoch_correct"].to(self.device)
        if rank < len(parts):
            _restore_rng(parts[rank]["rng"], self.device)


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed numpy's and torch's global generators, those of all CUDA devices included, otherwise for each rank."""
    numbers = np.random.SeedSequence((seed, rank)).generate_state(1) if rank else [seed]
    np.random.seed(numbers[0])
    torch.manual_seed(int(numbers[0]))


def seed_step(seed: int, step: int) -> None:
    """Seed python's global generator for one step.

    Unlike the others it cannot be carried from step to step: whatever retries a request in the background
    draws its pauses from it.
    """
    random.seed(f"{seed}/{step}")


def _capture_rng(device: torch.device) -> Payload:
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state(device)] if device.type == "cuda" else [],
    }


def _restore_rng(rng: Payload, device: torch.device) -> None:
    name, keys, position, has_gauss, cached = rng["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"][0], device)


_INITIAL_IMAGES = 5000
"""So many training images a network may see to set its first weights."""


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
    found = restore_newest(run) if run else None
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
