"""Training speed of nightshift's loop, next to the same training written in other ways.

The same network, optimizer, learning rates, batch size and precision (those of a recipe), on the real CIFAR-10:

    nightshift    `training.train`, with its record, lease, metrics, and checkpoints in the embedded S3 server
    plain         a PyTorch loop as a careful engineer writes it, which saves and reports nothing
    lightning     PyTorch Lightning's Trainer, without its logger, progress bar and checkpoints
    accelerate    Hugging Face Accelerate around the plain loop

To reach: 98 % of the plain loop, and no less than Lightning.

Augmentation and the moving average of weights are off for all, and the last, smaller batch is left out. Nightshift
makes its batches from the packed uint8 images, as always. The others share one way, which favours them: the whole set
normalized in memory before, a permutation an epoch and one look-up a step; no loader, no work on single images. Every
network is in channels_last.

A measurement is a process of its own, so that none inherits another's memory, threads or settings: imports, the data,
the first step and those of 2 s more, and only then the timed part, which ends at the first step edge after
so many seconds. Nightshift saves in it once at least: every 30 s, the recipes' default, or as often as the timed part
is long if that is less. Rounds are interleaved, and each begins with another contender. The server runs all the time,
on the same cores; so what it costs when idle is taken from all alike, and what a save costs from nightshift alone.

By default n = 5 measurements of 30 s each: about 15 minutes on 2 cores, with all four contenders.

    python benchmarks/throughput.py [--recipe quick|tutorial|speedrun] [--quick] [--json FILE]
"""

import logging
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import typer
from common import Summary, copy_data_cache, installed, machine, show, tell, temporary_home, write_json
from torch import Tensor, nn, optim
from torch.nn import functional as F

from models import build_model
from nightshift import batches, datasets, metrics
from nightshift.datasets import Dataset
from nightshift.errors import TrainingInterrupted
from nightshift.local_s3 import embedded_s3
from nightshift.optim import build_optimizer, set_learning_rates
from nightshift.recipes import make_config
from nightshift.refs import DatasetRef
from nightshift.settings import TrainConfig
from nightshift.training import describe_environment, pick_device, pick_precision, show_first_images, train
from nightshift.workspace import Workspace

_PEERS = {"nightshift": (), "plain": (), "lightning": ("pytorch_lightning",), "accelerate": ("accelerate",)}
_WARM_UP_SECONDS = 2
_LEASE_SECONDS = 60
_SAVE_RETRY_SECONDS = 60

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sample:
    """One measurement."""

    images_per_second: float
    saves: int
    """How many checkpoints were written up to its end."""


class Meter:
    """Asked at each step edge whether it is enough, it takes the speed of the steps after the warm-up."""

    def __init__(self, batch_size: int, seconds: float, device: torch.device) -> None:
        self._batch_size, self._seconds, self._device = batch_size, seconds, device
        self._steps, self._begun, self._counted_from = 0, 0.0, 0
        self.images_per_second = 0.0

    def __call__(self) -> bool:
        self._steps += 1
        if self._steps == 1:  # from here on: what comes before the first step is not the loop's
            self._begun = time.perf_counter()
        passed = time.perf_counter() - self._begun
        if not self._counted_from:
            if passed >= _WARM_UP_SECONDS:
                self._begun, self._counted_from = self._now(), self._steps
            return False
        if passed < self._seconds:
            return False
        images = (self._steps - self._counted_from) * self._batch_size
        self.images_per_second = images / (self._now() - self._begun)
        return True

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


@dataclass(frozen=True)
class Task:
    """What is trained, for those that are not nightshift."""

    config: TrainConfig
    model: nn.Module
    optimizer: optim.Optimizer
    device: torch.device
    total_steps: int

    @classmethod
    def of(cls, config: TrainConfig, dataset: Dataset) -> Self:
        torch.manual_seed(config.seed)
        device = pick_device(config)
        model = build_model(config.model, len(dataset.classes))
        show_first_images(model, config, dataset)
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        total_steps = batches.make_plan(config, dataset).total_steps
        return cls(config, model, build_optimizer(model, config), device, total_steps)

    @property
    def bfloat16(self) -> bool:
        return pick_precision(self.config, self.device) == "bfloat16"

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    def set_learning_rates(self, step: int) -> None:
        set_learning_rates(self.optimizer, self.config, step, self.total_steps)


