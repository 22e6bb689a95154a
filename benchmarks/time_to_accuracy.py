"""Seconds of training to a test accuracy on CIFAR-10: the tutorial's own loop, and two recipes under nightshift.

The tutorial's loop is what a user would start with: torchvision's CIFAR10 with ToTensor and Normalize for each image, a
DataLoader with batches of 32, SimpleCNN, Adam at 1e-3, 10 epochs. Nightshift runs the recipes `tutorial`, the same
network and optimizer, and `quick`, with checkpoints to an embedded S3.

Each training is a process of its own; a round has one of each, in turn. The clock starts before the data is loaded into
memory and never stops for a checkpoint. It does not count imports, nor measuring accuracy, which is done afterwards on
copies of the weights: those the loop made every quarter of an epoch, and those nightshift had stored. (The imports
include torch's compiler, 3.5 s, which the first optimizer of any process would import by itself.) A level is reached by
the first copy that reaches it. If none does, the whole time is taken instead, and everything computed from it is marked
≥. The last column is the best accuracy by the time `quick` has ended.

2 cores, n = 5: over an hour; 45 minutes with `--epochs 6`, in which the loop still reaches the highest level, mostly.

    python benchmarks/time_to_accuracy.py [--quick] [--json FILE]
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch._dynamo
import typer
from common import Summary, machine, show, temporary_home, write_json
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader
from torchvision import datasets as vision
from torchvision import transforms

from models.simple_cnn import SimpleCNN
from nightshift.checkpoints.payload import read_weights
from nightshift.config.recipes import make_config
from nightshift.data import batches
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.data.known import fetch, pack
from nightshift.judging import evaluation
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace

LOOP = "tutorial's loop"
CONTENDERS = (LOOP, "tutorial", "quick")
LEVELS = (0.60, 0.65, 0.70, 0.714)
_COPIES_AN_EPOCH = 4


@dataclass(frozen=True)
class Copy:
    """The weights at some time: seconds since the clock started, and their test accuracy."""

    seconds: float
    accuracy: float


class PlainCIFAR10(vision.CIFAR10):  # type: ignore[misc]
    """torchvision's data set, filled with what it would have read from its own files."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], transform: Callable[[Any], Tensor]) -> None:
        self.data, self.targets, self.transform, self.target_transform = images, labels, transform, None


