"""A night on a real worker that is interrupted five times: where its time went, and what of it was lost."""

import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from nightshift import processes
from nightshift.judging.goodput import account
from nightshift.tracking.metrics import read_lines
from tests.conftest import eventually
from tests.deployments.server.conftest import Training

# Each of its training steps is a byte of a file, whatever becomes of the process that did it.
COUNTED = """
import os
from pathlib import Path

import torch
from torch import Tensor, nn

STEPS = os.open(Path(__file__).with_name("steps"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)


class Counted(nn.Module):
    def __init__(self, num_classes: int, image_size: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU())
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) == 64:  # before the first step it is tried with fewer
            os.write(STEPS, b".")
        return self.head(self.features(images).mean((2, 3)))
"""
CONFIG = {
    "model": "counted:Counted",
    "max_train_images": 6400,
    "batch_size": 64,
    "epochs": 30,
    "checkpoint_every_steps": 4,
}
STEPS = 3000
BLOWS = (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGTERM, signal.SIGKILL)
PAUSE = 20
"""Seconds after which the automation starts a run again."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "nightshift.toml").write_text('plugins = ["counted"]\n')
    (folder / "counted.py").write_text(COUNTED)
    return folder


@pytest.mark.soak
def test_the_parts_of_a_night_with_five_interruptions_are_its_wall_time_and_hardly_a_step_is_wasted(
    train: Callable[..., Training], directory: Path
) -> None:
    def done() -> int:
        return (directory / "steps").stat().st_size

    begun = time.time()
    night = train("night", CONFIG)
    wasted = [0]
    for number, blow in enumerate(BLOWS, 1):
        eventually(lambda: done() >= number * STEPS // 6)  # noqa: B023
        process = night.record.lease.process
        night.kill(blow)
        eventually(lambda: processes.state_of(process) == "dead")  # noqa: B023
        wasted.append(done() - night.record.step)
        if blow == signal.SIGTERM:
            assert wasted[-1] == wasted[-2], "what is told to stop saves its last step"
    eventually(night.has_ended)
    wall = time.time() - begun

    record = night.record
    assert (record.status, record.step, len(record.attempts)) == ("finished", STEPS, 6)
    assert done() - STEPS == wasted[-1]
    assert wasted[-1] < 0.01 * STEPS
    found = account(record, read_lines(night.workspace.store, "night"))
    assert found
    assert found.wall == pytest.approx(wall, rel=0.02)
    assert sum(asdict(found.parts).values()) == pytest.approx(wall, rel=0.02)
    assert found.parts.waiting > 2 * PAUSE  # what was killed, its worker has started again at once
    assert found.goodput * found.wall <= found.parts.training
