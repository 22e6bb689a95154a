"""A network of a team's own: trained and published as one of nightshift's, or refused before the first step."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from nightshift import progress
from nightshift.checkpoints.payload import read_payload
from nightshift.config.train import TrainConfig
from nightshift.data.batches import make_plan
from nightshift.data.datasets import open_dataset
from nightshift.errors import ConfigError, RunNotFoundError, TrainingInterrupted
from nightshift.judging import evaluation
from nightshift.networks import build_network, check_network
from nightshift.publishing.export import FORMATS
from nightshift.publishing.prediction import Classifier
from nightshift.publishing.publish import export_run, publish_model
from nightshift.records.run import read_record
from nightshift.records.versions import read_card
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.training import run as training
from nightshift.training.ranks import ALONE, Ranks
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.made_up import NAME, config_of, in_memory, known
from tests.own_network import NETWORK, forgotten, write_project

MISTAKES = {
    "raises": (
        "def net(classes, side):\n    raise KeyError('stem')",
        "cannot be made .*KeyError: 'stem' .ournets.py, line 3",
    ),
    "other arguments": ("def net(classes):\n    pass", "cannot be made .*TypeError: net.. takes 1 positional argument"),
    "no network": ("def net(classes, side):\n    return {}", "is made as a dict, which is no torch.nn.Module"),
    "no parameters": (
        "def net(classes, side):\n    return nn.Flatten()",
        "has no parameters that are trained",
    ),
    "fixed parameters": (
        "def net(classes, side):\n    return nn.Linear(3, classes).requires_grad_(False)",
        "has no parameters that are trained",
    ),
    "wrong shape": (
        "def net(classes, side):\n    return nn.Conv2d(3, classes, 3)",
        r"returns torch.float32 \(2, 3, 30, 30\) for 2 images, not float logits \(2, 3\)",
    ),
    "several outputs": (
        "class net(nn.Linear):\n    def __init__(self, classes, side):\n        super().__init__(3, classes)\n"
        "    def forward(self, x):\n        return super().forward(x.mean((2, 3))), x",
        "returns a tuple, not one tensor of logits",
    ),
    "raises in forward": (
        "class net(nn.Linear):\n    def __init__(self, classes, side):\n        super().__init__(3, classes)\n"
        "    def forward(self, x):\n        return super().forward(x.flatten(1))",
        "cannot be trained on images of 32 pixels: RuntimeError: .*mat1 and mat2.*ournets.py, line 6",
    ),
    "unused parameters": (
        "class net(nn.Linear):\n    def __init__(self, classes, side):\n        super().__init__(3, classes)\n"
        "    def forward(self, x):\n        return x.new_zeros(len(x), self.out_features)",
        "depend on none of its parameters",
    ),
    "cannot be copied": (
        "class net(nn.Linear):\n    def __init__(self, classes, side):\n        super().__init__(3, classes)\n"
        "        self.lock = threading.Lock()\n"
        "    def forward(self, x):\n        return super().forward(x.mean((2, 3)))",
        "cannot be copied, as optimizer.ema_decay needs it: TypeError",
    ),
    "other state": (
        "class net(nn.Linear):\n    def __init__(self, classes, side):\n        super().__init__(3, classes)\n"
        "    def get_extra_state(self):\n        return 'much'\n"
        "    def forward(self, x):\n        return super().forward(x.mean((2, 3)))",
        "keeps a str as _extra_state in its state_dict",
    ),
    "cannot be exported": (
        "class net(nn.Linear):\n    def __init__(self, classes, side):\n        super().__init__(3, classes)\n"
        "        self.scale = lambda x: x * 2 if float(x.sum()) > 0 else x\n"
        "    def forward(self, x):\n        return super().forward(self.scale(x).mean((2, 3)))",
        "cannot be exported by torch.export, so what it learns could never be published: ",
    ),
    "one image": (
        "def net(classes, side):\n    return nn.Sequential(nn.Flatten(), nn.Linear(3 * side**2, 8), nn.BatchNorm1d(8), "
        "nn.Linear(8, classes))",
        "cannot be trained on one image, which is all that .* or a part of it, has .*drop_last=true",
    ),
    "groups": (
        "class net(nn.Linear):\n    def __init__(self, classes, side):\n        super().__init__(3, classes)\n"
        "    def parameter_groups(self):\n        return [{'params': [self.weight]}]\n"
        "    def forward(self, x):\n        return super().forward(x.mean((2, 3)))",
        "parameter_groups of the model: bias stands in 0 groups",
    ),
}


@pytest.fixture(autouse=True)
def no_plugin_stays() -> Iterator[None]:
    with forgotten("ournets"):
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A team's folder, with a project file and a network."""
    write_project(monkeypatch, tmp_path)
    (tmp_path / "ournets.py").write_text(NETWORK)
    return tmp_path


