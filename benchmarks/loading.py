"""Images a second from encoded images to batches of pixels, and what a resume in mid-epoch costs.

JPEG files of 224 by 224 pixels, quality 95, enlarged from CIFAR-10 with the noise of a sensor (about 30 kB each), are
shuffled, decoded and put together to batches of 64, uint8, by:

    nightshift        `Batches` of a snapshot with storage = "encoded" and as many threads as cores; the shards are on
                      the disk, and were checked when they were fetched. Each image is checked again by its sha256
    DataLoader        torch's, 2 workers, files decoded by torchvision.io
    DataLoader, Pillow    the same, decoded by Pillow, as torchvision's ImageFolder does
    litdata           its StreamingDataset and StreamingDataLoader, 2 workers, the files' bytes in chunks of 64 MB
    hf datasets       imagefolder with the torch format, in torch's DataLoader with 2 workers
    one thread        simplejpeg alone on bytes in memory, times the cores: what cannot be reached

All have the same files, which are in the page cache. Each turn is a process of its own, which takes the time from its
twelfth batch to its last, so that starting workers costs nothing and each has the memory it needs; contenders take
turns, and each round begins with another. `first batch` is what a new reader of nightshift's takes to the first batch
in the middle of an epoch. `memory` is the most that all processes of a turn had together, every 50 ms: what is no
file's and, of what they share, each its part.

With `--training` a small network is trained on each batch by one thread, in five times the time of decoding it.

2 cores, n = 5, 6,000 images take an estimated 5 to 12 minutes.

    python benchmarks/loading.py [--training] [--images N] [--rounds N] [--quick] [--json FILE]
"""

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

_SIZE, _BATCH, _WORKERS = 224, 64, 2
_BEFORE = 12
"""The batches of a turn that are not counted."""
_CHUNK = "64MB"
_PEERS = {
    "DataLoader": (),
    "DataLoader, Pillow": (),
    "litdata": ("litdata",),
    "hf datasets": ("datasets",),
}
_NAMES = ("nightshift", *_PEERS, "one thread")


class _Files:
    """What torch's DataLoader reads: files, decoded to uint8 (3, side, side)."""

    def __init__(self, folder: Path, decode: Callable[[str], Any]) -> None:
        self._paths, self._decode = sorted(map(str, folder.rglob("*.jpg"))), decode

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Any:
        return self._decode(self._paths[number])


def _by_torchvision(path: str) -> Any:
    from torchvision.io import decode_jpeg, read_file

    return decode_jpeg(read_file(path))


def _by_pillow(path: str) -> Any:
    import torch
    from PIL import Image

    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB")))


def _pixels(sample: Any) -> Any:
    """An image of LitData's, decoded in its worker."""
    import torch
    from torchvision.io import decode_jpeg

    return decode_jpeg(torch.frombuffer(bytearray(sample), dtype=torch.uint8))


def _batches(name: str, home: Path) -> Iterable[Any]:
    """The batches of an epoch."""
    from torch.utils.data import DataLoader

    if name == "nightshift":
        reader, plan = _reader(home)
        return (reader.batch(step)[0] for step in range(plan.steps_per_epoch))
    if name == "one thread":
        return _in_memory(home)
    if name == "litdata":
        from litdata import StreamingDataLoader, StreamingDataset  # type: ignore[import-not-found]

        class Decoded(StreamingDataset):  # type: ignore[misc]
            def __getitem__(self, index: Any) -> Any:
                return _pixels(super().__getitem__(index))

        found: Iterable[Any] = StreamingDataLoader(
            Decoded(str(home / "litdata"), shuffle=True), batch_size=_BATCH, num_workers=_WORKERS
        )
        return found
    if name == "hf datasets":
        from datasets import load_dataset  # type: ignore[import-not-found]

        images = load_dataset("imagefolder", data_dir=str(home / "images"), split="train", cache_dir=str(home / "hf"))
        images = images.remove_columns("label").with_format("torch")
        return DataLoader(images, _BATCH, shuffle=True, num_workers=_WORKERS)
    decode = _by_pillow if name == "DataLoader, Pillow" else _by_torchvision
    return DataLoader(_Files(home / "images", decode), _BATCH, shuffle=True, num_workers=_WORKERS)  # type: ignore[arg-type]


