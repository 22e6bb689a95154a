"""Exact resume: whatever stops a run, and wherever, it ends with the same bits."""

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import eq
from pathlib import Path
from typing import Any

import pytest
import torch

from nightshift.checkpoints.payload import read_payload, read_weights
from nightshift.errors import ConfigError, TrainingDivergedError, TrainingInterrupted
from nightshift.records.run import read_record
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.storage.s3 import S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.conftest import small_config
from tests.forked import forked
from tests.train_part import Part, train_part

CONFIGS = {
    "quick": small_config("quick", batch_size=16, max_train_images=325),
    "tutorial": small_config("tutorial", max_train_images=630),
    "resnet18": small_config("resnet18", batch_size=4, max_train_images=82),
    "speedrun": small_config("speedrun", batch_size=16, max_train_images=320),
    "adamw with cosine": small_config(
        "quick",
        batch_size=8,
        max_train_images=165,
        optimizer="adamw",
        lr=0.002,
        schedule="cosine",
        precision="bfloat16",
    ),
}

# By default inside the first epoch, between the epochs and inside the second.
STOPS = {"resnet18": (27,), "speedrun": (14, 27)}  # the one is large; the other fixes a bias at step 15


@pytest.fixture(scope="module")
def processes() -> Iterator[ProcessPoolExecutor]:
    """Runs each call in a process of its own, forked from one that has torch imported already."""
    with ProcessPoolExecutor(1, mp_context=forked(), max_tasks_per_child=1) as pool:
        yield pool


@pytest.mark.parametrize(
    "name",
    [
        *("quick", "tutorial"),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("adamw with cosine", "resnet18", "speedrun")),
    ],
)
def test_a_run_stopped_again_and_again_ends_with_the_same_bits(
    name: str, processes: ProcessPoolExecutor, home: Path, server: S3, prefix: str, cifar10: DatasetRef
) -> None:
    def train(run_id: str, stop: int = -1) -> Part:
        return processes.submit(train_part, home, prefix, run_id, CONFIGS[name], cifar10, stop).result()

    whole = train("whole")
    assert (whole.step, whole.resumed_from_step) == (40, None)
    before = None
    for stop in STOPS.get(name, (1, 13, 20, 27)):
        part = train("parts", stop)
        assert (part.step, part.resumed_from_step, part.status) == (stop, before, "interrupted")
        before = stop
    end = train("parts")
    assert end.resumed_from_step == before
    assert end.weights_sha256 == whole.weights_sha256
    assert end.state_sha256 == whole.state_sha256


