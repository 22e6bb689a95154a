"""SIGKILL of a trainer whose images are decoded ahead: the run ends with the same bits."""

import os
import random
import shutil
import signal
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from nightshift.data import parts
from nightshift.data.packed import pack_snapshot
from nightshift.local.s3 import embedded_s3
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.data.made import made
from tests.data.pictures import album, write
from tests.forked import forked
from tests.train_part import Part, train_part

CONFIG = small_config("quick", max_train_images=None, batch_size=16, epochs=4, checkpoint_every_steps=3, crop=0.6)
STEPS = 36
NEVER = STEPS + 1


def killed(home: Path, prefix: str, dataset: DatasetRef, at: int) -> None:
    """Train until a step, at which the process dies."""

    def strike(step: int) -> bool:
        if step >= at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    with embedded_s3(home, prefix) as store:
        train_alone(Workspace(store, home, 6, 60), "killed", CONFIG, dataset, should_stop=strike)


@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.soak)])
def test_a_run_on_encoded_images_that_is_killed_again_and_again_ends_with_the_same_bits(
    kills: int, workspace: Workspace, home: Path, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_IMAGES", 25)
    write(tmp_path, album(range(200), ("ant", "bee", "cow")))
    dataset = pack_snapshot(workspace, made(workspace.store, tmp_path, storage="encoded"))

    def whole_run(run_id: str) -> Part:
        with ProcessPoolExecutor(1, mp_context=forked()) as pool:
            return pool.submit(train_part, home, prefix, run_id, CONFIG, dataset, NEVER).result()

    whole, chance = whole_run("whole"), random.Random(0)
    assert whole.step == STEPS
    for number in range(kills):
        if not number % 2:  # the shards are fetched again
            shutil.rmtree(home / "shards")
        with pytest.raises(BrokenProcessPool), ProcessPoolExecutor(1, mp_context=forked()) as pool:
            pool.submit(killed, home, prefix, dataset, chance.randrange(4, STEPS)).result()
        if number % 10 == 9 or number == kills - 1:
            assert whole_run("killed").state_sha256 == whole.state_sha256
            assert read_record(workspace.store, "killed")[0].resumed_from_step
            for item in workspace.store.list("runs/killed"):
                workspace.store.delete(item.key)
