"""What saving costs the training loop, compared with one memory copy and with what else PyTorch users have.

The model is torchvision's ResNet-50, trained with AdamW on random 32x32 images: 282 MB of state. Every method
saves that same state, at the same step boundaries, into the same embedded S3 server:

    nightshift    `Saver`: copies into reused buffers; serializes, uploads and commits in the background
    lightning     PyTorch Lightning's `AsyncCheckpointIO` around its `TorchCheckpointIO`, through s3fs
    dcp           `torch.distributed.checkpoint.async_save`, one gloo process, `FsspecWriter` through s3fs,
                  with one `DefaultStager` for all saves, which keeps its buffers

Two things are measured, everything interleaved:

*Stall*: how long the training thread stands still at a step boundary that saves, with no earlier save in
flight. It is given as a multiple of the memory copy: the state's tensors copied into buffers touched before,
also at step boundaries, median of as many copies as saves. After a save, training goes on until it is stored.

*images/s*: blocks of K steps. A block of a method begins with one save, and its time includes that stall and
all that runs during the steps, in this process and in the server. A save still in flight at the end of its
block is waited for outside the time, and how often that happened is reported. The others are compared with
the first block of each round, which has no save: ratio of the medians. The order is always the same.

Each round has a fresh server, and a first save of each method that is not counted. A save that fails ends
the benchmark. By default n = 100 saves and 5 blocks per method, which take an estimated 45 minutes on 2 cores
and up to 19 GB in the temporary directory, where the server does not always free space in time.
The server runs on the same cores as the training and takes its share of them: images/s count that too.
`--threads 1` trains on one core and leaves the other to saving and to the server, as a GPU's host would.
`--model vit_b_16` has 1.0 GB of state. `--no-peers` measures nightshift alone.

    python benchmarks/checkpoint_stall.py [--model NAME] [--threads N] [--no-peers] [--quick] [--json FILE]
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol

import fsspec  # type: ignore[import-untyped]
import torch
import torchvision
import typer
from common import Summary, installed, machine, show, tell, temporary_home, write_json
from torch import Tensor, distributed
from torch.distributed.checkpoint.fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.nn import functional as F

from nightshift.config.recipes import make_config
from nightshift.data.batches import to_input
from nightshift.hardware import Hardware
from nightshift.local.s3 import embedded_s3
from nightshift.records.lease import Run, RunSpec, hold
from nightshift.refs import DatasetRef
from nightshift.training.saver import Saver
from nightshift.training.state import TrainState

_CPU = torch.device("cpu")
_IMAGES = 10_000
_PEERS = {"nightshift": (), "lightning": ("pytorch_lightning", "s3fs"), "dcp": ("s3fs",)}


class Method(Protocol):
    """A way to save the state while training goes on."""

    def save(self, state: TrainState) -> None:
        """Begin to save; returns when the state may change."""

    def in_flight(self) -> bool: ...

    def wait(self) -> None:
        """Wait until the save is stored; raises if it could not be."""


class Nightshift:
    """This project's saver."""

    def __init__(self, run: Run, state: TrainState) -> None:
        self._run, self._step = run, 0
        self._saver = Saver(run, run.record.train_config().saving, _CPU, retry_seconds=60)
        self._saver.prepare(state)

    def save(self, state: TrainState) -> None:
        self._step = state.step
        self._saver.save(state, [state.part()], epoch=0, train_seconds=0)

    def in_flight(self) -> bool:
        return any(thread.name == "checkpoint" for thread in threading.enumerate())

    def wait(self) -> None:
        while self.in_flight():
            time.sleep(0.01)
        if self._run.record.step != self._step:
            raise RuntimeError(f"nightshift has not stored step {self._step}")


class Lightning:
    """PyTorch Lightning's plugin, called as its Trainer would at these steps."""

    def __init__(self, url: str) -> None:
        from pytorch_lightning.plugins.io import (  # type: ignore[import-not-found]
            AsyncCheckpointIO,
            TorchCheckpointIO,
        )

        stored = self._stored = threading.Event()

        class Observed(TorchCheckpointIO):  # type: ignore[misc]
            def save_checkpoint(self, *arguments: Any, **options: Any) -> None:
                try:
                    super().save_checkpoint(*arguments, **options)
                finally:
                    stored.set()

        self._url, self._checkpoint_io = url, AsyncCheckpointIO(Observed())

    def save(self, state: TrainState) -> None:
        self._stored.clear()
        self._checkpoint_io.save_checkpoint(state.capture(), f"{self._url}/{state.step}.ckpt")

    def in_flight(self) -> bool:
        return not self._stored.is_set()

    def wait(self) -> None:
        self._checkpoint_io.teardown()


