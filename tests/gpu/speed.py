"""How fast a GPU trains, what a save costs it, and what one step consists of."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn, optim
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from models.simple_cnn import SimpleCNN
from nightshift.checkpoints.payload import read_weights
from nightshift.config.train import TrainConfig
from nightshift.data.batches import make_plan, resident
from nightshift.data.datasets import Dataset
from nightshift.hardware import Hardware
from nightshift.judging.evaluation import answer_test_images, load_model
from nightshift.storage.memory import MemoryStore
from nightshift.training.loop import Loop
from nightshift.training.ranks import ALONE
from nightshift.training.recorder import Recorder
from tests.gpu.stage import Figure, Stage, at, config_of, images_of, train

_SEEDS = 3
_PROFILED, _WARM = 10, 10
_TUTORIAL_BATCH, _TUTORIAL_EPOCHS = 32, 10
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def speedrun(stage: Stage) -> Iterator[Figure]:
    """Seconds of training and accuracy of `speedrun`: three seeds, then as many as time allows; compiled and not."""
    stage.gpu()
    dataset, images = images_of(stage), "CIFAR-10" if stage.data else "made-up images"
    less = {"model.name": "quick_cnn", "batch_size": 100, "epochs": 1} if stage.is_small else {}
    for compiled in ("off",) if stage.is_small else ("off", "on"):
        until, laps = time.monotonic() + stage.seconds / 2, list[tuple[float, float]]()
        while len(laps) <= _SEEDS or time.monotonic() < until:
            config = config_of("speedrun", seed=len(laps), compile=compiled, **less)
            laps.append(_lap(stage, config, dataset))
            if len(laps) == 1:
                yield Figure(f"compile={compiled}, the first, which warms up", f"{laps[0][0]:.2f} s")
        seconds, accuracies = zip(*laps[1:], strict=True)
        yield Figure(f"compile={compiled}, seconds of training", _summary(seconds))
        yield Figure(f"compile={compiled}, accuracy on {images}", _summary(accuracies))


def _lap(stage: Stage, config: TrainConfig, dataset: Dataset) -> tuple[float, float]:
    """Seconds in the training loop, and accuracy on the test images."""
    store = MemoryStore()
    record = train(stage.home, store, "lap", config, dataset)
    model = load_model(config, read_weights(store, record.checkpoints[-1]), len(dataset.classes), stage.device)
    answers = answer_test_images(model, dataset, config)
    return record.train_seconds, float((answers.predicted == answers.labels).double().mean())


def _summary(values: Sequence[float]) -> str:
    return f"{np.median(values):.4g} ({min(values):.4g} to {max(values):.4g}, n = {len(values)})"


def tutorial(stage: Stage) -> Iterator[Figure]:
    """The loop of PyTorch's tutorial, on images that are decoded and normalized beforehand."""
    device, dataset = stage.gpu(), images_of(stage)
    assert isinstance(dataset.train_images, torch.Tensor)
    pixels = dataset.train_images.permute(0, 3, 1, 2).float() / 127.5 - 1
    loader = DataLoader(TensorDataset(pixels, dataset.train_labels.long()), _TUTORIAL_BATCH, shuffle=True)
    model, criterion = SimpleCNN().to(device), nn.CrossEntropyLoss()
    optimizer = optim.Adam(model.parameters(), lr=0.001)
    started, running = time.perf_counter(), 0.0
    for inputs, labels in loader:
        optimizer.zero_grad()
        loss = criterion(model(inputs.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        running += loss.item()
    seconds = time.perf_counter() - started
    yield Figure("the tutorial's loop, images/s", len(pixels) / seconds)
    yield Figure(f"{_TUTORIAL_EPOCHS} epochs of it, s, by one", _TUTORIAL_EPOCHS * seconds)


def saving(stage: Stage) -> Iterator[Figure]:
    """Images/s with a save every 50 steps, as a share of those without, in turns."""
    stage.gpu()
    dataset, rates = images_of(stage), dict[int | None, list[float]]()
    recipe, size, steps, often, rounds = ("quick", 16, 20, 5, 1) if stage.is_small else ("speedrun", 128, 200, 50, 5)
    for number in range(rounds + 1):
        for every in (None, often):
            config = config_of(recipe, epochs=10, batch_size=size, checkpoint_every_steps=every)
            record = train(stage.home, MemoryStore(), "run", config, dataset, at(steps))
            if number:  # the first round warms up
                rates.setdefault(every, []).append(steps * size / record.train_seconds)
    yield Figure("images/s without a save", _summary(rates[None]))
    yield Figure(f"images/s with one every {often} steps", _summary(rates[often]))
    ratios = [mine / theirs for mine, theirs in zip(rates[often], rates[None], strict=True)]
    yield Figure("with / without", _summary(ratios))


def one_step(stage: Stage) -> Iterator[Figure]:
    """What a step of `quick` and `speedrun` consists of: kernels, copies, and waits of the CPU."""
    stage.gpu()
    dataset = images_of(stage)
    for recipe in ("quick",) if stage.is_small else ("quick", "speedrun"):
        config = config_of(recipe, compile="off", **({"batch_size": 64} if stage.is_small else {}))
        yield from _profiled(stage, recipe, config, dataset)


def _profiled(stage: Stage, recipe: str, config: TrainConfig, dataset: Dataset) -> Iterator[Figure]:
    plan = make_plan(config, dataset)
    hardware = Hardware.resolve(config.hardware, plan.total_steps)
    with hardware.numerics():
        loop = Loop(config, resident(dataset, config, stage.device), plan, hardware, ALONE, Recorder())
        steps = iter(range(_WARM + 1 + _PROFILED))

        def take(count: int) -> None:
            for step in (next(steps) for _ in range(count)):
                loop._train_step(*loop._batches.batch(step))

        take(_WARM)
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (stage.device.type == "cuda")]
        with profile(activities=kinds) as seen:
            started = time.perf_counter()
            take(_PROFILED)
            on_cpu = time.perf_counter() - started
            if stage.device.type == "cuda":
                torch.cuda.synchronize()
            both = time.perf_counter() - started
    # Without the one with which the profiled steps end.
    waits = Counter(event.name for event in seen.events() if event.name in _WAITS)
    kernels = [event for event in seen.events() if event.device_type == DeviceType.CUDA]
    copies = Counter(event.name for event in kernels if event.name.startswith(("Memcpy", "Memset")))
    asked = sum(event.name == "aten::_local_scalar_dense" for event in seen.events())
    count = len(kernels) - sum(copies.values())
    yield Figure(f"{recipe}: ms of a step until the CPU is free, and in all", f"{_ms(on_cpu)}, {_ms(both)} (profiled)")
    yield Figure(f"{recipe}: kernels a step", count / _PROFILED)
    yield Figure(f"{recipe}: copies a step", ", ".join(f"{n / _PROFILED:g} {name}" for name, n in copies.items()))
    yield Figure(f"{recipe}: waits in {_PROFILED} steps, and at their end", f"{dict(waits)}")
    yield Figure(f"{recipe}: questions about a value in {_PROFILED} steps", asked, asked == 0)


def _ms(seconds: float) -> str:
    return f"{1000 * seconds / _PROFILED:.2f}"


def classes(stage: Stage) -> Iterator[Figure]:
    """Test images whose predicted class differs between the GPU, on which the network was trained, and the CPU."""
    there, dataset, store = stage.gpu(), images_of(stage), MemoryStore()
    config = config_of("quick", epochs=1, **({"batch_size": 64} if stage.is_small else {}))
    weights = read_weights(store, train(stage.home, store, "run", config, dataset).checkpoints[-1])
    on_gpu, on_cpu = (
        answer_test_images(load_model(config, weights, len(dataset.classes), device), dataset, config)
        for device in (there, torch.device("cpu"))
    )
    differ = int((on_gpu.predicted != on_cpu.predicted).sum())
    yield Figure(
        f"of {len(on_gpu.labels):,} images of another class on the CPU", differ, differ < len(on_gpu.labels) / 1000
    )
    yield Figure("largest difference of a confidence", float((on_gpu.confidence - on_cpu.confidence).abs().max()))