def _in_memory(home: Path) -> Iterator[Any]:
    import simplejpeg

    bodies = [path.read_bytes() for path in (home / "images").rglob("*.jpg")]
    for start in range(0, len(bodies), _BATCH):
        into = np.empty((_BATCH, _SIZE, _SIZE, 3), np.uint8)
        for body, image in zip(bodies[start : start + _BATCH], into, strict=False):
            simplejpeg.decode_jpeg(body, "RGB", buffer=image)
        yield into


def _reader(home: Path) -> tuple[Any, Any]:
    from nightshift.config.recipes import make_config
    from nightshift.data.batches import Batches, make_plan
    from nightshift.data.datasets import open_dataset
    from nightshift.refs import DatasetRef
    from nightshift.storage.memory import MemoryStore
    from nightshift.workspace import Workspace

    ref = DatasetRef.model_validate_json((home / "ref.json").read_text())
    workspace = Workspace(MemoryStore(), home, lease_seconds=60, save_retry_seconds=0)  # all is on the disk
    config = make_config("quick", {"batch_size": _BATCH, "flip": "off", "translate": 0, "max_train_images": None})
    dataset = open_dataset(workspace, ref)
    plan = make_plan(config, dataset)
    return Batches(dataset, config, plan, lambda batch: slice(0, batch)), plan


