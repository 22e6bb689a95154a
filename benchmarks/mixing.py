"""Whether an epoch that reads a few shards at a time trains as well as one that shuffles all images.

CIFAR-10, recipe `quick`, several seeds, and the test accuracy of each order:

    all             each epoch shuffles all 50,000 images
    windows         shards of 2,000 images that were divided by chance, as a snapshot of encoded images has them, and
                    that are read in windows of 8,192 images or more
    sorted          the same windows of shards that have one class each, as from a Parquet table sorted by class

The images are the same, as pixels, so that only the order differs. 2 cores, n = 3 take an estimated 11 minutes.

    python benchmarks/mixing.py [--seeds N] [--quick] [--json FILE]
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import Summary, copy_data_cache, machine, show, tell, temporary_home, write_json

from nightshift.config.recipes import make_config
from nightshift.data import batches
from nightshift.data.batches import Windows
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.data.known import fetch, pack
from nightshift.hardware import Hardware
from nightshift.judging.evaluation import answer_test_images
from nightshift.local.s3 import embedded_s3
from nightshift.training.loop import Loop, RankOrders
from nightshift.training.ranks import ALONE
from nightshift.training.recorder import Recorder
from nightshift.workspace import Workspace

_SHARD = 2000
_ORDERS = ("all", "windows", "sorted")


def shards_of(dataset: Dataset, order: str) -> Windows | None:
    if order == "all":
        return None
    images = len(dataset.train_labels)
    lies = torch.randperm(images, generator=torch.Generator().manual_seed(1))
    if order == "sorted":
        lies = dataset.train_labels.long().argsort(stable=True)
    shards = torch.empty(images, dtype=torch.int64)
    shards[lies] = torch.arange(images) // _SHARD
    return Windows(shards)


def accuracy(dataset: Dataset, order: str, seed: int, epochs: int | None) -> float:
    config = make_config("quick", {"seed": seed, **({"epochs": epochs} if epochs else {})})
    plan = replace(batches.make_plan(config, dataset), windows=shards_of(dataset, order))
    hardware = Hardware.resolve(config.hardware, plan.total_steps)
    with hardware.numerics():
        loop = Loop(config, dataset, plan, hardware, ALONE, Recorder())
        loop.run(RankOrders(lambda step: False))
    answers = answer_test_images(loop._state.network, dataset, config)
    return float((answers.predicted == answers.labels).double().mean())


def main(
    seeds: Annotated[int, typer.Option(help="How many trainings of each order.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="2 seeds, 3 epochs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """Accuracy by the order in which an epoch shows its images."""
    seeds, epochs = (2, 3) if quick else (seeds, None)
    with temporary_home() as home, embedded_s3(home) as store:
        copy_data_cache(home)
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=60)
        dataset = open_dataset(workspace, pack(workspace, fetch(workspace, "cifar10")))
        found: dict[str, list[float]] = {order: [] for order in _ORDERS}
        for seed in range(seeds):
            for order in _ORDERS:
                tell(f"seed {seed}, {order}")
                found[order].append(100 * accuracy(dataset, order, seed, epochs))
    rows = []
    for order, values in found.items():
        summary = Summary.of(values)
        rows.append([order, str(summary.n), *(f"{value:.2f}" for value in (summary.median, summary.min, summary.max))])
    show("Test accuracy by order", machine(), ["order", "n", "median %", "min", "max"], rows)
    write_json(json_file, {"benchmark": "mixing", "accuracy": found, "machine": machine()})


if __name__ == "__main__":
    typer.run(main)