def test_what_is_tested_and_published_is_the_moving_average_of_the_weights(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    config = small_config("quick", ema_decay=0.5, max_train_images=64, epochs=3, keep_last=6)
    for step in range(1, 6):  # stopped after each, so that each is saved
        with pytest.raises(TrainingInterrupted):
            train_alone(workspace, "run", config, cifar10, should_stop=partial(eq, step))
    train_alone(workspace, "run", config, cifar10)
    stored = read_record(workspace.store, "run")[0].checkpoints
    first, *others = [read_payload(workspace.store, checkpoint)["model"] for checkpoint in stored]
    assert len(others) == 5
    averaged = read_weights(workspace.store, stored[-1])
    for name, mean in first.items():
        if mean.is_floating_point():  # not the counters of batch norm
            for weights in others:
                mean.lerp_(weights[name], 0.5)
            assert torch.equal(averaged[name], mean)


def final_state(workspace: Workspace, checkpoint: CheckpointRef) -> str:
    return state_sha256(read_payload(workspace.store, checkpoint))


def test_saving_often_does_not_change_the_result(workspace: Workspace, cifar10: DatasetRef) -> None:
    rare = final_state(workspace, train_alone(workspace, "rare", small_config(), cifar10))
    often = train_alone(workspace, "often", small_config(checkpoint_every_steps=1), cifar10)
    assert final_state(workspace, often) == rare


def test_while_it_trains_torch_is_deterministic_and_fills_no_memory_in_vain_and_is_then_as_it_was(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    def modes() -> tuple[bool, bool]:
        filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        return torch.are_deterministic_algorithms_enabled(), filled

    before, within = modes(), set()

    def look(step: int) -> bool:
        within.add(modes())
        return False

    train_alone(workspace, "run", small_config(epochs=1), cifar10, should_stop=look)
    assert within == {(True, False)} != {before}
    assert modes() == before


def test_another_seed_gives_another_result(workspace: Workspace, cifar10: DatasetRef) -> None:
    config = small_config(epochs=1)
    first = train_alone(workspace, "first", config, cifar10)
    second = train_alone(workspace, "second", config.override({"seed": 1}), cifar10)
    assert final_state(workspace, first) != final_state(workspace, second)


def test_a_run_stopped_and_resumed_in_one_process_ends_with_the_same_bits(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    whole = train_alone(workspace, "whole", small_config(), cifar10)
    with pytest.raises(TrainingInterrupted, match="nightshift resume parts"):
        train_alone(workspace, "parts", small_config(), cifar10, should_stop=lambda step: step == 7)
    parts = train_alone(workspace, "parts", small_config(), cifar10)
    assert final_state(workspace, parts) == final_state(workspace, whole)


def test_a_stop_at_the_last_step_is_no_interruption(workspace: Workspace, cifar10: DatasetRef) -> None:
    done = train_alone(workspace, "run", small_config(), cifar10, should_stop=lambda step: step == 40)
    assert done.step == 40


def test_a_run_killed_before_its_first_checkpoint_begins_anew(workspace: Workspace, cifar10: DatasetRef) -> None:
    config = small_config()

    def crash(step: int) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_alone(workspace, "run", config, cifar10, should_stop=crash)
    assert not read_record(workspace.store, "run")[0].checkpoints
    whole = train_alone(workspace, "whole", config, cifar10)
    again = train_alone(workspace, "run", config, cifar10)
    assert final_state(workspace, again) == final_state(workspace, whole)


def test_a_diverged_run_fails_with_advice_and_keeps_its_last_good_checkpoint(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    config = small_config(optimizer="sgd", lr=100, checkpoint_every_steps=1)
    with pytest.raises(
        TrainingDivergedError, match=r"lower the learning rate .* from before, if there are any, are kept"
    ):
        train_alone(workspace, "run", config, cifar10)
    record, _ = read_record(workspace.store, "run")
    assert record.status == "failed"
    payload = read_payload(workspace.store, record.checkpoints[-1])
    assert payload["ranks"][0]["epoch_loss"].isfinite()


def test_every_epoch_leaves_a_point_on_the_curve(workspace: Workspace, cifar10: DatasetRef) -> None:
    train_alone(workspace, "run", small_config(), cifar10)
    curve = read_record(workspace.store, "run")[0].curve
    assert [(point.epoch, point.step) for point in curve] == [(1, 20), (2, 40)]
    assert curve[1].loss < curve[0].loss


def test_an_unknown_model_is_refused_before_anything_is_recorded(workspace: Workspace, cifar10: DatasetRef) -> None:
    with pytest.raises(ConfigError, match="simple_cnn"):
        train_alone(workspace, "run", small_config(model="vgg"), cifar10)
    assert not list(workspace.store.list("runs/"))


@pytest.mark.parametrize("often", [{"checkpoint_every_seconds": 1e-6}, {"checkpoint_every_steps": 1}])
def test_every_boundary_is_saved_or_counted_as_skipped(
    workspace: Workspace, cifar10: DatasetRef, often: dict[str, Any]
) -> None:
    train_alone(workspace, "run", small_config(keep_last=100, **often), cifar10)
    saved = read_record(workspace.store, "run")[0].checkpoints
    # The last step is saved in any case: where its boundary had been skipped, it is counted twice.
    assert len(saved) + saved[-1].metrics.skipped in (40, 41)
