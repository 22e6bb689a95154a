"""What augmentation costs: images a second of a recipe's training loop, without any and with each kind.

Every kind trains in this process, in turns of a few steps, so that all meet the same load of the machine; each round
begins with another kind. Images are made up, 32 by 32 unless --size says otherwise, and lie in memory; nothing is saved
or reported. A turn's speed is that of its whole steps: the batch is gathered, augmented, normalized and trained on.
It is in one thread on the CPU, by this process' CPU time, so what else runs on the machine counts little.

By default n = 10 turns of 5 steps a kind: about two minutes.

    python benchmarks/augmentation.py [--recipe quick] [--size 32] [--turns 10] [--kinds plain,mixup] [--json FILE]
"""

import time
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Summary, machine, show, write_json

from nightshift.config.recipes import make_config
from nightshift.data import batches
from nightshift.data.datasets import Dataset
from nightshift.hardware import Hardware
from nightshift.training.loop import Loop, RankOrders
from nightshift.training.ranks import ALONE
from nightshift.training.recorder import Recorder

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "crop": {"crop": 0.3},
    "randaugment": {"randaugment": 9},
    "trivialaugment": {"trivialaugment": True},
    "jitter": {"jitter": 0.4},
    "jitter and hue": {"jitter": 0.4, "hue": 0.1},
    "erasing": {"erasing": 0.5},
    "mixup": {"mixup": 0.2},
    "cutmix": {"cutmix": 1.0},
}
STEPS = 5


def made_up(size: int) -> Dataset:
    """2,560 images of noise."""
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(256, (2560, size, size, 3), dtype=torch.uint8, generator=chance)
    labels = torch.randint(10, (2560,), dtype=torch.uint8, generator=chance)
    means, deviations = (127.5, 127.5, 127.5), (73.9, 73.9, 73.9)
    return Dataset("made-up", "0" * 64, tuple("abcdefghij"), images, labels, images[:1], labels[:1], means, deviations)


def loop_of(recipe: str, overrides: dict[str, Any], dataset: Dataset) -> Loop:
    config = make_config(recipe, {"dataset": "made-up", "epochs": 1000, "device": "cpu", **overrides})
    plan = batches.make_plan(config, dataset)
    hardware = Hardware.resolve(config.hardware, 0)
    return Loop(config, batches.resident(dataset, config, hardware.device), plan, hardware, ALONE, Recorder())


def main(
    recipe: str = "quick",
    size: int = 32,
    turns: int = 10,
    kinds: str = ",".join(KINDS),
    json: Annotated[Path | None, typer.Option()] = None,
) -> None:
    torch.set_num_threads(1)
    dataset, facts = made_up(size), machine()
    loops = {kind: loop_of(recipe, KINDS[kind], dataset) for kind in kinds.split(",")}
    batch = make_config(recipe).data.batch_size
    speeds = defaultdict[str, list[float]](list)
    with Hardware.resolve(make_config(recipe, {"device": "cpu"}).hardware, 0).numerics():
        for turn in range(-1, turns):  # the first one warms up
            for kind in (*list(loops)[turn % len(loops) :], *list(loops)[: turn % len(loops)]):
                start = time.process_time()
                loops[kind].run(RankOrders(lambda step: step % STEPS == 0))
                if turn >= 0:
                    speeds[kind].append(STEPS * batch / (time.process_time() - start))
    found = {kind: Summary.of(speeds[kind]) for kind in loops}
    plain = found.get("plain")
    rows = [
        [
            kind,
            f"{of.median:,.0f}",
            f"{of.min:,.0f} to {of.max:,.0f}",
            f"{of.median / plain.median:.2f}" if plain else "",
        ]
        for kind, of in found.items()
    ]
    show(f"{recipe}, {size} by {size}, n = {turns}", facts, ["", "images a CPU second", "range", "of plain"], rows)
    write_json(json, {"machine": facts, "recipe": recipe, "size": size, "images_per_cpu_second": found})


if __name__ == "__main__":
    typer.run(main)
