"""Training speed of nightshift's loop, compared with the same training written in other ways.

The same network, optimizer, learning rates, batch size and precision (those of a recipe), on the real CIFAR-10:

    nightshift    `train_alone`, with its record, lease, metrics, and checkpoints in the embedded S3 server
    plain         a PyTorch loop as a careful engineer writes it, which saves and reports nothing
    lightning     PyTorch Lightning's Trainer, without its logger, progress bar and checkpoints
    accelerate    Hugging Face Accelerate around the plain loop

The target is 98 % of the plain loop, and no less than Lightning.

Augmentation and the moving average of weights are off for all, and the last, smaller batch is left out. Nightshift
makes its batches from the packed uint8 images, as always. The others share one way, which favours them: the whole set
is normalized in memory beforehand, then one permutation per epoch and one look-up per step; no loader, no work on
single images. Every network is in channels_last.

Each contender trains in a process of its own, so that none inherits another's memory, threads or settings. Machines are
never still, and two processes of the same program differ in speed. So all contenders of a heat run side by side and
train in turns of a few seconds, while the others wait at a step boundary; each heat starts new processes. Speeds are
over all turns of a heat but the first, and each round of turns begins with another contender.

Nightshift saves at least once in a heat: every 30 s of its own time, the recipes' default, or as often as its turns
together take if that is less. The server runs all the time, on the same cores. So all pay its idle cost alike, and
nightshift pays for a save, except for the part that the end of its turn cuts off.

By default n = 5 heats of 12 turns of 3 s: about 16 minutes on 2 cores, with all four contenders.

    python benchmarks/throughput.py [--recipe quick|tutorial|speedrun] [--quick] [--json FILE]
"""

import logging
import math
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer
from common import Summary, copy_data_cache, installed, machine, show, tell, temporary_home, write_json
from torch import Tensor, nn, optim
from torch.nn import functional as F

from models import build_model
from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.data.known import fetch, pack
from nightshift.errors import TrainingInterrupted
from nightshift.hardware import Hardware, find_device
from nightshift.local.s3 import embedded_s3
from nightshift.refs import DatasetRef
from nightshift.tracking.metrics import read_lines
from nightshift.training.optimizers import apply_schedule, build_optimizer
from nightshift.training.run import train_alone
from nightshift.training.state import show_first_images
from nightshift.workspace import Workspace

_PEERS = {"nightshift": (), "plain": (), "lightning": ("pytorch_lightning",), "accelerate": ("accelerate",)}
_LEASE_SECONDS = 60
_SAVE_RETRY_SECONDS = 60

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sample:
    """One contender in one heat."""

    images_per_second: float
    saves: int
    """How many checkpoints it wrote in the heat."""


class Turns:
    """Called at each step boundary: says whether to stop, and makes training wait there until it has a turn again."""

    def __init__(self, connection: Connection, device: torch.device) -> None:
        self._connection, self._device = connection, device
        self._steps, self._begun, self._end = 0, 0.0, 0.0  # the first turn is one step

    def __call__(self) -> bool:
        self._steps += 1
        if time.perf_counter() < self._end:
            return False
        self._connection.send((self._steps, self._now() - self._begun))
        seconds: float = self._connection.recv()
        self._steps, self._begun = 0, self._now()
        self._end = self._begun + seconds
        return not seconds

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class Task:
    """What the contenders other than nightshift train."""

    config: TrainConfig
    model: nn.Module
    optimizer: optim.Optimizer
    device: torch.device
    total_steps: int

    @classmethod
    def of(cls, config: TrainConfig, dataset: Dataset) -> Self:
        torch.manual_seed(config.seed)
        device = find_device(config.hardware.device)
        model = build_model(config.model.name, len(dataset.classes))
        show_first_images(model, config, dataset)
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        total_steps = batches.make_plan(config, dataset).total_steps
        return cls(config, model, build_optimizer(model, config.optimizer), device, total_steps)

    @property
    def bfloat16(self) -> bool:
        return Hardware.resolve(self.config.hardware, total_steps=0).precision == "bfloat16"

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.loss.label_smoothing)

    def apply_schedule(self, step: int) -> None:
        apply_schedule(self.optimizer, self.config, step, self.total_steps)


