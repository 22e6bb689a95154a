"""A store that goes away for longer than a lease: the flow run waits for it, and goes on where it stopped."""

import os
import signal
import time
from pathlib import Path

import pytest
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import TerminationSignal
from prefect.states import Failed

from nightshift.errors import (
    ConfigError,
    LeaseExpiredError,
    LeaseLostError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageUnreachableError,
)
from nightshift.local.prefect import PrefectServer
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from tasks import interruptible, worth_another_try
from tasks.train import train
from tests.commands import Command

ARGUMENTS = ("train", "--recipe=tutorial", "--set=max_train_images=6400", "--set=epochs=8", "--json", "--run-id")
LEASE_SECONDS = 6


@pytest.mark.soak
def test_a_store_that_is_silent_for_longer_than_the_lease_is_waited_for_by_the_same_flow_run(
    tmp_path: Path, home: Path, prefect_server: PrefectServer, cifar10: DatasetRef
) -> None:
    (tmp_path / "datasets").symlink_to(home / "datasets")
    environment = {"NIGHTSHIFT_HOME": str(tmp_path), **prefect_server.environment}
    environment["NIGHTSHIFT_LEASE_SECONDS"] = str(LEASE_SECONDS)
    with embedded_s3(tmp_path) as store:
        whole = Command((*ARGUMENTS, "whole"), environment, tmp_path).finish()

        server = int((tmp_path / "s3" / "server.pid").read_text().split()[2])
        silenced = Command((*ARGUMENTS, "silenced"), environment, tmp_path)
        silenced.wait_for_line("epoch 1/8")
        os.kill(server, signal.SIGSTOP)
        try:
            time.sleep(2 * LEASE_SECONDS)  # how long it is silent is the point
        finally:
            os.kill(server, signal.SIGCONT)
        silenced.wait_for_line("could not be renewed and may be taken over")
        done = silenced.finish()
        record, _ = read_record(store, "silenced")

    assert done.exit_code == 0, done.err
    assert done.json["weights_sha256"] == whole.json["weights_sha256"]
    assert [event.what for event in record.events] == ["started", "interrupted", "resumed", "finished"]
    assert "could not be renewed" in record.events[1].detail


@pytest.mark.parametrize(
    ("error", "tries", "again"),
    [
        (LeaseExpiredError("silent"), 30, True),
        (StorageFullError("full"), 30, True),
        (StorageUnreachableError("away"), 30, True),
        (StorageError("odd"), 2, True),
        (StorageError("odd"), 3, False),
        (StorageDeniedError("refused"), 1, False),
        (ConfigError("wrong"), 1, False),
    ],
)
def test_only_a_store_that_is_away_or_full_is_waited_for(error: Exception, tries: int, again: bool) -> None:
    run = TaskRun(task_key="train", dynamic_key="0", run_count=tries)
    assert worth_another_try(train, run, Failed(data=error)) is again


def test_a_lease_that_ran_out_is_tried_again_and_one_that_another_has_taken_is_not() -> None:
    with pytest.raises(LeaseExpiredError), interruptible():
        raise LeaseExpiredError("silent")
    with pytest.raises(TerminationSignal), interruptible():
        raise LeaseLostError("taken over")
