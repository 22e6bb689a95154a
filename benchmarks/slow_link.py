"""What two ranks lose on a slow link between their machines, and what could be done about it.

Each rank trains in a network of its own. Between the two is a link of 1 Gbit/s that takes 10 ms each way: two TUN
devices, whose packets this process carries from one to the other when they are due. The kernel's own way, `tc netem`,
is not in every kernel. Nothing else of nightshift is changed: the ranks run its loop and meet by its process groups,
without a store, as they save nothing. Each has one thread.

    one rank        alone, on one thread
    no link         two ranks, with packets carried at once
    as it is        two ranks over the link, as nightshift trains
    bfloat16        gradients are sent in half the bytes, by torch's hook
    larger buckets  gradients in buckets of 100 MB instead of 25 MB: fewer answers to wait for
    static graph    torch need not look for parameters without a gradient, which asks the other ranks
    all of these

A static graph sorts the buckets anew after the first step. With three ranks or more the order of a sum then depends on
where the training began, so a resume would have other bits (docs/decisions/0010-ranks.md).

It needs Linux, `ip`, /dev/net/tun and root. 2 cores, n = 3: about 12 minutes.

    python benchmarks/slow_link.py [--recipe NAME] [--model NAME] [--gbit N] [--ms N] [--quick] [--json FILE]
"""

import ctypes
import fcntl
import math
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from common import Summary, copy_data_cache, machine, show, tell, temporary_home, write_json
from throughput import prepared
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from nightshift.config.recipes import make_config
from nightshift.data import batches
from nightshift.data.datasets import open_dataset
from nightshift.hardware import Hardware
from nightshift.local.s3 import embedded_s3
from nightshift.parallel import ranks as parallel_ranks
from nightshift.parallel.ranks import joined
from nightshift.training.loop import Loop, RankOrders
from nightshift.training.ranks import ALONE, Ranks
from nightshift.training.recorder import Recorder
from nightshift.workspace import Workspace

_TUN, _TUNSETIFF, _IFF_TUN, _IFF_NO_PI = "/dev/net/tun", 0x400454CA, 0x0001, 0x1000
_MTU = 65_000
"""Large packets, so that carrying them takes no core from the ranks."""
_CLONE_NEWNET = 0x40000000
_PORT, _TIMEOUT = 29_400, timedelta(minutes=5)
_WARM_UP_STEPS = 3
_SPAWN = get_context("spawn")

_STATIC = {"static_graph": True, "find_unused_parameters": False}
WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "bfloat16": {"bfloat16": True},
    "larger buckets": {"bucket_cap_mb": 100},
    "static graph": _STATIC,
    "all of these": {"bfloat16": True, "bucket_cap_mb": 100, **_STATIC},
}


def averaging(model: nn.Module, device: torch.device, bfloat16: bool = False, **options: Any) -> nn.Module:
    """As `parallel.ranks.averaging`, but for what is said otherwise."""
    averaged = DistributedDataParallel(model, **{"find_unused_parameters": True, **options})
    averaged.__dict__["broadcast_buffers"] = False
    if bfloat16:
        averaged.register_comm_hook(None, bf16_compress_hook)
    return averaged