def endless_batches(config: TrainConfig, dataset: Dataset, device: torch.device) -> Iterator[Batch]:
    """Normalized images (batch, 3, 32, 32) in channels_last and their labels, all from memory."""
    normalizer = batches.normalizer(dataset, config)
    images = batches.to_input(dataset.train_images[:], *normalizer).permute(0, 2, 3, 1).contiguous().to(device)
    labels = dataset.train_labels.long().to(device)
    size = config.data.batch_size
    while True:
        order = torch.randperm(len(images), device=device)
        for indices in order[: len(order) // size * size].view(-1, size):
            yield images[indices].permute(0, 3, 1, 2), labels[indices]


def plain(task: Task, data: Iterable[Batch], enough: Callable[[], bool]) -> None:
    total_loss = torch.zeros((), device=task.device)
    task.model.train()
    for step, (images, labels) in enumerate(data):
        task.apply_schedule(step)
        with torch.autocast(task.device.type, torch.bfloat16, enabled=task.bfloat16):
            loss = task.loss(task.model(images), labels)
        task.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        task.optimizer.step()
        total_loss += loss.detach()
        if enough():
            break


def lightning(task: Task, data: Iterable[Batch], enough: Callable[[], bool]) -> None:
    import pytorch_lightning as pl  # type: ignore[import-not-found]

    logging.getLogger(pl.__name__).setLevel(logging.ERROR)

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model
            self.automatic_optimization = False  # automatic needs an optimizer that calls a closure; Muon does not

        def configure_optimizers(self) -> optim.Optimizer:
            return task.optimizer

        def training_step(self, batch: Batch, step: int) -> None:
            images, labels = batch
            task.apply_schedule(step)
            loss, optimizer = task.loss(self.model(images), labels), self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    class Stop(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: object) -> None:
            trainer.should_stop = enough()

    trainer = pl.Trainer(
        accelerator="gpu" if task.device.type == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if task.bfloat16 else "32-true",
        max_epochs=1,  # the data has no end
        callbacks=[Stop()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), data)


def accelerate(task: Task, data: Iterable[Batch], enough: Callable[[], bool]) -> None:
    from accelerate import Accelerator  # type: ignore[import-not-found]

    accelerator = Accelerator(cpu=task.device.type == "cpu", mixed_precision="bf16" if task.bfloat16 else "no")
    model, optimizer = accelerator.prepare(task.model, task.optimizer)
    total_loss = torch.zeros((), device=task.device)
    model.train()
    for step, (images, labels) in enumerate(data):
        task.apply_schedule(step)
        loss = task.loss(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        total_loss += loss.detach()
        if enough():
            break


_LOOPS = {"plain": plain, "lightning": lightning, "accelerate": accelerate}


def prepared(workspace: Workspace, config: TrainConfig) -> DatasetRef:
    """Put the data set into the store and the cache."""
    return pack(workspace, fetch(workspace, config.data.dataset))


def compete(name: str, home: Path, config: TrainConfig, connection: Connection) -> None:
    """Train as one contender, in the process that calls it, for as many turns as are given."""
    warnings.simplefilter("ignore")
    with embedded_s3(home) as store:
        workspace = Workspace(store, home, _LEASE_SECONDS, _SAVE_RETRY_SECONDS)
        ref = prepared(workspace, config)
        device, run_id, saves = find_device(config.hardware.device), f"throughput-{secrets.token_hex(4)}", 0
        turns = Turns(connection, device)
        if name == "nightshift":
            with suppress(TrainingInterrupted):
                train_alone(workspace, run_id, config, ref, should_stop=lambda step: turns())
            # The last checkpoint is that of the interruption, after all turns.
            saves = sum(line.kind == "checkpoint" for line in read_lines(store, run_id)) - 1
        else:
            dataset = open_dataset(workspace, ref)
            _LOOPS[name](Task.of(config, dataset), endless_batches(config, dataset, device), turns)
        connection.send(saves)


@contextmanager
def started(name: str, home: Path, config: TrainConfig) -> Iterator[Connection]:
    """A contender in a process of its own. If it fails, the next read from the connection raises EOFError."""
    spawn = get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=compete, args=(name, home, config, theirs))
    process.start()
    theirs.close()
    with ours:
        yield ours
    process.join()


def heat(names: Sequence[str], home: Path, config: TrainConfig, rounds: int, seconds: float) -> dict[str, Sample]:
    """All contenders from their start to their end."""
    with ExitStack() as stack:
        contenders = {name: stack.enter_context(started(name, home, config)) for name in names}
        for connection in contenders.values():
            connection.recv()
        steps, spent = dict.fromkeys(names, 0), dict.fromkeys(names, 0.0)
        for number in range(rounds + 1):
            first = number % len(names)
            for name in chain(names[first:], names[:first]):
                contenders[name].send(seconds)
                done, took = contenders[name].recv()
                if number:  # the first turn is a warm-up
                    steps[name] += done
                    spent[name] += took
        samples = {}
        for name, connection in contenders.items():
            connection.send(0)
            samples[name] = Sample(steps[name] * config.data.batch_size / spent[name], saves=connection.recv())
    return samples


def main(
    recipe: Annotated[str, typer.Option(help="Whose network, optimizer and batch size.")] = "quick",
    heats: Annotated[int, typer.Option(help="How often all contenders are started.")] = 5,
    rounds: Annotated[int, typer.Option(help="Turns of each in a heat.")] = 12,
    seconds: Annotated[float, typer.Option(help="How long a turn is.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works: under two minutes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """Training speed of nightshift's loop, compared with the same training written in other ways."""
    if quick:
        heats, rounds, seconds = 1, 3, 2
    # More epochs than any measurement can finish.
    config = make_config(recipe, {"flip": "off", "translate": 0, "ema_decay": 0, "drop_last": True, "epochs": 10_000})
    names = installed(_PEERS)
    often = min(config.saving.checkpoint_every_seconds or math.inf, rounds * seconds)
    # The interval is wall-clock time, which includes waiting for the others.
    config = config.override({"checkpoint_every_seconds": often * len(names)})
    described = Hardware.resolve(config.hardware, total_steps=0).describe()
    environment = {name: described[name] for name in ("device", "precision")}
    facts = machine() | environment
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    with temporary_home() as home, embedded_s3(home) as store:
        copy_data_cache(home)
        prepared(Workspace(store, home, _LEASE_SECONDS, _SAVE_RETRY_SECONDS), config)
        for number in range(heats):
            tell(f"heat {number + 1} of {heats}")
            for name, sample in heat(names, home, config, rounds, seconds).items():
                samples[name].append(sample)
    parameters = {
        "recipe": recipe,
        "batch": config.data.batch_size,
        "heats": heats,
        "turns": rounds,
        "seconds": seconds,
        "save_every": often,
    }
    report(samples, parameters, facts, json_file)


def report(
    samples: dict[str, list[Sample]], parameters: dict[str, Any], facts: dict[str, Any], json_file: Path | None
) -> None:
    speeds = {name: [sample.images_per_second for sample in group] for name, group in samples.items()}
    summaries = {name: Summary.of(speed) for name, speed in speeds.items()}
    ratios = {
        name: Summary.of([mine / theirs for mine, theirs in zip(speeds["nightshift"], speed, strict=True)])
        for name, speed in speeds.items()
    }
    show(
        f"Training {parameters['recipe']}",
        {**parameters, **facts},
        ["images/s", "n", "median", "min", "max", "nightshift / it", "min", "max", "saves"],
        [
            [
                name,
                str(speed.n),
                *(f"{value:,.0f}" for value in (speed.median, speed.min, speed.max)),
                *(f"{value:.1%}" for value in (ratios[name].median, ratios[name].min, ratios[name].max)),
                str(sum(sample.saves for sample in samples[name])),
            ]
            for name, speed in summaries.items()
        ],
    )
    write_json(
        json_file,
        {
            "benchmark": "throughput",
            "machine": facts,
            "parameters": parameters,
            "images_per_second": summaries,
            "nightshift_over": ratios,
            "samples": samples,
        },
    )


if __name__ == "__main__":
    typer.run(main)
