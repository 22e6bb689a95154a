"""The checks of `nightshift doctor`: is everything there that a run needs? Each says what it found, or what to do."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from nightshift.errors import NightshiftError
from nightshift.local.prefect import POOL, chosen_server, online_workers
from nightshift.settings import Settings
from nightshift.text import masked
from nightshift.workspace import Workspace, open_workspace

_DISK_BYTES = 2e9
_CLOCK_SECONDS = 5.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
_SHARED_MEMORY_BYTES = 1e9
"""NCCL uses some tens of MB a pair of ranks; a container has 64 MB in all unless it is given more."""


@dataclass
class Check:
    """What was looked at, and what was found; passwords in it are masked."""

    name: str
    ok: bool
    detail: str

    def __post_init__(self) -> None:
        self.detail = masked(self.detail)


def examine(settings: Settings) -> list[Check]:
    """All checks, none of which raises."""
    return [
        *_storage(settings),
        *_prefect(settings),
        _device(),
        *_needs_of_gpus(torch.cuda.device_count()),
        _disk(settings),
    ]


def _storage(settings: Settings) -> list[Check]:
    try:
        with open_workspace(settings) as workspace:
            return [
                Check("storage", True, f"{workspace.store.url('')} at {workspace.store.endpoint}"),
                _try("conditional writes", lambda: _fencing(workspace)),
                _try("clock", lambda: _clock(workspace)),
            ]
    except (NightshiftError, OSError) as error:
        return [Check("storage", False, str(error))]


def _try(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except NightshiftError as error:
        return Check(name, False, str(error))


def _fencing(workspace: Workspace) -> Check:
    workspace.store.check_fencing()
    return Check("conditional writes", True, "honoured")


def _clock(workspace: Workspace) -> Check:
    ahead = (datetime.now(UTC) - workspace.store.now()).total_seconds()
    detail = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the storage server"
    return Check("clock", abs(ahead) < _CLOCK_SECONDS, detail)


def _prefect(settings: Settings) -> list[Check]:
    name, release = "Prefect", f"Prefect {version('prefect')}"
    try:
        server = chosen_server(settings.home)
        if not server:
            return [Check(name, True, f"{release}, no server configured: a local one is started when it is needed")]
        workers = online_workers(server)
    except NightshiftError as error:
        return [Check(name, False, str(error))]
    detail = (
        f"online: {', '.join(workers)}"
        if workers
        else f"none online in the work pool {POOL}. Start one: nightshift worker"
    )
    return [Check(name, True, f"{release}, server at {server.api_url}"), Check("worker", bool(workers), detail)]


def _device() -> Check:
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    detail = ", ".join(names) or f"no GPU, {torch.get_num_threads()} CPU threads"
    return Check("device", True, f"torch {torch.__version__}, {detail}")


def _needs_of_gpus(gpus: int) -> list[Check]:
    """What a machine with GPUs needs besides: nothing, if it has none."""
    checks = []
    if gpus:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        missing = "none found: torch.compile needs one (compile=on, auto). Install gcc, or set compile=off"
        checks.append(Check("compiler", compiler is not None, compiler or missing))
    if gpus > 1:
        size = shutil.disk_usage(_SHARED_MEMORY).total
        detail = f"{size / 1e9:.1f} GB in {_SHARED_MEMORY}"
        too_small = f"{detail}: too little for the ranks of {gpus} GPUs. Give the container more (--shm-size=8g)"
        is_enough = size >= _SHARED_MEMORY_BYTES
        checks.append(Check("shared memory", is_enough, detail if is_enough else too_small))
    return checks


def _disk(settings: Settings) -> Check:
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(settings.home).free
    except OSError as error:
        return Check("disk", False, f"{settings.home}: {error.strerror}. Set NIGHTSHIFT_HOME to another place")
    return Check("disk", free > _DISK_BYTES, f"{free / 1e9:.1f} GB free for {settings.home}")
