"""TrainState: everything that makes the next step what it is."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.protocols import InitializedFromImages
from nightshift.checkpoints.payload import Payload, check_weights, described
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import Dataset, few
from nightshift.errors import CheckpointCorruptError
from nightshift.networks import build_network, head_of
from nightshift.records.curve import CurvePoint
from nightshift.training.optimizers import build_optimizer, state_names
from nightshift.training.ranks import Ranks


@dataclass
class TrainState:
    """Owned by the training loop of one process; it never crosses a task boundary.

    The learning-rate schedule, the order of an epoch and the augmentation are functions of the step and
    need no state (`optimizers`, `batches`).
    """

    model: nn.Module
    optimizer: optim.Optimizer
    device: torch.device
    ema_decay: float = 0.0
    """The share of itself that the moving average of the weights keeps at each step; 0: there is no average."""
    average: nn.Module | None = field(init=False, default=None)
    """The moving average, of buffers too. After the first step it equals the model."""
    step: int = 0
    """Steps done, and so the number of the next step."""
    epoch_images: int = 0
    """Images seen since the epoch began, by all ranks together."""
    epoch_loss: Tensor = field(init=False)
    """Sum of the losses of this rank's share of these images, float64 scalar."""
    epoch_correct: Tensor = field(init=False)
    """How many images of this share were classified correctly, int64 scalar."""
    curve: list[CurvePoint] = field(default_factory=list)
    """A point for each finished epoch."""

    def __post_init__(self) -> None:
        if self.ema_decay:
            self.average = copy.deepcopy(self.model)
            self._add_to_average = get_ema_multi_avg_fn(self.ema_decay)  # type: ignore[no-untyped-call]
        self.begin_epoch()

    @property
    def network(self) -> nn.Module:
        """What is judged and published: the average, if there is one."""
        return self.model if self.average is None else self.average

    def begin_epoch(self) -> None:
        self.epoch_images = 0
        self.epoch_loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.epoch_correct = torch.zeros((), dtype=torch.int64, device=self.device)

    def advance(self) -> None:
        """Update the weights from their gradients, and then the moving average."""
        self.optimizer.step()
        if self.average is not None:
            self._update(self.average)
        self.step += 1

    def _update(self, average: nn.Module) -> None:
        """As torch's AveragedModel, but without its counter: each step would wait for the counter's copy to the GPU."""
        pairs = list(zip(_tensors(average), _tensors(self.model), strict=True))
        if not self.step:
            for kept, current in pairs:
                kept.copy_(current)
            return
        for dtype in {kept.dtype for kept, _ in pairs}:
            alike = [pair for pair in pairs if pair[0].dtype == dtype]
            self._add_to_average([kept for kept, _ in alike], [current for _, current in alike], self.step)

    def part(self) -> Payload:
        """What belongs to this rank alone: its share of the epoch's sums, and its random generators."""
        return {
            "epoch_loss": self.epoch_loss,
            "epoch_correct": self.epoch_correct,
            "rng": _capture_rng(self.device),
        }

    def capture(self, parts: list[Payload] | None = None) -> Payload:
        """The whole state, as tensors and plain values that `torch.load(weights_only=True)` accepts.

        The tensors are the live ones, not copies: they change with the next step.

        Args:
            parts: every rank's, in order; by default this rank is the only one.
        """
        return {
            "model": self.model.state_dict(),
            "average": {} if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "epoch_images": self.epoch_images,
            "curve": [point.model_dump() for point in self.curve],
            "ranks": [self.part()] if parts is None else parts,
        }

    def check(self, payload: Payload) -> None:
        """Raise CheckpointCorruptError, with the name of the first thing that differs, unless `restore` can take it.

        Args:
            payload: one that `read_payload` has read.
        """
        check_weights(payload["model"], self.model, "model.")
        if self.average is not None:
            check_weights(payload["average"], self.average, "average.")
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for number, kept in payload["optimizer"]["state"].items():
            where = f"optimizer.state.{number}"
            if not 0 <= number < len(parameters):
                raise CheckpointCorruptError(f"{where} is of no parameter: there are {len(parameters)}")
            for name in sorted(state_names(self.optimizer) if kept else ()):
                value, shapes = kept.get(name), (parameters[number].shape, torch.Size())
                if not isinstance(value, Tensor):
                    raise CheckpointCorruptError(f"{where}.{name} is missing")
                if not value.is_floating_point() or value.shape not in shapes:
                    raise CheckpointCorruptError(f"{where}.{name} is {described(value)}, which does not fit")
        for rank, part in enumerate(payload["ranks"]):
            on_gpu = part["rng"]["cuda"] if self.device.type == "cuda" else []
            try:
                torch.Generator().set_state(part["rng"]["torch"])
                for state in on_gpu:
                    torch.Generator(self.device).set_state(state)
            except (RuntimeError, TypeError) as error:
                raise CheckpointCorruptError(f"ranks.{rank}.rng: {error}") from error

    def restore(self, payload: Payload, rank: int = 0, world_size: int = 1) -> None:
        """Restore what `capture` returned. The generators come last, because nothing may draw from them afterwards.

        With as many ranks as before, each takes its own part, and training goes on with the same bits. With another
        number, rank 0 takes the sums of all, and a rank that was not there before keeps the generators it has.
        """
        self.model.load_state_dict(payload["model"])
        # But for the groups: the config decides them, and each step sets their rates.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({**payload["optimizer"], "param_groups": groups})
        for kept in self.optimizer.state.values():
            # torch takes tensors of the CPU as they are: with them it would hold the whole payload.
            kept.update(
                {name: value.clone() for name, value in kept.items() if isinstance(value, Tensor) and value.is_cpu}
            )
        self.step = payload["step"]
        if self.average is not None:
            self.average.load_state_dict(payload["average"])
        self.begin_epoch()
        self.epoch_images = payload["epoch_images"]
        self.curve = [CurvePoint(**point) for point in payload["curve"]]
        parts = payload["ranks"]
        for part in [parts[rank]] if len(parts) == world_size else parts if rank == 0 else []:
            self.epoch_loss += part["epoch_loss"].to(self.device)
            self.epoch_correct += part["epoch_correct"].to(self.device)
        if rank < len(parts):
            _restore_rng(parts[rank]["rng"], self.device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (tensor.detach() for tensor in itertools.chain(module.parameters(), module.buffers()))


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed numpy's and torch's global generators, including those of all CUDA devices, differently for each rank."""
    numbers = np.random.SeedSequence((seed, rank)).generate_state(1) if rank else [seed]
    np.random.seed(numbers[0])
    torch.manual_seed(int(numbers[0]))


def seed_step(seed: int, step: int) -> None:
    """Seed python's global generator for one step.

    Unlike the others, its state cannot be carried from step to step: code that retries a request in the
    background draws its pauses from it.
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
"""How many images of 32 by 32 pixels a network sees to set its first weights; of larger ones as many pixels."""


def build_state(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    ranks: Ranks,
    read: Callable[[Callable[[Payload], None]], Payload | None],
    begin: Callable[[nn.Module, Dataset], None] = lambda model, dataset: None,
) -> TrainState:
    """The state of a run: restored from a stored payload, or freshly initialized from the seed, and from its parent.

    Args:
        read: called with `TrainState.check`; returns the stored payload on rank 0, or None if there is none. On other
            ranks it returns None, and they receive rank 0's state.
        begin: called with the freshly made model if there is no payload, and gives it the weights it is to begin with.
    """
    seed_everything(config.seed)
    model = build_network(config.model.name, len(dataset.classes), dataset.image_size)
    model = ranks.synchronized(model, device).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optimizer_of(model, config, len(dataset.classes), dataset.image_size)
    state = TrainState(model, optimizer, device, config.optimizer.ema_decay)
    stored = read(state.check)
    if stored is None:
        show_first_images(model, config, dataset)
        begin(model, dataset)
    payload = ranks.share(stored or state.capture())
    seed_everything(config.seed, ranks.rank)
    state.restore(payload, ranks.rank, ranks.world_size)
    return state


def payload_check(config: TrainConfig, classes: int, image_size: int = 32) -> Callable[[Payload], None]:
    """`TrainState.check` of a run with this config, for whoever only wants to look at its payloads.

    Raises:
        ConfigError: as `build_network`.
    """
    model = build_network(config.model.name, classes, image_size)
    optimizer = optimizer_of(model, config, classes, image_size)
    return TrainState(model, optimizer, torch.device("cpu"), config.optimizer.ema_decay).check


def optimizer_of(model: nn.Module, config: TrainConfig, classes: int, image_size: int) -> optim.Optimizer:
    """The optimizer of a run; raises ConfigError as `build_optimizer`."""
    head = head_of(config.model.name, classes, image_size) if config.fine_tunes else None
    return build_optimizer(model, config.optimizer, head)


def show_first_images(model: nn.Module, config: TrainConfig, dataset: Dataset) -> None:
    """Show a network training images, if it sets its first weights from them (`initialize_from`)."""
    if isinstance(model, InitializedFromImages):
        count = min(_INITIAL_IMAGES, max(1, _INITIAL_IMAGES * 32**2 // dataset.image_size**2))
        images = few(dataset.train_images, count).cpu()  # so that every device begins with the same weights
        model.initialize_from(batches.to_input(images, *batches.normalizer(dataset, config)))
