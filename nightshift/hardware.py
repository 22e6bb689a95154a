"""What a run computes on, and how: device, precision, compilation, numerics. Resolved once and passed on."""

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.utils import deterministic

from nightshift import __version__
from nightshift.config.sections import HardwareConfig
from nightshift.errors import ConfigError, DeviceError

_COMPILATION_STEPS = 2000
"""A run of this many steps takes minutes on a GPU; a compilation takes half a minute."""
_MOST_SHAPES = 64
"""How often a network may be compiled: for each size of a batch, and again where weights or statistics are frozen."""
_WARN, _ERROR = 1, 2  # of torch.set_deterministic_debug_mode
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

# cuBLAS reads it once, at the process' first multiplication; without it deterministic mode refuses to multiply.
# At the start of a training it would come too late in a process that has evaluated or predicted before.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def find_device(choice: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """The device that a config's `hardware.device` means on this machine.

    Raises:
        ConfigError: the config asks for a GPU, and there is none.
    """
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ConfigError("device='cuda', but torch finds no GPU here. Allowed here are 'auto' and 'cpu'")
    return torch.device("cuda" if available and choice != "cpu" else "cpu")


@contextmanager
def failures_explained(device: torch.device) -> Iterator[None]:
    """Turn a device failure into an error that a new process may recover from; this process' context is lost.

    Raises:
        DeviceError: for torch's OutOfMemoryError and AcceleratorError.
        ConfigError: a network does what the device can only do with another result each time.
    """
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        raise DeviceError(f"{device} has failed: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        what, refused, _ = str(error).partition(" does not have a deterministic implementation")
        if not refused:
            raise
        raise ConfigError(
            f"{what} of the network has no deterministic implementation on {device}: choose another network, or set "
            "hardware.deterministic=false, with which no two trainings have the same bits"
        ) from error


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are."""
    return next(network.parameters()).device


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. A copy to a GPU is queued, and the caller does not wait for it.

    From unpinned memory, the copy would block until the GPU has done everything queued before it.
    """
    if device.type == "cuda" and tensor.is_cpu:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=tensor.is_cpu)  # a copy to the CPU must be complete when it is read


def ranks_here(config: HardwareConfig) -> int:
    """How many ranks this machine is to have; auto: one per GPU, and one without GPUs.

    Raises:
        ConfigError: more than there are GPUs to compute on, or no GPU where one is asked for.
    """
    gpus = torch.cuda.device_count() if find_device(config.device).type == "cuda" else None
    if config.nproc_per_node == "auto":
        return max(gpus or 1, 1)
    if gpus is not None and config.nproc_per_node > gpus:
        raise ConfigError(
            f"nproc_per_node={config.nproc_per_node}, but this machine has {gpus} GPU{'s' if gpus > 1 else ''}: each "
            "rank needs one of its own. Set nproc_per_node=auto, or device=cpu; for a stored run: "
            "nightshift resume RUN --set nproc_per_node=auto"
        )
    return config.nproc_per_node


@dataclass(frozen=True)
class Hardware:
    """What a config asks of the hardware, with every `auto` decided."""

    device: torch.device
    precision: Literal["float32", "bfloat16"]
    compiled: bool
    deterministic: bool

    @classmethod
    def resolve(cls, config: HardwareConfig, total_steps: int) -> Self:
        """Decide for this machine and a run of `total_steps` steps.

        Raises:
            ConfigError: the config asks for a GPU, and there is none.
        """
        device = find_device(config.device)
        # Compiled code is faster only on a GPU, and only many steps repay the compilation.
        repaid = device.type == "cuda" and total_steps >= _COMPILATION_STEPS
        return cls(
            device=device,
            precision=native_precision(device) if config.precision == "auto" else config.precision,
            compiled=repaid if config.compile == "auto" else config.compile == "on",
            deterministic=config.deterministic,
        )

    def compile(self, model: nn.Module) -> nn.Module:
        """The network as it is to be called while it trains: compiled, if that is asked for.

        Each size of a batch has code of its own. By default torch makes code for all sizes when it sees a second one,
        and that code gives other bits: those of a step would depend on the steps that this process has done before it.

        Code rounds where autocast does. By default it leaves out what no kernel writes to memory. Then a backward pass
        looks in vain for the maximum that the forward pass has rounded, and divides by the none that it found.
        """
        if not self.compiled:
            return model
        # What earlier trainings of this process have compiled counts too, and past the limit torch no longer compiles.
        torch.compiler.reset()
        torch._dynamo.config.recompile_limit = _MOST_SHAPES
        return torch.compile(model, dynamic=False, options={"emulate_precision_casts": True})  # type: ignore[return-value]

    def autocast(self) -> AbstractContextManager[None]:
        """The context for the forward pass and the loss."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16")

    @contextmanager
    def numerics(self) -> Iterator[None]:
        """Make algorithms deterministic while training, if the config says so, then restore what was set before."""
        if self.device.type == "cpu":
            _keep_freed_memory()
        before = torch.get_deterministic_debug_mode()
        fill_before = deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        self._refuse_chance(_ERROR if self.deterministic else 0)
        # Otherwise torch first fills each output with NaN, for models that read what they never wrote: 3 % slower.
        deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:
            yield
        finally:
            self._refuse_chance(before)
            deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]

    def _refuse_chance(self, mode: int) -> None:
        if self.compiled:  # the compiler is told only by this, which takes seconds to import it
            torch.use_deterministic_algorithms(mode > 0, warn_only=mode == _WARN)
        else:
            torch.set_deterministic_debug_mode(mode)

    def describe(self, world_size: int = 1) -> dict[str, str]:
        """What decides the bits besides config and data, and the code's version; for the run record."""
        return {
            "device": _device_name(self.device),
            "torch": torch.__version__,
            "threads": str(torch.get_num_threads()),
            "world_size": str(world_size),
            "python": platform.python_version(),
            "code": code_version(),
            "precision": self.precision,
            "compile": "on" if self.compiled else "off",
        }


def code_version() -> str:
    """Nightshift's version, and the commit if it runs from a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        commit = ""
    return f"{__version__}+{commit}" if commit else __version__


def native_precision(device: torch.device) -> Literal["float32", "bfloat16"]:
    """bfloat16 where the hardware has it. Elsewhere it is emulated, many times slower than float32."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        found = torch.cpu.get_capabilities()
        native = found.get("avx512_bf16", False) or found.get("amx_bf16", False)
    return "bfloat16" if native else "float32"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}"


def _keep_freed_memory() -> None:
    """Make glibc keep freed memory: the next step needs it again, and the kernel hands memory out page by page.

    Tensors of more than 32 MiB, the limit that mallopt(3) accepts, are still given back to the kernel.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, -1)
