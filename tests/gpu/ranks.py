"""Ranks: one on a GPU under NCCL, with all that several would have; and two on the CPU, whatever else there is."""

import itertools
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import FileStore  # type: ignore[attr-defined]

from nightshift.parallel.batch_norm import synchronized
from nightshift.parallel.ranks import JoinedRanks, averaging, joined
from nightshift.records.run import read_record
from tests.bits import state_sha256
from tests.gpu.bits import admit_networks
from tests.gpu.children import Child
from tests.gpu.stage import Figure, KeptStore, Stage, config_of, last_payload, made_up, train

_STEPS, _BATCH, _PATIENCE = 20, 64, 300
_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class _AsSeveral(JoinedRanks):
    """One rank, whose batch norms and gradients go through the collectives nevertheless."""

    breaks_at: int | None = None
    """The step in whose backward pass an error is raised, when some gradients are on their way."""

    def synchronized(self, model: nn.Module, device: torch.device) -> nn.Module:
        return synchronized(model, device)

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        steps = itertools.count(1)

        def fail(gradient: Tensor) -> None:
            if next(steps) == self.breaks_at:
                raise ValueError("an error amid a step")

        first = next(weight for weight in model.parameters() if weight.requires_grad)
        # The backward pass comes to it last.
        first.register_hook(fail)  # type: ignore[no-untyped-call]
        return averaging(model, device)


def one_rank(stage: Stage) -> Iterator[Figure]:
    """Batch norm and gradients through the collectives, compiled where there is a GPU; an error amid a step; an end."""
    started = time.monotonic()
    said = Child(_train_as_several, stage.home / "clean", None).result(_PATIENCE)
    yield Figure("one rank as one of several", f"{said}, {time.monotonic() - started:.1f} s with its end")
    started = time.monotonic()
    try:
        said = Child(_train_as_several, stage.home / "error", 7).result(_PATIENCE)
    except AssertionError as error:
        said = str(error).strip().splitlines()[-1]
    seconds = time.monotonic() - started
    yield Figure(
        "an error amid a step", f"{said}, ended after {seconds:.1f} s", said == "ValueError: an error amid a step"
    )


def _train_as_several(home: Path, breaks_at: int | None) -> str:
    home.mkdir()
    admit_networks(home)
    small = {"model.name": "tests.gpu.networks:Dropping", "compile": "off"}
    on_gpu = torch.cuda.is_available()
    config = config_of("speedrun", batch_size=_BATCH, epochs=1, **({"compile": "on"} if on_gpu else small))
    with _join(home, 0, 1) as ranks:
        several = _AsSeveral(control=ranks.control, breaks_at=breaks_at)
        record = train(home, KeptStore(home / "store"), "run", config, made_up(_BATCH * _STEPS), ranks=several)
        return f"step {record.step} through {distributed.get_backend_config()}"


def two_on_the_cpu(stage: Stage) -> Iterator[Figure]:
    """`device=cpu` with two ranks trains, on a machine with a GPU too."""
    home = stage.home / "two"
    home.mkdir()
    both = [Child(_train_on_the_cpu, home, rank) for rank in range(2)]
    for rank, child in enumerate(both):
        step, sha256 = child.result(_PATIENCE)
        yield Figure(f"rank {rank} of two on the CPU", f"step {step}, {sha256[:12]}", step == _STEPS)


def _train_on_the_cpu(home: Path, rank: int) -> tuple[int, str]:
    torch.set_num_threads(1)
    config = config_of(batch_size=_BATCH, epochs=1, precision="float32", **{"hardware.device": "cpu"})
    store = KeptStore(home / "store")
    with _join(home, rank, 2) as ranks:
        train(home, store, "run", config, made_up(_BATCH * _STEPS), ranks=ranks)
        ranks.any()  # until rank 0 has saved its last step
    return read_record(store, "run")[0].step, state_sha256(last_payload(store, "run"))


def _join(home: Path, rank: int, world_size: int) -> AbstractContextManager[JoinedRanks]:
    os.environ.update(RANK=f"{rank}", WORLD_SIZE=f"{world_size}", LOCAL_RANK=f"{rank}", GROUP_WORLD_SIZE="1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return joined(FileStore(str(home / "ranks"), world_size), _TIMEOUT)
