"""Scenarios on a disk of their own, which `run` mounts where nobody else sees it. Each prints what it found, as JSON.

A scenario is a function that gets a directory on that disk. It runs in a process of its own, in a mount namespace.
"""

import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from nightshift import progress
from nightshift.disk import free_bytes
from nightshift.errors import DiskError, NightshiftError, StorageError, StorageFullError
from nightshift.local import supervisor
from nightshift.local.prefect import local_prefect
from nightshift.local.s3 import embedded_s3
from nightshift.records.keys import payload_key
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.storage.s3 import MIB, S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import eventually, small_config

PROGRAM = str(Path(sys.executable).with_name("nightshift"))
CAN_MOUNT = (
    shutil.which("unshare") is not None
    and subprocess.run(
        ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, check=False
    ).returncode
    == 0
)
needs_a_mount = pytest.mark.skipif(not CAN_MOUNT, reason="a small disk needs the right to mount one")


def run(scenario: str, where: Path, megabytes: int, **environment: str) -> Any:
    """What the scenario has found, on a disk of so many MB that goes away with it."""
    mount = f'mount -t tmpfs -o size={megabytes}m none "$0" && exec "$@"'
    where.mkdir(exist_ok=True)
    command = ["unshare", "--mount", "sh", "-c", mount, str(where)]
    done = subprocess.run(
        [*command, sys.executable, "-m", __name__, scenario, str(where)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def filled(disk: Path) -> Iterator[None]:
    """The disk is full: not even a byte more goes on it. At the end there is room again."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        _fill(filler.fileno())
        yield
    (disk / "filler").unlink()


def _fill(file: int) -> None:
    with suppress(OSError):
        while True:
            os.write(file, bytes(4096))


def nightshift(home: Path, *arguments: str) -> dict[str, Any]:
    """How a command ended, what it said, and how many seconds that took."""
    began = time.monotonic()
    environment = {**os.environ, "NIGHTSHIFT_HOME": str(home)}
    done = subprocess.run([PROGRAM, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    seconds = time.monotonic() - began
    return {"exit_code": done.returncode, "out": done.stdout, "err": done.stderr, "seconds": seconds}


def seconds_until_it_writes(store: S3) -> float:
    began = time.monotonic()

    def writes() -> bool:
        with suppress(StorageError):
            store.put("again", b"body")
            return store.get("again")[0] == b"body"
        return False

    eventually(writes)
    return time.monotonic() - began


def reads_and_gc(disk: Path) -> dict[str, Any]:
    """The disk of a running server fills up, and a database of the server's has met that."""
    home = disk / "home"
    found: dict[str, Any] = {}
    with embedded_s3(home) as store:
        impatient = S3(store._made_of[0].model_copy(update={"timeout_seconds": 2.0}), store._made_of[1], 1, home)
        for number in range(300):
            store.put(payload_key("gone", number, 1), b"body")
        with filled(disk):
            with suppress(StorageFullError):
                for number in range(100):  # to delete is to write to that database
                    impatient.delete(payload_key("gone", number, 1))
                raise AssertionError("its database has never met the full disk")
            for name, command in {
                "runs": ("runs",),
                "show": ("show", "missing"),
                "listed": ("gc", "--dry-run", "--older-than-hours", "0"),
                "deleted": ("gc", "--older-than-hours", "0"),
            }.items():
                found[name] = nightshift(home, *command, "--json")
        found["seconds"] = seconds_until_it_writes(store)
    return found


def training(disk: Path) -> dict[str, Any]:
    """The disk fills up while a run trains, until a checkpoint could not be stored."""
    home, full = disk / "home", ExitStack()
    warnings: list[str] = []

    class Told(progress.LogProgress):
        def warn(self, message: str) -> None:
            warnings.append(message)
            full.close()

    def fill_once(step: int) -> bool:
        if step == 15:
            full.enter_context(filled(disk))
        return False

    home.mkdir()
    (home / "datasets").symlink_to(os.environ["DATASETS"])
    dataset = DatasetRef.model_validate_json(os.environ["DATASET"])
    config = small_config(epochs=3, checkpoint_every_steps=2)
    with embedded_s3(home) as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=120)
        train_alone(workspace, "undisturbed", config, dataset)
        with progress.shown_by(Told()):
            train_alone(workspace, "disturbed", config, dataset, should_stop=fill_once)
        seconds_until_it_writes(store)  # its server may just be started anew
        payloads = [
            store.get(read_record(store, run)[0].checkpoints[-1].key)[0] for run in ("undisturbed", "disturbed")
        ]
    return {"sha256": [hashlib.sha256(payload).hexdigest() for payload in payloads], "warnings": warnings}


def not_running(disk: Path) -> dict[str, Any]:
    """The server does not run when its disk is full."""
    home = disk / "home"
    found: dict[str, Any] = {}
    with embedded_s3(home) as store:
        store.put("kept", b"body")
    eventually(lambda: not supervisor.running_facts(home / "s3"))
    with filled(disk):
        found["runs"] = nightshift(home, "runs")
        began = time.monotonic()
        with suppress(DiskError), embedded_s3(home):
            pass
        found["seconds"] = time.monotonic() - began
    with embedded_s3(home) as store:
        found["body"] = store.get("kept")[0].decode()
    return found


def submitting(disk: Path) -> dict[str, Any]:
    """The disk of the Prefect server is full."""
    home = disk / "home"
    with local_prefect(home) as (server, wait):
        wait()
        os.environ.update(server.environment)
        with filled(disk):
            return nightshift(home, "submit", "train-cifar")


def files_are_full(disk: Path) -> dict[str, Any]:
    """Less than one more of the server's files has room, and each that there is has its largest size."""
    home = disk / "home"
    found: dict[str, Any] = {}
    with embedded_s3(home) as store:
        while not (files := _files(home)) or min(files) < 64 * MIB:
            store.put(f"large/{secrets.token_hex(8)}", secrets.token_bytes(16 * MIB))
    eventually(lambda: not supervisor.running_facts(home / "s3"))
    left = free_bytes(disk) - 48 * MIB
    with open(disk / "filler", "wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, left)
    with embedded_s3(home) as store:
        store.put("key", b"body")
        found["body"] = store.get("key")[0].decode()
        found["runs"] = nightshift(home, "runs")
    found["largest"], found["free"] = max(_files(home)), free_bytes(disk)
    found["limit"] = shutil.disk_usage(disk).total / 100
    return found


def _files(home: Path) -> list[int]:
    """How large those files are in which the server keeps our objects."""
    return [path.stat().st_size for path in (home / "s3" / "data").glob("nightshift_*.dat")]


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    scenario.__name__: scenario for scenario in (reads_and_gc, training, not_running, submitting, files_are_full)
}

if __name__ == "__main__":
    try:
        print(json.dumps(SCENARIOS[sys.argv[1]](Path(sys.argv[2]))))
    except NightshiftError as error:
        sys.exit(f"{type(error).__name__}: {error}")