def endless_batches(config: TrainConfig, dataset: Dataset, device: torch.device) -> Iterator[Batch]:
    """Normalized images (batch, 3, 32, 32) in channels_last and their labels, all from memory."""
    normalizer = batches.normalizer(dataset, config.normalization)
    images = batches.to_input(dataset.train_images, *normalizer).permute(0, 2, 3, 1).contiguous().to(device)
    labels = dataset.train_labels.long().to(device)
    while True:
        order = torch.randperm(len(images), device=device)
        for indices in order[: len(order) // config.batch_size * config.batch_size].view(-1, config.batch_size):
            yield images[indices].permute(0, 3, 1, 2), labels[indices]


def plain(task: Task, data: Iterable[Batch], enough: Callable[[], bool]) -> None:
    total_loss = torch.zeros((), device=task.device)
    task.model.train()
    for step, (images, labels) in enumerate(data):
        task.set_learning_rates(step)
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
            self.automatic_optimization = False  # which needs an optimizer that calls a closure; Muon does not

        def configure_optimizers(self) -> optim.Optimizer:
            return task.optimizer

        def training_step(self, batch: Batch, step: int) -> None:
            images, labels = batch
            task.set_learning_rates(step)
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
        task.set_learning_rates(step)
        loss = task.loss(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        total_loss += loss.detach()
        if enough():
            break


_LOOPS = {"plain": plain, "lightning": lightning, "accelerate": accelerate}


def prepared(workspace: Workspace, config: TrainConfig) -> DatasetRef:
    """The data set, in the store and in the cache."""
    return datasets.pack(workspace, datasets.fetch(workspace, config.dataset))


def measure(name: str, home: Path, config: TrainConfig, seconds: float) -> Sample:
    """One contender's measurement, in the process that calls it."""
    warnings.simplefilter("ignore")
    with embedded_s3(home) as store:
        workspace = Workspace(store, home, _LEASE_SECONDS, _SAVE_RETRY_SECONDS)
        ref = prepared(workspace, config)
        device, run_id, saves = pick_device(config), f"throughput-{secrets.token_hex(4)}", 0
        meter = Meter(config.batch_size, seconds, device)
        if name == "nightshift":
            with suppress(TrainingInterrupted):
                train(workspace, run_id, config, ref, should_stop=lambda step: meter())
            # The last one is that of the interruption, after the timed part.
            saves = sum(line["kind"] == "checkpoint" for line in metrics.read(store, run_id)) - 1
        else:
            dataset = datasets.open_dataset(workspace, ref)
            _LOOPS[name](Task.of(config, dataset), endless_batches(config, dataset, device), meter)
    return Sample(meter.images_per_second, saves)


def measured_apart(name: str, home: Path, config: TrainConfig, seconds: float) -> Sample:
    """The same in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(measure, name, home, config, seconds).result()


def main(
    recipe: Annotated[str, typer.Option(help="Whose network, optimizer and batch size.")] = "quick",
    rounds: Annotated[int, typer.Option(help="Measurements a contender.")] = 5,
    seconds: Annotated[float, typer.Option(help="How long the timed part of a measurement is.")] = 30,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works: under two minutes.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """Training speed of nightshift's loop, next to the same training written in other ways."""
    if quick:
        rounds, seconds = 1, 5
    # So many epochs that none of the measurements comes to their end.
    config = make_config(recipe, {"flip": "off", "translate": 0, "ema_decay": 0, "drop_last": True, "epochs": 10_000})
    often = min(config.checkpoint_every_seconds or seconds, seconds)
    config = config.override({"checkpoint_every_seconds": often})
    device = pick_device(config)
    environment = {"device": describe_environment(device)["device"], "precision": pick_precision(config, device)}
    facts = machine() | environment
    names = installed(_PEERS)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    with temporary_home() as home, embedded_s3(home) as store:
        copy_data_cache(home)
        prepared(Workspace(store, home, _LEASE_SECONDS, _SAVE_RETRY_SECONDS), config)
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            first = number % len(names)
            for name in chain(names[first:], names[:first]):
                samples[name].append(measured_apart(name, home, config, seconds))
    parameters = {
        "recipe": recipe,
        "batch": config.batch_size,
        "rounds": rounds,
        "seconds": seconds,
        "save_every": often,
    }
    report(samples, parameters, facts, json_file)


def report(
    samples: dict[str, list[Sample]], parameters: dict[str, Any], facts: dict[str, Any], json_file: Path | None
) -> None:
    speeds = {name: [sample.images_per_second for sample in group] for name, group in samples.items()}
    summaries = {name: Summary.of(speed) for name, speed in speeds.items()}
    ours = summaries["nightshift"].median
    # Within a round the machine was more alike than over all of them.
    of_rounds = {
        name: Summary.of([mine / theirs for mine, theirs in zip(speeds["nightshift"], speed, strict=True)])
        for name, speed in speeds.items()
    }
    show(
        f"Training {parameters['recipe']}",
        {**parameters, **facts},
        ["images/s", "n", "median", "min", "max", "nightshift / it", "in a round: min", "max", "saves"],
        [
            [
                name,
                str(speed.n),
                *(f"{value:,.0f}" for value in (speed.median, speed.min, speed.max)),
                f"{ours / speed.median:.1%}",
                f"{of_rounds[name].min:.1%}",
                f"{of_rounds[name].max:.1%}",
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
            "nightshift_over": {name: ours / speed.median for name, speed in summaries.items()},
            "nightshift_over_in_a_round": of_rounds,
            "samples": samples,
        },
    )


if __name__ == "__main__":
    typer.run(main)
