"""What a GPU's machine has to have, and what nightshift says where it asks for more."""

import shutil
import subprocess
from collections.abc import Iterator
from unittest import mock

import torch

from nightshift.errors import ConfigError
from nightshift.hardware import ranks_here
from tests.gpu.ranks import two_on_the_cpu
from tests.gpu.stage import Figure, Stage, config_of

_SHM_BYTES = 1e9


def preflight(stage: Stage) -> Iterator[Figure]:
    """Driver, compiler, /dev/shm; more ranks than GPUs is one clear error; two ranks train on the CPU."""
    yield Figure("torch", torch.__version__)
    shm = shutil.disk_usage("/dev/shm").total  # where NCCL and loaders share memory
    yield Figure("/dev/shm, GB", shm / 1e9, shm >= _SHM_BYTES)
    yield Figure(
        "compiler", shutil.which("cc") or "none: hardware.compile=on needs one", shutil.which("cc") is not None
    )
    for gpus in sorted({1, max(1, torch.cuda.device_count())}):
        yield _too_many_ranks(gpus)
    yield from two_on_the_cpu(stage)


def card(stage: Stage) -> Iterator[Figure]:
    """The GPU, its driver, and whether it computes and what is compiled for it."""
    device = stage.gpu()
    properties = torch.cuda.get_device_properties(device)
    yield Figure("card", properties.name)
    yield Figure("memory, GB", properties.total_memory / 1e9)
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    if shutil.which(ask[0]):
        yield Figure("driver", subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip())
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    yield Figure("CUDA, NCCL", f"{torch.version.cuda}, {'.'.join(map(str, nccl))}")
    yield Figure("bfloat16", str(torch.cuda.is_bf16_supported(including_emulation=False)))
    numbers = torch.arange(1000.0, device=device)
    compiled = torch.compile(lambda x: (x * 2 + 1).sum())
    yield Figure("compiled sum", compiled(numbers).item(), compiled(numbers).item() == 1_000_000.0)


def _too_many_ranks(gpus: int) -> Figure:
    name = f"{gpus + 1} ranks on a machine with {gpus}"
    config = config_of(nproc_per_node=gpus + 1, **{"hardware.device": "cuda"}).hardware
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=gpus),
    ):
        try:
            ranks_here(config)
        except ConfigError as error:
            return Figure(name, str(error).partition(":")[0], f"has {gpus} GPU" in str(error))
    return Figure(name, "not refused", holds=False)
