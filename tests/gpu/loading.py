"""How fast encoded images are decoded beside a GPU, and whether that is fast enough for it."""

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import torch

from nightshift.data import jpeg
from nightshift.data.datasets import Dataset
from nightshift.data.encoded import Decoding, EncodedImages
from nightshift.data.shards import Shards
from nightshift.records import snapshots
from nightshift.storage.memory import MemoryStore
from tests.gpu.stage import Figure, Stage, config_of, made_up, train, workspace_of

SIDE, _NOISE = 224, 9
_BATCH, _AT_ONCE = 64, 100


def decoding(stage: Stage) -> Iterator[Figure]:
    """JPEGs of 224 pixels, decoded by 1, 2, 4 … threads."""
    stored = photographs(100 if stage.is_small else 2000)
    expected = stored_images(stage, stored, 1)[:20]
    for threads in _powers(os.cpu_count() or 1):
        images = stored_images(stage, stored, threads)
        started = time.perf_counter()
        found = images[:]
        rate = len(stored) / (time.perf_counter() - started)
        yield Figure(f"images/s, {threads} threads", rate, torch.equal(found[:20], expected))


def nvjpeg(stage: Stage) -> Iterator[Figure]:
    """The same JPEGs decoded by the GPU, if torchvision is here, which asks it to."""
    device = stage.gpu()
    if not find_spec("torchvision"):
        yield Figure("images/s, on the GPU", "torchvision is not here")
        return
    from torchvision.io import decode_jpeg

    stored = photographs(2000)
    files = [torch.frombuffer(bytearray(one[jpeg._LENGTH :]), dtype=torch.uint8) for one in stored]
    decode_jpeg(files[:_AT_ONCE], device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for start in range(0, len(files), _AT_ONCE):
        there = decode_jpeg(files[start : start + _AT_ONCE], device=device)
    torch.cuda.synchronize()
    yield Figure("images/s, on the GPU", len(files) / (time.perf_counter() - started))
    here = stored_images(stage, stored[-1:], 1)[0]
    apart = (there[-1].cpu().permute(1, 2, 0).int() - here.int()).abs().max()
    yield Figure("largest difference of a pixel to the CPU's", int(apart))


def fed(stage: Stage) -> Iterator[Figure]:
    """Images/s of a training on encoded images, beside those of one on pixels that lie on the GPU."""
    stage.gpu()
    count = 64 if stage.is_small else 40 * _BATCH
    stored = photographs(count)
    small = made_up(count)
    pixels = replace(small, train_images=stored_images(stage, stored, None)[:], mean=(128.0,) * 3, std=(64.0,) * 3)
    encoded = replace(pixels, train_images=stored_images(stage, stored, None))
    rates = {name: _rate(stage, dataset, count) for name, dataset in (("pixels", pixels), ("encoded", encoded))}
    for name, rate in rates.items():
        yield Figure(f"images/s, {name}", rate)
    yield Figure("encoded / pixels", rates["encoded"] / rates["pixels"])


def _rate(stage: Stage, dataset: Dataset, count: int) -> float:
    """Of the second of two trainings."""
    epochs = 1 if stage.is_small else 3
    config = config_of("quick" if stage.is_small else "speedrun", batch_size=_BATCH, epochs=epochs, translate=0)
    for run_id in ("warm", "run"):
        record = train(stage.home, MemoryStore(), run_id, config, dataset)
    return epochs * count / record.train_seconds


def _powers(most: int) -> list[int]:
    """1, 2, 4, … and `most`."""
    return [*(2**power for power in range(most.bit_length()) if 2**power < most), most]


def photographs(count: int) -> list[bytes]:
    """Images as they are stored, with the noise of a sensor over something smooth: they cost as much as photographs."""
    chance = np.random.default_rng(0)
    noise = chance.normal(0, _NOISE, (SIDE, SIDE, 3))
    across = np.linspace(0, 1, SIDE)[:, None, None] * np.ones((SIDE, SIDE, 1))
    found = []
    for _ in range(count):
        ends = chance.integers(30, 220, (2, 3))
        smooth = ends[0] * across + ends[1] * (1 - across)
        found.append(jpeg.as_stored((smooth + noise).clip(0, 255).astype(np.uint8), b""))
    return found


def stored_images(stage: Stage, stored: Sequence[bytes], threads: int | None) -> EncodedImages:
    """Photographs as a shard of a store, fetched and decoded when they are asked for."""
    shard, store = b"".join(stored), MemoryStore()
    digest = hashlib.sha256(shard).hexdigest()
    store.put(snapshots.shard_key(digest), shard)
    offsets = np.cumsum([0, *map(len, stored[:-1])])
    sums = np.stack([np.frombuffer(hashlib.sha256(one).digest(), np.uint8) for one in stored])
    shards = Shards(workspace_of(store, stage.home))
    shards.open(digest)
    return EncodedImages(
        Decoding(shards, [digest], SIDE, threads), np.zeros(len(stored), np.int32), offsets.astype(np.int64), sums
    )
