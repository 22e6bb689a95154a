"""DOC."""

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import deterministic

from nightshift import __version__
from nightshift.config.train import TrainConfig
from nightshift.errors import (
    ConfigError,
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_COMPILATION_STEPS = 2000
"""A training of so many steps takes minutes on a GPU, and a compilation half a one."""


def pick_device(config: TrainConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise ConfigError("device='cuda', but torch finds no GPU here. Allowed here are 'auto' and 'cpu'")
    return torch.device("cuda" if available and config.device != "cpu" else "cpu")


def pick_precision(config: TrainConfig, device: torch.device) -> str:
    """float32 or bfloat16. Where the hardware lacks bfloat16 it is emulated, many times slower than float32."""
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    return "bfloat16" if native else "float32"


def pick_compile(config: TrainConfig, device: torch.device, total_steps: int) -> str:
    """on or off. Compiled code is faster on a GPU only, and only many steps repay the compilation."""
    if config.compile != "auto":
        return config.compile
    return "on" if device.type == "cuda" and total_steps >= _COMPILATION_STEPS else "off"


def _keep_freed_memory() -> None:
    """Have glibc keep what is freed, for the next step needs it again, and the kernel hands it out page by page.

    Tensors of more than 32 MiB, the most mallopt(3) accepts, still go back.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, -1)


@contextmanager
def _numerics(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Deterministic algorithms for the time of a training, then whatever was set before."""
    before = torch.are_deterministic_algorithms_enabled()
    fill_before = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if config.deterministic and device.type == "cuda":
        # cuBLAS reads it once, when it is first used; without it deterministic mode refuses to multiply.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(config.deterministic)
    # Else each output is first filled with NaN, at 3 % of the speed, for models that read what they never wrote.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]


def describe_environment(device: torch.device, world_size: int = 1) -> dict[str, str]:
    """What decides bits besides config and data, and which code it was."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "world_size": str(world_size),
        "python": platform.python_version(),
        "code": _code_version(),
    }


def _code_version() -> str:
    """Nightshift's version, and the commit if it runs from a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{__version__}+{commit}" if commit else __version__
