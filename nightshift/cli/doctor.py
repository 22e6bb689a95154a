"""The checks of `nightshift doctor`: is everything there that a run, and the coming night, needs?

Each says what it found, or what to do.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import httpx
import torch

from nightshift.cli.common import planned_deployments
from nightshift.disk import disk_is_full, free_bytes, is_full
from nightshift.errors import ModelNotFoundError, NightshiftError, PrefectServerError
from nightshift.local import supervisor
from nightshift.local.prefect import chosen_server, is_ours, online_workers
from nightshift.records import champions, nights, recovery
from nightshift.records.history import read_history
from nightshift.records.keys import MODELS, place_of
from nightshift.records.run import newest_records
from nightshift.records.versions import version_key
from nightshift.settings import Settings
from nightshift.text import masked
from nightshift.tracking import beside, mlflow
from nightshift.workspace import Workspace, open_workspace

_DISK_BYTES = 2e9
_FEW_NIGHTS = 14
_CLOCK_SECONDS = 5.0
_RECORDS = 50
_LOOKED_BACK, _RECOVERED_BY_THEN = timedelta(days=7), timedelta(hours=1)
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
                *_champions(workspace),
                _try("interrupted runs", lambda: _interrupted(workspace)),
                *_room(settings, workspace),
                *_mlflow(workspace),
            ]
    except (NightshiftError, OSError) as error:
        return [Check("storage", False, str(error))]


def _mlflow(workspace: Workspace) -> list[Check]:
    """Whether the MLflow server, if there is one, answers and knows our login."""
    if not workspace.mlflow.tracking_uri:
        return []

    def ask() -> Check:
        beside.told(mlflow.check, workspace.store, workspace.mlflow)
        return Check("MLflow", True, f"{workspace.mlflow.tracking_uri} answers")

    return [_try("MLflow", ask)]


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


def _champions(workspace: Workspace) -> list[Check]:
    """Whether the history of each model's champions can be read, and all files of the version that is live.

    The models are those that are published, and those that the newest records name.
    """
    published = {item.key.split("/")[1] for item in workspace.store.list(MODELS) if place_of(item.key)}
    trained = {record.dataset.name for record in islice(newest_records(workspace.store), _RECORDS)}
    names = sorted(published | trained)
    return [
        _try(f"champion of {name}", lambda: _champion(workspace, name))  # noqa: B023
        for name in names
    ]


def _champion(workspace: Workspace, name: str) -> Check:
    """Check a model's champion. What `records.champions` says of a missing or damaged history is shown as it is."""
    title, store = f"champion of {name}", workspace.store
    history = read_history(store, name)
    try:
        champion = champions.champion_of(store, history)
    except ModelNotFoundError:
        return Check(title, True, "none yet")
    card = champions.read_card_of(store, history, champion.version)
    for file_name, listed in card.files.items():
        key = f"{version_key(name, champion.version)}{file_name}"
        found = store.head(key)
        if not found or found.size != listed.bytes:
            there = f"has {found.size:,} bytes instead of {listed.bytes:,}" if found else "is not there"
            return Check(title, False, f"{store.url(key)} {there}: nightshift republish {champion.version}")
    return Check(title, True, f"{champion.version}, {champion.test_accuracy:.2%}")


def _interrupted(workspace: Workspace) -> Check:
    """Whether a run waits in vain for somebody to start it again."""
    title, now = "interrupted runs", workspace.store.now()
    found = recovery.find(workspace.store, _LOOKED_BACK).interrupted
    left = sorted(run.record.run_id for run in found if now - run.record.updated_at > _RECOVERED_BY_THEN)
    if not left:
        return Check(title, True, f"{len(found)}, all stopped less than an hour ago" if found else "none")
    return Check(
        title,
        False,
        f"stopped for more than an hour: {', '.join(left)}. nightshift show RUN says why, nightshift resume RUN goes "
        "on with it, nightshift delete RUN gives it up",
    )


def _room(settings: Settings, workspace: Workspace) -> list[Check]:
    """For how many more nights there is room in the local store, by what the last ones have taken."""
    if not settings.s3.embedded:
        return []
    title, directory = "room for nights", settings.home / "s3"
    if is_full(directory):
        return [Check(title, False, disk_is_full(directory))]
    sizes = nights.sizes(workspace.store)
    if not sizes:
        return [Check(title, True, "no run has finished yet, so there is nothing to reckon with")]
    mean = sum(sizes) / len(sizes)
    left = int(free_bytes(directory) / mean)
    detail = f"{left:,} more at {mean / 1e6:,.1f} MB each (the mean of the last {len(sizes)})"
    too_few = f"{detail}: make room on the disk of {directory}, or see the runbook, docs/runbook.md"
    return [Check(title, left >= _FEW_NIGHTS, detail if left >= _FEW_NIGHTS else too_few)]


def _prefect(settings: Settings) -> list[Check]:
    name, release, server = "Prefect", f"Prefect {version('prefect')}", None
    directory, is_of_up = settings.home / "prefect", False
    try:
        server = chosen_server(settings.home)
        if not server:
            return [
                Check(
                    name,
                    True,
                    f"{release}, no server configured: a local one is started when it is needed. Nothing starts at "
                    "night until you type `nightshift up`, or set PREFECT_API_URL",
                )
            ]
        checks = [Check(name, True, f"{release}, server at {server.api_url}")]
        is_of_up = supervisor.is_kept(directory) and is_ours(settings.home, server.api_url)
        online_workers(server)  # says in a sentence what is wrong with a server that is none
        from deployments import tonight

        found = tonight.examine(
            server, planned_deployments(settings), "nightshift up" if is_of_up else "nightshift deploy"
        )
        return [*checks, *(Check(entry.name, entry.ok, entry.detail) for entry in found)]
    except PrefectServerError as error:
        kept = f"{error}. `nightshift up` keeps it running: look at {directory / 'server.log'} if it stays so"
        return [Check(name, False, kept if is_of_up else str(error))]
    except NightshiftError as error:
        return [Check(name, False, str(error))]
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        return [Check(name, False, f"{server and server.api_url} does not answer as a Prefect server does: {error}")]


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
    detail = f"{free / 1e9:.1f} GB free for {settings.home}"
    return Check("disk", free > _DISK_BYTES, detail if free > _DISK_BYTES else f"{detail}: make room there")