def tun(rank: int) -> int:
    """Enter a network of this thread's own, with a rank's address on one end of the link. Returns the other end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "this user may not have a network of its own")
    device = os.open(_TUN, os.O_RDWR)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH", b"slow", _IFF_TUN | _IFF_NO_PI))
    for command in ("link set lo up", f"link set dev slow mtu {_MTU} up", f"addr add 10.0.0.{rank + 1}/24 dev slow"):
        subprocess.run(["/usr/sbin/ip", *command.split()], check=True)
    return device


@contextmanager
def carried(ends: tuple[int, int], bytes_per_second: float, delay: float) -> Iterator[None]:
    """Carry packets between the two ends of a link, in a thread, as long as the block lasts."""
    stopped, stop = os.pipe()

    def carry() -> None:
        waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}
        free = dict.fromkeys(ends, 0.0)
        while True:
            now = time.monotonic()
            for end, packets in waiting.items():
                while packets and packets[0][0] <= now:
                    os.write(end, packets.popleft()[1])
            due = min((packets[0][0] for packets in waiting.values() if packets), default=now + 1)
            readable, _, _ = select.select([*ends, stopped], [], [], max(0, due - time.monotonic()))
            if stopped in readable:
                return
            for end in readable:
                packet, other, now = os.read(end, _MTU + 100), ends[end == ends[0]], time.monotonic()
                free[end] = max(now, free[end]) + len(packet) / bytes_per_second
                waiting[other].append((free[end] + delay, packet))

    thread = threading.Thread(target=carry, name="link", daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(stop, b"x")
        thread.join()


def train(
    home: Path, recipe: str, overrides: dict[str, Any], steps: int, way: str, rank: int, peer: Connection
) -> None:
    """Train as one rank in the process that calls it, and send how many images per second all ranks have trained."""
    torch.set_num_threads(1)
    config = make_config(recipe, overrides)
    with embedded_s3(home) as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=60)
        dataset = open_dataset(workspace, prepared(workspace, config))
    plan = batches.make_plan(config, dataset)
    hardware = Hardware.resolve(config.hardware, plan.total_steps)
    begun = 0.0

    def is_enough(step: int) -> bool:
        nonlocal begun
        if step == _WARM_UP_STEPS:
            begun = time.perf_counter()
        return step == _WARM_UP_STEPS + steps

    def run(ranks: Ranks) -> None:
        with hardware.numerics():
            Loop(config, dataset, plan, hardware, ranks, Recorder()).run(RankOrders(is_enough))
        peer.send(steps * config.data.batch_size / (time.perf_counter() - begun))

    if not way:
        run(ALONE)
        return
    send_handle(peer, tun(rank), os.getppid())
    peer.recv()  # the link works
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_WORLD_SIZE": "2"}
    os.environ |= {"GLOO_SOCKET_IFNAME": "slow"}
    if WAYS[way]:
        parallel_ranks.averaging = partial(averaging, **WAYS[way])
    meeting = dist.TCPStore(  # type: ignore[attr-defined]
        "10.0.0.1", _PORT, 2, is_master=rank == 0, timeout=_TIMEOUT, wait_for_workers=False
    )
    with joined(meeting, _TIMEOUT) as ranks:
        run(ranks)


def images_per_second(way: str, link: tuple[float, float], *what: Any) -> float:
    """Of all ranks together; alone if there is no way to average gradients."""
    pipes = [_SPAWN.Pipe() for _ in range(2 if way else 1)]
    for rank, (_, theirs) in enumerate(pipes):
        _SPAWN.Process(target=train, args=(*what, way, rank, theirs), daemon=True).start()
        theirs.close()
    peers = [ours for ours, _ in pipes]
    if not way:
        return float(peers[0].recv())
    first, second = map(recv_handle, peers)
    with carried((first, second), *link):
        for peer in peers:
            peer.send("the link works")
        speeds = [float(peer.recv()) for peer in peers]
        wait(peers)  # which they end with their processes: a rank must not lose the link before the other has ended
    os.close(first)
    os.close(second)
    return min(speeds)


def main(
    recipe: Annotated[str, typer.Option(help="What is trained.")] = "quick",
    model: Annotated[str | None, typer.Option(help="Another network than the recipe's.")] = None,
    batch: Annotated[int | None, typer.Option(help="Another batch size than the recipe's.")] = None,
    gbit: Annotated[float, typer.Option(help="What the link carries in a second.")] = 1,
    ms: Annotated[float, typer.Option(help="How long it takes each way.")] = 10,
    steps: Annotated[int, typer.Option(help="Steps that are timed.")] = 30,
    rounds: Annotated[int, typer.Option(help="Trainings of each kind, in turns.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works: one round of 5 steps.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """Images per second of two ranks over a slow link."""
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # of the ranks, as the launcher sets it
    if quick:
        rounds, steps = 1, 5
    overrides: dict[str, Any] = {} if model is None else {"model": model}
    if batch is not None:
        overrides["batch_size"] = batch
    none, slow = (math.inf, 0.0), (gbit * 1e9 / 8, ms / 1000)
    kinds = {"one rank": ("", none), "no link": ("as it is", none)} | {way: (way, slow) for way in WAYS}
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    facts = {"recipe": recipe, **overrides, "gbit": gbit, "ms": ms, "steps": steps, **machine()}
    with temporary_home() as home, embedded_s3(home) as store:
        copy_data_cache(home)
        prepared(Workspace(store, home, lease_seconds=60, save_retry_seconds=60), make_config(recipe, overrides))
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            for kind, (way, link) in kinds.items():
                speeds[kind].append(images_per_second(way, link, home, recipe, overrides, steps))
    known = {kind: Summary.of(samples) for kind, samples in speeds.items()}
    rows = [
        [
            kind,
            str(of.n),
            *(f"{value:,.1f}" for value in (of.median, of.min, of.max)),
            f"{of.median / known['as it is'].median:.2f}",
        ]
        for kind, of in known.items()
    ]
    show("Training over a slow link", facts, ["images/s", "n", "median", "min", "max", "/ as it is"], rows)
    write_json(json_file, {"benchmark": "slow_link", "facts": facts, "images_per_second": known, "samples": speeds})


if __name__ == "__main__":
    typer.run(main)