@pytest.fixture
def workspace(folder: Path) -> Workspace:
    return in_memory(folder / "home")


@pytest.fixture
def dataset(workspace: Workspace) -> DatasetRef:
    return known(workspace, 32, 3, train=65)


def config(**overrides: object) -> TrainConfig:
    base = {"model": "ournets:PartsNet", "optimizer": "sgd", "batch_size": 16, "drop_last": False}
    return config_of(**{**base, **overrides})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_network_that_cannot_be_used_is_refused_in_a_sentence_before_anything_is_stored(
    folder: Path, workspace: Workspace, dataset: DatasetRef, mistake: str
) -> None:
    source, told = MISTAKES[mistake]
    (folder / "ournets.py").write_text(f"import threading; from torch import nn\n{source}\n")
    with pytest.raises(ConfigError, match=told) as refused:
        train_alone(workspace, "run", config(model="ournets:net"), dataset)
    assert "\n" not in str(refused.value)
    assert refused.value.exit_code == 2
    with pytest.raises(RunNotFoundError):
        read_record(workspace.store, "run")


def test_one_image_is_also_refused_where_only_a_part_of_a_batch_has_so_few(
    folder: Path, workspace: Workspace, dataset: DatasetRef
) -> None:
    source, told = MISTAKES["one image"]
    (folder / "ournets.py").write_text(f"from torch import nn\n{source}\n")
    with pytest.raises(ConfigError, match=told):
        train_alone(workspace, "run", config(model="ournets:net", drop_last=True, accumulate=16), dataset)


def test_as_few_images_as_a_part_has_over_all_ranks_are_tried(
    folder: Path, workspace: Workspace, dataset: DatasetRef
) -> None:
    source, told = MISTAKES["one image"]
    (folder / "ournets.py").write_text(f"from torch import nn\n{source}\n")
    chosen, images = config(model="ournets:net", drop_last=True, accumulate=16), open_dataset(workspace, dataset)
    plan = make_plan(chosen, images)
    training._check_code(chosen, images, plan, Ranks(world_size=2))  # one image on each, and batch norm over both
    with pytest.raises(ConfigError, match=told):
        training._check_code(chosen, images, plan, ALONE)


def stopped_at(workspace: Workspace, dataset: DatasetRef, step: int, **overrides: object) -> None:
    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, "parts", config(**overrides), dataset, should_stop=lambda done: done == step)


def state_of(workspace: Workspace, checkpoint: CheckpointRef) -> str:
    return state_sha256(read_payload(workspace.store, checkpoint))


@pytest.mark.parametrize(
    "name",
    [
        *("ournets:PartsNet", "torchvision:mobilenet_v3_small"),
        *(pytest.param(name, marks=pytest.mark.soak) for name in ("torchvision:resnet18", "timm:convnext_atto")),
    ],
)
def test_a_run_that_is_stopped_and_resumed_ends_with_the_same_bits(
    workspace: Workspace, dataset: DatasetRef, name: str
) -> None:
    whole = train_alone(workspace, "whole", config(model=name, drop_last=True), dataset)
    stopped_at(workspace, dataset, 3, model=name, drop_last=True)
    stopped_at(workspace, dataset, 6, model=name, drop_last=True)
    parts = train_alone(workspace, "parts", config(model=name, drop_last=True), dataset)
    assert parts.step == whole.step == 12
    assert state_of(workspace, parts) == state_of(workspace, whole)