class DistributedCheckpoint:
    """PyTorch's own asynchronous save."""

    def __init__(self, url: str) -> None:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo", "tcp://127.0.0.1:0", rank=0, world_size=1)
        self._url = url
        self._stager = DefaultStager(StagingOptions(False, False, False, False))
        self._stored: Future[Any] = Future()

    def save(self, state: TrainState) -> None:
        writer = FsspecWriter(f"{self._url}/{state.step}", sync_files=False)  # S3 has no fsync, and it would warn
        saving = async_save(state.capture(), storage_writer=writer, async_stager=self._stager)
        assert isinstance(saving, Future)
        self._stored = saving

    def in_flight(self) -> bool:
        return not self._stored.done()

    def wait(self) -> None:
        self._stored.result()


class Training:
    """A model in training, with enough random data to resemble real work."""

    def __init__(self, model: str, batch: int) -> None:
        torch.manual_seed(0)
        # Torchvision's transformers are made for one size of images.
        size = {"image_size": 32} if model.startswith("vit") else {}
        module = torchvision.models.get_model(model, num_classes=10, **size).to(memory_format=torch.channels_last)
        self.state = TrainState(module, torch.optim.AdamW(module.parameters(), lr=1e-3), _CPU)
        self._batch = batch
        self._images = torch.randint(256, (_IMAGES, 32, 32, 3), dtype=torch.uint8)
        self._labels = torch.randint(10, (_IMAGES,))
        self._scale, self._shift = torch.full((3, 1, 1), 1 / 127.5), torch.full((3, 1, 1), -1.0)
        self.step()  # after which the optimizer has a state too

    def step(self) -> None:
        state, indices = self.state, torch.randint(_IMAGES, (self._batch,))
        logits = state.model(to_input(self._images[indices], self._scale, self._shift))
        loss = F.cross_entropy(logits, self._labels[indices])
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        state.advance()
        state.epoch_images += self._batch
        state.epoch_loss += loss.detach().double() * self._batch

    def block(self, steps: int, method: Method | None) -> float:
        """Images per second over so many steps, which begin with a save if there is a method."""
        started = time.perf_counter()
        if method:
            method.save(self.state)
        for _ in range(steps):
            self.step()
        return steps * self._batch / (time.perf_counter() - started)


class Samples:
    """All that was measured, in seconds and images per second, by method."""

    def __init__(self, names: Sequence[str]) -> None:
        self.state_bytes = 0
        self.copy: list[float] = []
        self.stall: dict[str, list[float]] = {name: [] for name in names}
        self.images_per_second: dict[str, list[float]] = {name: [] for name in ("none", *names)}
        self.unfinished = dict.fromkeys(names, 0)
        """How many blocks ended with their save still in flight."""

    def measure_stalls(self, training: Training, methods: Mapping[str, Method], saves: int) -> None:
        originals = list(tensors(training.state.capture()))
        buffers = [tensor.clone() for tensor in originals]
        self.state_bytes = sum(tensor.nbytes for tensor in originals)
        for counts in [False] + [True] * saves:
            training.step()
            started = time.perf_counter()
            for buffer, original in zip(buffers, originals, strict=True):
                buffer.copy_(original)
            seconds = time.perf_counter() - started
            if counts:
                self.copy.append(seconds)
            for name, method in methods.items():
                training.step()
                started = time.perf_counter()
                method.save(training.state)
                seconds = time.perf_counter() - started
                if counts:
                    self.stall[name].append(seconds)
                while method.in_flight():
                    training.step()
                method.wait()

    def measure_blocks(self, training: Training, methods: Mapping[str, Method], every: int) -> None:
        self.images_per_second["none"].append(training.block(every, None))
        for name, method in methods.items():
            self.images_per_second[name].append(training.block(every, method))
            self.unfinished[name] += method.in_flight()
            method.wait()


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        yield value.detach()
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


@contextmanager
def opened_run(home: Path) -> Iterator[Run]:
    """A run that keeps one checkpoint, held, in a new server."""
    spec = RunSpec(
        run_id="checkpoints",
        config=make_config("tutorial", {"keep_last": 1, "keep_best": False}),
        dataset=DatasetRef(name="random", digest="0" * 64, key="none", source="made here"),
        environment=Hardware(_CPU, "float32", compiled=False, deterministic=True).describe(),
        total_steps=10**6,
    )
    with embedded_s3(home) as store, hold(store, spec, lease_seconds=60) as run:
        yield run


