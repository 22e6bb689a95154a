"""The checks of `nightshift doctor`: is everything there that a run needs? Each says what it found, or what to do."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version

import torch

from nightshift.errors import NightshiftError
from nightshift.local.prefect import POOL, online_workers, server_url
from nightshift.settings import Settings
from nightshift.workspace import Workspace, open_workspace

_DISK_BYTES = 2e9
_CLOCK_SECONDS = 5.0


@dataclass
class Check:
    name: str
    ok: bool
    detail: str


def examine(settings: Settings) -> list[Check]:
    """All checks, none of which raises."""
    return [*_storage(settings), *_prefect(settings), _device(), _disk(settings)]


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
    api_url = server_url(settings.home)
    if not api_url:
        return [Check(name, True, f"{release}, no server configured: a local one is started when it is needed")]
    try:
        workers = online_workers(api_url)
    except (OSError, ValueError) as error:
        return [Check(name, False, f"{api_url} does not answer ({error}): start it, or correct PREFECT_API_URL")]
    detail = (
        f"online: {', '.join(workers)}"
        if workers
        else f"none online in the work pool {POOL}. Start one: nightshift worker"
    )
    return [Check(name, True, f"{release}, server at {api_url}"), Check("worker", bool(workers), detail)]


def _device() -> Check:
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    detail = ", ".join(names) or f"no GPU, {torch.get_num_threads()} CPU threads"
    return Check("device", True, f"torch {torch.__version__}, {detail}")


def _disk(settings: Settings) -> Check:
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(settings.home).free
    except OSError as error:
        return Check("disk", False, f"{settings.home}: {error.strerror}. Set NIGHTSHIFT_HOME to another place")
    return Check("disk", free > _DISK_BYTES, f"{free / 1e9:.1f} GB free for {settings.home}")