def _trainer() -> Callable[[Any], None]:
    """A step of training on a batch of pixels: means of 8 by 8 pixels, two convolutions, and a linear layer."""
    import torch
    from torch import nn

    layers = [nn.AvgPool2d(8), nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step(batch: Any) -> None:
        images = torch.as_tensor(batch["image"] if isinstance(batch, dict) else batch)
        if images.shape[-1] == 3:
            images = images.permute(0, 3, 1, 2)
        loss = model(images.float() / 255).logsumexp(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def turn(name: str, home: Path, training: bool) -> dict[str, float]:
    """One contender in one process: images a second and, for nightshift, a resume."""
    import torch

    torch.set_num_threads(1)  # a batch is put together in the time it takes to start another thread
    result = {}
    if name == "nightshift":
        reader, plan = _reader(home)
        began = time.perf_counter()
        reader.batch(plan.steps_per_epoch // 2)
        result["first_batch"] = time.perf_counter() - began
    images, began, train = 0, 0.0, _trainer() if training else None
    for number, batch in enumerate(_batches(name, home)):
        if number < _BEFORE:
            began = time.perf_counter()
        else:
            images += len(batch["image"] if isinstance(batch, dict) else batch)
        if train:
            train(batch)
    result["rate"] = images / (time.perf_counter() - began)
    return result


def run_turn(name: str, home: Path, training: bool) -> dict[str, float]:
    """A turn in a process of its own, and the most memory that it and its children had, in bytes."""
    command = [sys.executable, __file__, "--contender", name, "--home-of", str(home), *["--training"] * training]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            most = max(most, sum(map(_memory, _with_children(process.pid))))
            time.sleep(0.05)
        assert process.stdout
        printed = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{name} has failed:\n{printed}")
    return {**json.loads(printed.splitlines()[-1]), "memory": most}


def _with_children(pid: int) -> Iterator[int]:
    yield pid
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in thread.read_text().split():
                yield from _with_children(int(child))


def _memory(pid: int) -> int:
    with suppress(OSError):  # it has ended
        said = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        return sum(int(said[part].split()[0]) for part in ("Pss_Anon", "Pss_Shmem")) * 1024
    return 0


def prepare(home: Path, count: int) -> None:
    """The files, the snapshot, and what a peer makes of them once."""
    from common import copy_data_cache, installed
    from photographs import write_files

    from nightshift.config.project import DatasetConfig
    from nightshift.data.datasets import in_parts, open_dataset
    from nightshift.data.known import fetch, pack
    from nightshift.data.packed import pack_snapshot
    from nightshift.data.snapshot import make_snapshot
    from nightshift.local.s3 import embedded_s3
    from nightshift.workspace import Workspace

    copy_data_cache(home)
    with embedded_s3(home) as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=60)
        cifar = open_dataset(workspace, pack(workspace, fetch(workspace, "cifar10")))
        names = [cifar.classes[label] for label in cifar.train_labels[:count]]
        paths = [home / "images" / name / f"{number:05}.jpg" for number, name in enumerate(names)]
        write_files(cifar.train_images[:count].numpy(), paths, (_SIZE, _SIZE), quality=95)
        split = {"test": 0.01, "validation": 0}
        config = DatasetConfig.model_validate(
            {"source": str(home / "images"), "image_size": _SIZE, "storage": "encoded", "split": split}
        )
        ref = pack_snapshot(workspace, make_snapshot(store, "photographs", config))
        for _ in in_parts(open_dataset(workspace, ref).train_images, _BATCH):  # the shards are fetched
            pass
    (home / "ref.json").write_text(ref.model_dump_json())
    if "litdata" in installed(_PEERS):
        from litdata import optimize

        printed = io.StringIO()
        sys.stdout, out = printed, sys.stdout
        optimize(_bytes, [str(path) for path in paths], str(home / "litdata"), chunk_bytes=_CHUNK, num_workers=1)
        sys.stdout = out


def _bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def main(
    images: Annotated[int, typer.Option(help="How many files.")] = 6000,
    rounds: Annotated[int, typer.Option(help="How often each has its turn.")] = 5,
    training: Annotated[bool, typer.Option("--training", help="Train a network on what is loaded.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="2,000 images and 3 rounds.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
    contender: Annotated[str | None, typer.Option(hidden=True)] = None,
    home_of: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Images a second from encoded images to batches of pixels."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if contender and home_of:
        print(json.dumps(turn(contender, home_of, training)))
        return
    from common import Summary, installed, machine, show, tell, temporary_home, write_json

    if quick:
        images, rounds = 2000, 3
    facts = {"images": images, "rounds": rounds, "training": training, **machine()}
    turns: list[dict[str, Any]] = []
    with temporary_home() as home:
        tell(f"writing {images:,} files")
        prepare(home, images)
        names = [name for name in _NAMES if name not in _PEERS or name in installed(_PEERS)]
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                tell(name)
                turns.append({"name": name, "round": number, **run_turn(name, home, training)})

    def of(name: str, what: str) -> list[float]:
        return [turn[what] for turn in turns if turn["name"] == name]

    cores, ours = len(os.sched_getaffinity(0)), of("nightshift", "rate")
    rows = []
    for name in names:
        factor = cores if name == "one thread" and not training else 1
        rates = [factor * rate for rate in of(name, "rate")]
        rate, ratio = Summary.of(rates), Summary.of([own / rate for own, rate in zip(ours, rates, strict=True)])
        label = name if factor == 1 else f"{name} × {factor}"
        rows.append(
            [
                label,
                str(rate.n),
                *(f"{value:,.0f}" for value in (rate.median, rate.min, rate.max)),
                *(f"{value:.2f}" for value in (ratio.median, ratio.min, ratio.max)),
                f"{Summary.of(of(name, 'memory')).median / 1e6:,.0f}",
            ]
        )
    columns = ["", "n", "images/s", "min", "max", "nightshift over it", "min", "max", "memory, MB"]
    show("From JPEG to batches" + ", while a network trains" * training, facts, columns, rows)
    resumed = Summary.of(of("nightshift", "first_batch"))
    show(
        "First batch in mid-epoch",
        {},
        ["n", "median s", "min", "max"],
        [[str(resumed.n), *(f"{value:.2f}" for value in (resumed.median, resumed.min, resumed.max))]],
    )
    write_json(json_file, {"benchmark": "loading", "machine": facts, "samples": turns})


if __name__ == "__main__":
    typer.run(main)