@contextmanager
def opened(home: Path, names: Sequence[str], state: TrainState) -> Iterator[dict[str, Method]]:
    """The methods of these names, each with its own prefix in one new server."""
    with opened_run(home) as run:
        store, credentials = run.store, json.loads((home / "s3" / "credentials.json").read_text())
        fsspec.config.conf["s3"] = {
            "key": credentials["access_key"],
            "secret": credentials["secret_key"],
            "endpoint_url": store.endpoint,
        }
        makers: dict[str, Callable[[], Method]] = {
            "nightshift": lambda: Nightshift(run, state),
            "lightning": lambda: Lightning(store.url("lightning")),
            "dcp": lambda: DistributedCheckpoint(store.url("dcp")),
        }
        yield {name: makers[name]() for name in names}


def main(
    model: Annotated[str, typer.Option(help="A classifier of torchvision.")] = "resnet50",
    every: Annotated[int, typer.Option(help="Steps per block. A block begins with a save.")] = 50,
    rounds: Annotated[int, typer.Option(help="Rounds, each with one block per method.")] = 5,
    saves: Annotated[int, typer.Option(help="Saves per method and round whose stall is measured.")] = 20,
    batch: Annotated[int, typer.Option(help="Images per step.")] = 192,
    threads: Annotated[int, typer.Option(help="Threads that train; 0: as many as torch takes.")] = 0,
    peers: Annotated[bool, typer.Option(help="Measure the others too.")] = True,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works: a minute, small model.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """What saving costs the training loop."""
    if quick:
        model, every, rounds, saves, batch = "resnet18", 10, 1, 3, 64
    if threads:
        torch.set_num_threads(threads)
    facts, names = machine(), installed(_PEERS) if peers else ["nightshift"]
    samples, training = Samples(names), Training(model, batch)
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        with temporary_home() as home, opened(home, names, training.state) as methods:
            samples.measure_stalls(training, methods, saves)
            samples.measure_blocks(training, methods, every)
    parameters = {"model": model, "every": every, "rounds": rounds, "saves": saves, "batch": batch}
    report(samples, parameters, facts, json_file)


def report(samples: Samples, parameters: dict[str, Any], facts: dict[str, Any], json_file: Path | None) -> None:
    copy = Summary.of(samples.copy)
    stalls = {name: Summary.of(seconds) for name, seconds in samples.stall.items()}
    rates = {name: Summary.of(rate) for name, rate in samples.images_per_second.items()}
    show(
        f"Stall of a save of {samples.state_bytes / 1e6:.0f} MB",
        {**parameters, **facts},
        ["ms", "n", "p50", "p99", "min", "max", "p50 / copy", "p99 / copy"],
        [
            [
                name,
                str(seconds.n),
                *(f"{value * 1000:.1f}" for value in (seconds.median, seconds.p99, seconds.min, seconds.max)),
                f"{seconds.median / copy.median:.2f}",
                f"{seconds.p99 / copy.median:.2f}",
            ]
            for name, seconds in {"memory copy": copy, **stalls}.items()
        ],
    )
    show(
        f"Training with a save every {parameters['every']} steps",
        {},
        ["images/s", "n", "median", "min", "max", "/ none", "in flight at end"],
        [
            [
                name,
                str(rate.n),
                *(f"{value:.1f}" for value in (rate.median, rate.min, rate.max)),
                f"{rate.median / rates['none'].median:.1%}",
                str(samples.unfinished.get(name, "")),
            ]
            for name, rate in rates.items()
        ],
    )
    write_json(
        json_file,
        {
            "benchmark": "checkpoint_stall",
            "machine": facts,
            "parameters": parameters,
            "state_bytes": samples.state_bytes,
            "memory_copy_seconds": copy,
            "stall_seconds": stalls,
            "stall_p50_over_copy": {name: seconds.median / copy.median for name, seconds in stalls.items()},
            "stall_p99_over_copy": {name: seconds.p99 / copy.median for name, seconds in stalls.items()},
            "images_per_second": rates,
            "images_per_second_over_none": {name: rates[name].median / rates["none"].median for name in stalls},
            "blocks_with_save_in_flight_at_end": samples.unfinished,
            "samples": {"memory_copy": samples.copy, "stall": samples.stall, "blocks": samples.images_per_second},
        },
    )


if __name__ == "__main__":
    typer.run(main)
