"""Fine-tuning: the head is trained first, then all, the first layers slowest; a function of the step, so it resumes."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models import build_model
from nightshift.checkpoints.payload import read_payload, read_weights
from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import open_dataset
from nightshift.data.names import check_names
from nightshift.errors import ConfigError, TrainingInterrupted
from nightshift.networks import head_of, statistics_of
from nightshift.training.layers import freeze_statistics
from nightshift.training.optimizers import apply_schedule, build_optimizer, learning_rate
from nightshift.training.ranks import ALONE
from nightshift.training.run import train_alone
from nightshift.training.state import build_state, optimizer_of
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.made_up import in_memory, known, made_up


def tuned(**more: Any) -> TrainConfig:
    """The recipe on a network and images that are small."""
    base = {"model": "resnet18", "dataset": "made-up", "start": "scratch", "normalization": "dataset", "epochs": 3}
    small = {"batch_size": 8, "max_train_images": 16, "precision": "float32", "checkpoint_every_seconds": None}
    return make_config("finetune", {**base, **small, **more})


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("quick_cnn", {"head.weight"}),
        ("torchvision:resnet18", {"fc.weight", "fc.bias"}),
        ("torchvision:squeezenet1_1", {"classifier.1.weight", "classifier.1.bias"}),
        ("timm:convnext_atto", {"head.fc.weight", "head.fc.bias"}),
    ],
)
def test_the_head_is_what_is_as_large_as_the_number_of_classes(name: str, head: set[str]) -> None:
    before = torch.get_rng_state()
    assert set(head_of(name, 5, 32)) == head
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["resnet18", "torchvision:vit_b_32", "timm:convnext_atto"])
def test_rates_rise_from_the_first_layer_to_the_head_and_each_parameter_has_one(name: str) -> None:
    model, config = build_model(name, 5, 32), tuned(model=name)
    groups = optimizer_of(model, config, 5, 32).param_groups
    scales = [group["scale"] for group in groups]
    assert scales == sorted(scales)
    assert (scales[0], scales[-1]) == (pytest.approx(config.optimizer.layer_decay), 1)
    assert len(groups) <= 13
    first = next(
        number for number, group in enumerate(groups) if any(p is next(model.parameters()) for p in group["params"])
    )
    assert (first, [group["backbone"] for group in groups[-2:]]) == (0, [True, False])
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(map(id, model.parameters()))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(4, 3), nn.Linear(4, 4)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": self.parameters(), "scale": 0.5}]


def test_groups_of_the_networks_own_keep_their_rates_and_are_divided_for_the_frozen_epochs() -> None:
    groups = build_optimizer(Own(), tuned().optimizer, {"head.weight", "head.bias"}).param_groups
    assert [(group["scale"], group["backbone"], len(group["params"])) for group in groups] == [
        (0.5, True, 2),
        (0.5, False, 2),
    ]


def test_a_network_without_a_head_is_told() -> None:
    with pytest.raises(ConfigError, match="has no last layer that is as large as the number of classes"):
        build_optimizer(nn.Linear(2, 2), tuned().optimizer, set())


def test_the_backbone_and_its_batch_norm_stand_still_in_the_frozen_epochs_and_then_have_a_warm_up_of_their_own() -> (
    None
):
    config, total = tuned(epochs=4, warmup=0.5), 16
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))
    optimizer = build_optimizer(model, config.optimizer, {"3.weight", "3.bias"})
    moved = []
    for step in range(8):
        before = [value.clone() for value in model.state_dict().values()]
        apply_schedule(optimizer, config, step, total)
        freeze_statistics(model, step < 4)
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).logsumexp(1).sum().backward()
        optimizer.step()
        after = model.state_dict().values()
        moved.append([not torch.equal(old, new) for old, new in zip(before, after, strict=True)])
        if step == 4:
            assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * learning_rate(config, 0, 12))
    assert moved[:4] == [[False] * 7 + [True] * 2] * 4
    assert moved[4:] == [[True] * 9] * 4


def test_a_warm_up_rises_straight_and_then_comes_the_schedule() -> None:
    rates = [learning_rate(tuned(warmup=0.2, lr=1.0), step, 100) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 0.5) / 20 for step in range(20)])
    assert rates[20:] == pytest.approx([learning_rate(tuned(warmup=0.0, lr=1.0), step, 80) for step in range(80)])


def test_a_fine_tuning_stopped_in_and_after_the_frozen_epochs_ends_with_the_same_bits(tmp_path: Path) -> None:
    workspace = in_memory(tmp_path)
    ref, config = known(workspace, 16, 3, train=16), tuned(model="quick_cnn")

    def end_of(run_id: str) -> str:
        return state_sha256(read_payload(workspace.store, train_alone(workspace, run_id, config, ref)))

    whole = end_of("whole")
    for stop in (1, 2, 3):  # there are two steps an epoch
        stopped_at(workspace, config, ref, stop)
    assert end_of("parts") == whole


def test_a_fine_tuning_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """The same rates, frozen layers, statistics and decay: only the rounding differs."""
    workspace = in_memory(tmp_path)
    ref, config = known(workspace, 16, 3, train=32), tuned(max_train_images=32, warmup=0.3)
    dataset = open_dataset(workspace, ref)
    model = build_state(config, dataset, torch.device("cpu"), ALONE, lambda check: None).model
    head = list(model.fc.parameters())  # type: ignore[union-attr]
    layers = [layer for layer in model.modules() if layer is not model.fc and [*layer.parameters(recurse=False)]]
    rate, decay = config.optimizer.lr, config.optimizer.layer_decay
    scales = [decay ** (1 - at * 12 // len(layers) / 12) for at in range(len(layers))]
    groups = [{"params": [*layer.parameters(recurse=False)]} for layer in layers]
    optimizer = torch.optim.AdamW([*groups, {"params": head}], weight_decay=config.optimizer.weight_decay)
    plan = batches.make_plan(config, dataset)
    total, frozen = plan.total_steps, plan.steps_per_epoch

    def share(step: int, total: int) -> float:
        done, warmup = (step + 0.5) / total, config.schedule.warmup
        return done / warmup if done < warmup else (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2

    for step in range(total):
        model.requires_grad_(step >= frozen).train(step >= frozen)
        model.fc.requires_grad_(True)
        for group, scale in zip(optimizer.param_groups, [*scales, None], strict=True):
            group["lr"] = rate * (scale * share(step - frozen, total - frozen) if scale else share(step, total))
        images, labels = batches.training_batch(dataset, config, plan, step, slice(None))
        inputs = batches.to_input(images, *batches.normalizer(dataset, config))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels, label_smoothing=config.loss.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    ours = read_weights(workspace.store, train_alone(workspace, "run", config, ref))
    for name, theirs in model.state_dict().items():
        assert torch.allclose(ours[name].float(), theirs.float(), rtol=1e-3, atol=1e-5), name


def stopped_at(workspace: Workspace, config: TrainConfig, ref: Any, stop: int) -> None:
    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, "parts", config, ref, should_stop=lambda step: step == stop)


def test_the_networks_own_mean_and_deviation_are_those_of_its_library() -> None:
    mean, std = batches.pixel_statistics(made_up(16, 3), make_config("finetune"))
    assert mean == pytest.approx((123.675, 116.28, 103.53))
    assert std == pytest.approx((58.395, 57.12, 57.375))
    assert statistics_of("timm:tf_efficientnet_lite0") == ((127.5,) * 3, (127.5,) * 3)
    with pytest.raises(ConfigError, match=r"normalization=network is for networks of torchvision and timm"):
        check_names(tuned(normalization="network"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"start": "pretrained", "weights": "none"}, "start=pretrained needs start.weights"),
        ({"frozen_epochs": 3}, "schedule.frozen_epochs leaves no epoch"),
        ({"optimizer": "muon"}, "muon makes groups of its own"),
        ({"names": "a=b=c"}, r"start.names='a=b=c' is not valid"),
    ],
)
def test_fields_that_do_not_agree_are_told_in_a_sentence(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        tuned(**overrides)
