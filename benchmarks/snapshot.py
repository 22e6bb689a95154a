"""What a snapshot of many images costs: the first one, the one after a few more came, and a listing of a million.

CIFAR-10's training images as files in class folders, nine of ten PNG and the tenth JPEG; with `--height`, enlarged to
JPEG files as large as photographs, four wide by three high, with the noise that makes a file as large as one of a
camera's, of which the snapshot keeps 64 by 64 pixels:

    Pillow, one thread   opens each file, decodes it to RGB, and keeps nothing (it also makes photographs smaller): what
                         the first snapshot is compared with
    first snapshot       `make_snapshot` of a new data set: listing, reading, decoding, sha256 of file and pixels,
                         splits, rules, shards and rows in the embedded S3 server
    without a server     the same into the store in memory: a server elsewhere takes nothing of these cores
    1 % more             `make_snapshot` again after so many more files: its share of the first one's reads and time
    litdata              `optimize` with as many processes as cores: decoded images as chunks of 64 MB in a folder
    hf datasets          `load_dataset("imagefolder")`, then `to_parquet`: the files' bytes as they are, not decoded

All have the same files, which are in the page cache, and take turns in every round. Each round has a new data set, and
begins with another contender.

Last, `made_up.py`: in a process of its own, a listing of keys that nobody has is diffed against the last snapshot of
nearly the same keys, 1 in 1,000 being new and read. It takes seconds, processor time of that process, and its peak
memory.

Server and snapshot share the same cores. 2 cores, n = 3, 50,000 images and 1,000,000 keys take an estimated 10
minutes.

    python benchmarks/snapshot.py [--images N] [--height N] [--keys N] [--rounds N] [--quick] [--json FILE]
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

if __name__ == "__main__":  # and not in the processes that decode: each imports this file, and torch takes seconds
    from common import Summary, copy_data_cache, installed, machine, show, tell, temporary_home, write_json
    from photographs import write_files

    from nightshift.config.project import DatasetConfig
    from nightshift.data.datasets import open_dataset
    from nightshift.data.known import fetch, pack
    from nightshift.data.snapshot import make_snapshot
    from nightshift.local.s3 import embedded_s3
    from nightshift.storage.memory import MemoryStore
    from nightshift.storage.s3 import S3
    from nightshift.workspace import Workspace

_PEERS = {"litdata": ("litdata",), "hf datasets": ("datasets",)}
_ORDER = ("Pillow, one thread", "first snapshot", "without a server", "1 % more", *_PEERS)
_CHUNK = "64MB"
_KEPT = 64
"""The side of what a snapshot keeps of a photograph, in pixels."""
_MADE_UP = Path(__file__).with_name("made_up.py")


@dataclass(frozen=True)
class Turn:
    """One contender in one round."""

    contender: str
    seconds: float
    read: int
    """How many images it read."""


def write_images(home: Path, folder: Path, count: int, height: int) -> tuple[list[Path], list[tuple[Path, bytes]]]:
    """Write so many images into folders of their classes. Returns them, and 1 % more that are not written yet."""
    with embedded_s3(home, "cifar10") as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=60)
        dataset = open_dataset(workspace, pack(workspace, fetch(workspace, "cifar10")))
    more = max(count // 100, 1)
    if count + more > len(dataset.train_images) + len(dataset.test_images):
        raise typer.BadParameter(f"CIFAR-10 has fewer than {count + more:,} images")
    images = np.concatenate([dataset.train_images[:].numpy(), dataset.test_images[:].numpy()])
    labels = np.concatenate([dataset.train_labels.numpy(), dataset.test_labels.numpy()])
    paths = []
    for number in range(count + more):
        kind = "jpg" if height or number % 10 == 0 else "png"
        paths.append(folder / dataset.classes[labels[number]] / f"{number:05}.{kind}")
    write_files(images, paths, (height * 4 // 3, height) if height else None)
    later = [(path, path.read_bytes()) for path in paths[count:]]
    for path, _ in later:
        path.unlink()
    return paths[:count], later


def with_pillow(paths: list[Path], side: int = 0) -> int:
    for path in paths:
        with Image.open(path) as image:
            decoded = image.convert("RGB")
            (decoded.resize((side, side)) if side else decoded).tobytes()
    return len(paths)


def with_litdata(paths: list[Path]) -> int:
    from litdata import optimize  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as into, _quiet():
        optimize(_sample, [str(path) for path in paths], into, chunk_bytes=_CHUNK, num_workers=os.cpu_count())
    return len(paths)


@contextmanager
def _quiet() -> Iterator[None]:
    """Send what this process and its children print to standard error: LitData tells much."""
    sys.stdout.flush()
    printed = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(printed, 1)
        os.close(printed)


def _sample(path: str) -> dict[str, Any]:
    with Image.open(path) as image:
        return {"image": np.asarray(image.convert("RGB")), "class": Path(path).parent.name}


def with_hf_datasets(folder: Path) -> int:
    from datasets import load_dataset  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as into:
        images = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=into)
        images.to_parquet(f"{into}/images.parquet")
        return len(images)


def measure(
    store: "S3", folder: Path, paths: list[Path], later: list[tuple[Path, bytes]], rounds: int, height: int
) -> list[Turn]:
    side = _KEPT if height else 0
    config = DatasetConfig(source=str(folder), image_size=side or 32)
    peers: dict[str, Callable[[], int]] = {
        "litdata": lambda: with_litdata(paths),
        "hf datasets": lambda: with_hf_datasets(folder),
    }
    there = installed(_PEERS)
    turns: list[Turn] = []

    def take(contender: str, run: Callable[[], int]) -> None:
        tell(contender)
        started = time.perf_counter()
        read = run()
        turns.append(Turn(contender, time.perf_counter() - started, read))

    def snapshots(number: int) -> None:
        name = f"images-{number}"
        take("first snapshot", lambda: make_snapshot(store, name, config).read)
        for path, body in later:
            path.write_bytes(body)
        take("1 % more", lambda: make_snapshot(store, name, config).read)
        for path, _ in later:
            path.unlink()

    for number in range(rounds):
        contenders: list[Callable[[], None]] = [
            partial(take, "Pillow, one thread", partial(with_pillow, paths, side)),
            partial(snapshots, number),
            partial(take, "without a server", lambda: make_snapshot(MemoryStore(), "images", config).read),
            *(partial(take, name, peers[name]) for name in there),
        ]
        first = number % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender()
    return turns


def diff_made_up(keys: int) -> dict[str, Any]:
    """What `made_up.py` prints of so many keys."""
    new = max(keys // 1000, 1)
    with tempfile.TemporaryDirectory() as folder:
        tell(f"making up {keys:,} keys")
        subprocess.run([sys.executable, _MADE_UP, "prepare", folder, str(keys - new)], check=True)
        tell("the diff")
        command = [sys.executable, str(_MADE_UP), "diff", folder, str(keys - new), str(new)]
        found: dict[str, Any] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def main(
    images: Annotated[int, typer.Option(help="How many files.")] = 50_000,
    height: Annotated[int, typer.Option(help="Of photographs, in pixels; 0: the images as they are.")] = 0,
    keys: Annotated[int, typer.Option(help="How many keys are made up.")] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="How often each has its turn.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="10,000 images, 100,000 keys and 2 rounds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """What a snapshot of many images costs."""
    if quick:
        images, keys, rounds = 10_000, 100_000, 2
    facts = machine()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with temporary_home() as home:
        copy_data_cache(home)
        folder = home / "images"
        tell(f"writing {images:,} files")
        paths, later = write_images(home, folder, images, height)
        with embedded_s3(home) as store:
            with_pillow(paths[:1000])
            turns = measure(store, folder, paths, later, rounds, height)
        shutil.rmtree(folder)
    found = diff_made_up(keys)
    report(turns, found, {"images": images, "height": height or 32, "rounds": rounds, **facts}, json_file)


def report(turns: list[Turn], found: dict[str, Any], facts: dict[str, Any], json_file: Path | None) -> None:
    names = sorted({turn.contender for turn in turns}, key=[*_ORDER].index)
    seconds = {name: Summary.of([turn.seconds for turn in turns if turn.contender == name]) for name in names}
    read = {turn.contender: turn.read for turn in turns}
    ratios = {
        name: Summary.of([base / own for base, own in zip(_of(turns, _ORDER[0]), _of(turns, name), strict=True)])
        for name in names
    }
    shares = [few / first for few, first in zip(_of(turns, "1 % more"), _of(turns, "first snapshot"), strict=True)]
    rows = []
    for name in names:
        taken, ratio = seconds[name], ratios[name]
        times = [f"{ratio.median:.2f}", f"{ratio.min:.2f}", f"{ratio.max:.2f}"]
        rows.append(
            [
                name,
                str(taken.n),
                *(f"{value:.2f}" for value in (taken.median, taken.min, taken.max)),
                f"{read[name]:,}",
                *(times if name != "1 % more" else ["", "", ""]),
            ]
        )
    show(
        f"{facts['images']:,} images",
        facts,
        ["", "n", "median s", "min", "max", "images read", "as fast as Pillow", "min", "max"],
        rows,
    )
    share = Summary.of(shares)
    show(
        "A snapshot after 1 % more images",
        {},
        ["of the first one's", "median", "min", "max"],
        [
            ["time", *(f"{value:.1%}" for value in (share.median, share.min, share.max))],
            ["reads", *[f"{read['1 % more'] / read['first snapshot']:.1%}"] * 3],
        ],
    )
    show(
        "A listing that is diffed against the last snapshot",
        {},
        ["keys", "new", "seconds", "processor seconds", "peak MB"],
        [
            [
                f"{found['images']:,}",
                f"{found['read']:,}",
                f"{found['seconds']:.1f}",
                f"{found['cpu_seconds']:.1f}",
                f"{found['peak_bytes'] / 1e6:,.0f}",
            ]
        ],
    )
    write_json(
        json_file,
        {
            "benchmark": "snapshot",
            "machine": facts,
            "seconds": seconds,
            "over_pillow": ratios,
            "share_of_first": share,
            "read": read,
            "listing": found,
            "samples": turns,
        },
    )


def _of(turns: list[Turn], contender: str) -> list[float]:
    """The seconds of a contender, round by round."""
    return [turn.seconds for turn in turns if turn.contender == contender]


if __name__ == "__main__":
    typer.run(main)
