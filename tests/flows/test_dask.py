"""Reading a snapshot on a Dask cluster: as on one machine, and with a worker lost on the way."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from prefect import flow
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.dask import on_dask
from nightshift.data import parts
from nightshift.data.snapshot import make_snapshot
from nightshift.local.prefect import PrefectServer
from nightshift.refs import SnapshotRef
from nightshift.workspace import Workspace
from tasks.snapshot import snapshot
from tests.conftest import eventually
from tests.data.pictures import album, config, write

IMAGES, PART = 400, 20


@flow(validate_parameters=False)
def night(workspace: Any, root: Any, scheduler: str) -> SnapshotRef:
    return snapshot(workspace, "photos", config(root), on_dask(scheduler))


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalCluster]:
    import dask

    # A worker starts processes that decode, which one that is a daemon may not.
    with (
        dask.config.set({"distributed.worker.daemon": False}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,  # type: ignore[no-untyped-call]
    ):
        yield cluster


@pytest.mark.soak
def test_a_snapshot_read_on_a_cluster_that_loses_a_worker_is_the_one_that_this_machine_makes(
    workspace: Workspace,
    tmp_path: Path,
    cluster: LocalCluster,
    prefect_server: PrefectServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "photos"
    write(root, album(range(IMAGES)))
    monkeypatch.setattr(parts, "_IMAGES", PART)
    worker = next(iter(cluster.workers.values())).pid
    lost: list[int] = []

    def lose_a_worker() -> None:
        eventually(lambda: bool(list(workspace.store.list("datasets/photos/parts/"))))
        os.kill(worker, signal.SIGKILL)
        lost.append(worker)

    killer = threading.Thread(target=lose_a_worker)
    killer.start()
    with temporary_settings(
        {
            PREFECT_API_URL: prefect_server.api_url,
            PREFECT_API_AUTH_STRING: prefect_server.environment["PREFECT_API_AUTH_STRING"],
        }
    ):
        made = night(workspace, root, cluster.scheduler_address)
    killer.join()
    assert lost
    assert made.read == IMAGES
    assert made.digest == make_snapshot(workspace.store, "alone", config(root)).digest