def tutorial_loop(workspace: Workspace, ref: DatasetRef, seed: int, epochs: int | None) -> list[Copy]:
    torch.manual_seed(seed)
    started = time.monotonic()
    dataset = open_dataset(workspace, ref)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])
    images = PlainCIFAR10(dataset.train_images[:].numpy(), dataset.train_labels.tolist(), transform)
    loader: DataLoader[Any] = DataLoader(images, batch_size=32, shuffle=True)
    model = SimpleCNN()
    criterion, optimizer = nn.CrossEntropyLoss(), optim.Adam(model.parameters(), lr=0.001)
    copies, step = [], 0
    for _ in range(epochs or 10):
        for inputs, labels in loader:
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
            step += 1
            if step % (len(loader) // _COPIES_AN_EPOCH) == 0:
                weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
                copies.append((time.monotonic() - started, weights))
    return measured(dataset, "tutorial", copies)


def under_nightshift(workspace: Workspace, ref: DatasetRef, recipe: str, seed: int, epochs: int | None) -> list[Copy]:
    config = make_config(recipe, {"seed": seed, "keep_last": 1000} | ({"epochs": epochs} if epochs else {}))
    steps = batches.make_plan(config, open_dataset(workspace, ref)).steps_per_epoch
    config = config.override({"checkpoint_every_steps": steps // _COPIES_AN_EPOCH, "checkpoint_every_seconds": None})
    run_id = f"{recipe}-{seed}"
    started = time.monotonic()
    train_alone(workspace, run_id, config, ref)
    seconds = time.monotonic() - started
    stored = read_record(workspace.store, run_id)[0].checkpoints
    # The run counts the seconds of its loop. The time before and after the loop is added to every copy.
    around = seconds - stored[-1].metrics.train_seconds
    copies = [
        (around + checkpoint.metrics.train_seconds, read_weights(workspace.store, checkpoint)) for checkpoint in stored
    ]
    return measured(open_dataset(workspace, ref), recipe, copies)


def measured(dataset: Dataset, recipe: str, copies: Sequence[tuple[float, dict[str, Tensor]]]) -> list[Copy]:
    config = make_config(recipe)
    return [
        Copy(seconds, evaluation.measure(answers, dataset.classes)["accuracy"])
        for seconds, weights in copies
        for answers in [
            evaluation.answer_test_images(evaluation.load_model(config, weights, len(dataset.classes)), dataset, config)
        ]
    ]


def seconds_to(level: float, copies: Sequence[Copy]) -> float:
    """When the level was reached; the whole time if it never was."""
    return next((copy.seconds for copy in copies if copy.accuracy >= level), copies[-1].seconds)


def compare(runs: dict[str, list[list[Copy]]]) -> dict[str, Any]:
    """Per contender: seconds to each level, final accuracy, and the best by the time quick has ended."""
    ends = [copies[-1].seconds for copies in runs["quick"]]
    found: dict[str, Any] = {}
    for name, rounds in runs.items():
        to_level = {level: [seconds_to(level, copies) for copies in rounds] for level in LEVELS}
        loops = [seconds_to(LEVELS[-1], copies) for copies in runs[LOOP]]
        best = [
            max((copy.accuracy for copy in copies if copy.seconds <= end), default=0.0)
            for copies, end in zip(rounds, ends, strict=True)
        ]
        found[name] = {
            "seconds_to": {f"{level:.1%}": Summary.of(seconds) for level, seconds in to_level.items()},
            "never_reached": {
                f"{level:.1%}": sum(all(copy.accuracy < level for copy in copies) for copies in rounds)
                for level in LEVELS
            },
            "times_sooner": Summary.of(
                [theirs / ours for theirs, ours in zip(loops, to_level[LEVELS[-1]], strict=True)]
            ),
            "seconds": Summary.of([copies[-1].seconds for copies in rounds]),
            "accuracy": Summary.of([copies[-1].accuracy for copies in rounds]),
            "best_by_the_end_of_quick": Summary.of(best),
        }
    return found


def rows(found: dict[str, Any]) -> list[list[str]]:
    def spread(summary: Summary, form: Callable[[float], str]) -> str:
        return f"{form(summary.median)} ({form(summary.min)}–{form(summary.max)})"

    def bound(name: str, level: str) -> str:
        return "≥ " if found[name]["never_reached"][level] else ""

    last = f"{LEVELS[-1]:.1%}"
    return [
        [
            name,
            *(f"{bound(name, level)}{to.median:.0f} s" for level, to in facts["seconds_to"].items() if level != last),
            bound(name, last) + spread(facts["seconds_to"][last], "{:.0f}".format),
            bound(LOOP, last) + spread(facts["times_sooner"], "{:.1f}".format),
            f"{facts['seconds'].median:.0f} s",
            spread(facts["accuracy"], "{:.2%}".format),
            f"{facts['best_by_the_end_of_quick'].median:.1%}",
        ]
        for name, facts in found.items()
    ]


def _train_once(home: Path, contender: str, seed: int, epochs: int | None) -> list[Copy]:
    with embedded_s3(home) as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=60)
        ref = pack(workspace, fetch(workspace, "cifar10"))
        if contender == LOOP:
            return tutorial_loop(workspace, ref, seed, epochs)
        return under_nightshift(workspace, ref, contender, seed, epochs)


def main(
    rounds: Annotated[int, typer.Option(help="Trainings of each contender.")] = 5,
    epochs: Annotated[int | None, typer.Option(help="Epochs of each training, instead of its own number.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One round, and two epochs of each.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was measured to this file.")] = None,
    contender: Annotated[str | None, typer.Option(hidden=True)] = None,
    seed: Annotated[int, typer.Option(hidden=True)] = 0,
    home: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train each contender `rounds` times, in turn, and compare how soon each reaches which accuracy."""
    if contender and home:
        copies = _train_once(home, contender, seed, epochs)
        print(json.dumps([[copy.seconds, copy.accuracy] for copy in copies]))
        return
    if quick:
        rounds, epochs = 1, 2
    facts = machine()
    runs: dict[str, list[list[Copy]]] = {name: [] for name in CONTENDERS}
    with temporary_home() as where, embedded_s3(where):
        for number in range(rounds):
            for name in CONTENDERS:
                command = [sys.executable, __file__, "--contender", name, "--seed", str(number), "--home", str(where)]
                command += ["--epochs", str(epochs)] if epochs else []
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                runs[name].append([Copy(*copy) for copy in json.loads(done.stdout.splitlines()[-1])])
            # After each round, so that an hour of measuring is not lost if it is interrupted.
            found = compare(runs)
            facts |= {"rounds": number + 1, "epochs": epochs}
            write_json(json_file, {"machine": facts, "result": found, "runs": runs})
    levels = [f"to {level:.1%}" for level in LEVELS]
    show(
        f"Test accuracy and time, {rounds} trainings each: median (lowest–highest)",
        facts,
        ["", *levels, "times sooner", "whole", "accuracy", "by quick's end"],
        rows(found),
    )


if __name__ == "__main__":
    typer.run(main)