def test_it_has_seen_training_images_before_the_first_step_and_is_trained_in_its_own_groups(
    workspace: Workspace, dataset: DatasetRef
) -> None:
    last = train_alone(workspace, "run", config(), dataset)
    payload = read_payload(workspace.store, last)
    assert payload["model"]["brightness"] != 0
    features, head = (group["lr"] for group in payload["optimizer"]["param_groups"])
    assert features == pytest.approx(head / 2)


def test_what_it_has_learned_is_published_and_exported_and_predicts(
    folder: Path, workspace: Workspace, dataset: DatasetRef
) -> None:
    checkpoint = train_alone(workspace, "run", config(), dataset)
    publish_model(workspace, checkpoint, dataset, evaluation.evaluate(workspace, checkpoint, dataset))
    record, _ = read_record(workspace.store, "run")
    for kind in FORMATS:
        assert export_run(workspace, record, kind)
    card = read_card(workspace.store, NAME, "run")
    assert card.architecture == "ournets:PartsNet"
    assert card.environment["network"].startswith("ournets, sha256 ")
    Image.new("RGB", (32, 32)).save(folder / "black.png")
    (predicted,) = Classifier(workspace.store, NAME, "run").predict(workspace.store, [str(folder / "black.png")])
    assert predicted.label in card.classes


class Heard(progress.LogProgress):
    """What a run warns of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


def test_a_resume_warns_if_the_network_has_changed_since(
    folder: Path, workspace: Workspace, dataset: DatasetRef
) -> None:
    stopped_at(workspace, dataset, 3)
    before = read_record(workspace.store, "parts")[0].environment["network"]
    (folder / "ournets.py").write_text(NETWORK.replace("nn.ReLU()", "nn.GELU()"))
    del sys.modules["ournets"]
    heard = Heard()
    with progress.shown_by(heard):
        train_alone(workspace, "parts", config(), dataset)
    after = read_record(workspace.store, "parts")[0].environment["network"]
    assert after != before
    (warning,) = [text for text in heard.warnings if "the environment has changed" in text]
    assert f"network {before} → {after}" in warning


def test_a_prediction_warns_if_the_network_is_not_the_one_that_was_trained(
    folder: Path, workspace: Workspace, dataset: DatasetRef
) -> None:
    checkpoint = train_alone(workspace, "run", config(), dataset)
    publish_model(workspace, checkpoint, dataset, evaluation.evaluate(workspace, checkpoint, dataset))
    heard = Heard()
    with progress.shown_by(heard):
        Classifier(workspace.store, NAME, "run")
        assert heard.warnings == []
        (folder / "ournets.py").write_text(f"{NETWORK}# another line")
        Classifier(workspace.store, NAME, "run")
    (warning,) = heard.warnings
    assert warning.startswith("run was trained with the network of ournets, sha256 ")


def test_a_run_whose_network_is_gone_from_this_machine_is_left_as_it_is(
    folder: Path, workspace: Workspace, dataset: DatasetRef
) -> None:
    stopped_at(workspace, dataset, 3)
    before, _ = read_record(workspace.store, "parts")
    (folder / "ournets.py").unlink()
    del sys.modules["ournets"]
    with pytest.raises(ConfigError, match="the package ournets is not installed on this machine"):
        train_alone(workspace, "parts", config(), dataset)
    assert read_record(workspace.store, "parts")[0] == before


def test_an_operation_whose_result_varies_is_told_with_the_field_that_allows_it(
    folder: Path, workspace: Workspace, dataset: DatasetRef
) -> None:
    scattered = NETWORK.replace("self.features(images - self.brightness)", "scattered(self.features(images))")
    (folder / "ournets.py").write_text(
        scattered
        + """

def scattered(x):
    if not torch.compiler.is_exporting():
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
    return x
"""
    )
    with pytest.raises(ConfigError, match=r"put_ of the network has no .* hardware.deterministic=false"):
        train_alone(workspace, "run", config(), dataset)
    train_alone(workspace, "another", config(deterministic=False), dataset)


def test_a_network_is_tried_without_a_draw_from_the_generator_of_the_run(folder: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    check_network("ournets:PartsNet", 3, 32, smallest_batch=1, averaged=True, build_optimizer=lambda network: None)
    assert torch.equal(torch.get_rng_state(), before)
    assert build_network("ournets:PartsNet", 3, 32).training
