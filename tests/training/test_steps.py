"""A step is forward, backward and update on the batch that the config says, whatever it is computed in."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import build_model
from nightshift.checkpoints.payload import read_payload, weights_sha256
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import open_dataset
from nightshift.errors import ConfigError
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.training.optimizers import build_optimizer
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.made_up import config_of, in_memory, known, whole_and_in_parts
from tests.training.kinds import BINARY, KINDS


@pytest.fixture
def here(tmp_path: Path) -> Workspace:
    return in_memory(tmp_path)


def by_hand(workspace: Workspace, config: TrainConfig, ref: DatasetRef, parts: int) -> dict[str, Tensor]:
    """The weights after a plain loop, which adds the gradients of so many parts of each batch."""
    dataset = open_dataset(workspace, ref)
    plan = batches.make_plan(config, dataset)
    scale, shift = batches.normalizer(dataset, config)
    torch.manual_seed(config.seed)
    model = build_model(config.model.name, ref.classes, ref.image_size).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, config.optimizer)
    torch.manual_seed(config.seed)
    for step in range(plan.total_steps):
        images, labels = batches.training_batch(dataset, config, plan, step)
        optimizer.zero_grad()
        for part, answers in zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True):
            loss = F.cross_entropy(model(batches.to_input(part, scale, shift)), answers)
            (loss * (len(part) / len(images)) if parts > 1 else loss).backward()  # type: ignore[no-untyped-call]
        if config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
        optimizer.step()
    return model.state_dict()


PLAIN: dict[str, Any] = {"model": "simple_cnn", "optimizer": "adam", "lr": 0.001, "schedule": "constant"} | {
    "label_smoothing": 0,
    "ema_decay": 0,
    "precision": "float32",
}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({}, 1),
        ({"accumulate": 1}, 1),
        ({"accumulate": 3}, 3),
        ({"clip_norm": 0.5}, 1),
        ({"accumulate": 3, "clip_norm": 0.5}, 3),
    ],
)
def test_a_step_takes_bit_for_bit_the_weights_where_a_plain_loop_takes_them(
    here: Workspace, overrides: dict[str, Any], parts: int
) -> None:
    dataset = known(here, 32, 3)
    config = config_of(**PLAIN, **overrides)
    last = train_alone(here, "run", config, dataset)
    found = read_payload(here.store, last)["model"]
    assert weights_sha256(found) == weights_sha256(by_hand(here, config, dataset, parts))


def losses(workspace: Workspace, config: TrainConfig, dataset: DatasetRef, run_id: str) -> list[float]:
    train_alone(workspace, run_id, config, dataset)
    return [point.loss for point in read_record(workspace.store, run_id)[0].curve]


def test_a_batch_in_parts_has_the_losses_of_the_whole_within_rounding(here: Workspace) -> None:
    dataset = known(here, 32, 3, train=97)  # the last batch has one image, fewer than there are parts
    config = config_of(**{**PLAIN, "optimizer": "sgd", "drop_last": False, "class_weights": "balanced", "mixup": 0.2})
    whole = losses(here, config, dataset, "whole")
    assert losses(here, config.override({"accumulate": 5}), dataset, "parts") == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "binary"])
def test_a_run_stopped_and_resumed_within_an_epoch_ends_with_the_same_bits(kind: str, here: Workspace) -> None:
    dataset = known(here, 16, 2 if kind == "binary" else 4, train=40)
    config = config_of(**KINDS.get(kind, BINARY), epochs=2, drop_last=False, checkpoint_every_steps=2)
    whole, parts = whole_and_in_parts(here, config, dataset, (1, 4))  # an epoch has three steps
    ends = [state_sha256(read_payload(here.store, end)) for end in (whole, parts)]
    assert whole.step == parts.step == 6
    assert ends[0] == ends[1]
    curves = [read_record(here.store, run_id)[0].curve for run_id in ("whole", "parts")]
    assert curves[0] == curves[1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, list[float]]]:
    """The bits and the losses of a training on so many classes with these overrides."""

    @functools.cache
    def train(classes: int, **overrides: Any) -> tuple[str, list[float]]:
        here = in_memory(tmp_path_factory.mktemp("trained"))
        last = train_alone(here, "run", config_of(**overrides, epochs=4), known(here, 16, classes, train=64))
        curve = read_record(here.store, "run")[0].curve
        return state_sha256(read_payload(here.store, last)), [point.loss for point in curve]

    return train


@pytest.mark.parametrize("kind", [*KINDS, "binary"])
def test_each_kind_of_training_changes_the_bits_and_none_keeps_a_network_from_learning(
    kind: str, trained: Callable[..., tuple[str, list[float]]]
) -> None:
    classes = 2 if kind == "binary" else 4
    bits, curve = trained(classes, **KINDS.get(kind, BINARY))
    assert bits != trained(classes)[0]
    assert curve[-1] < curve[0]


def test_a_loss_for_two_classes_is_refused_before_anything_is_recorded(here: Workspace) -> None:
    dataset = known(here, 16, 3)
    with pytest.raises(ConfigError, match=r"binary is for two classes, and made-up has 3: set loss.name=cross_entropy"):
        train_alone(here, "run", config_of(loss="binary"), dataset)
    assert not list(here.store.list("runs/"))
