"""A package of a team's own, with a network, a loss and a transform: nightshift trains with it as with its own."""

import os
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from nightshift.checkpoints.payload import read_payload
from nightshift.data import batches
from nightshift.data.names import checked_config
from nightshift.data.transforms import transformed
from nightshift.errors import ConfigError, TrainingInterrupted
from nightshift.judging import evaluation, gate
from nightshift.local.s3 import embedded_s3
from nightshift.plugins import LOSS, TRANSFORM, all_described, load
from nightshift.publishing.export import FORMATS
from nightshift.publishing.prediction import Classifier
from nightshift.publishing.publish import export_run, publish_model
from nightshift.records.champions import champion_of
from nightshift.records.history import read_history
from nightshift.records.run import read_record
from nightshift.settings import GateSettings
from nightshift.storage.s3 import S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.forked import forked
from tests.made_up import NAME, config_of, in_memory, known, made_up
from tests.own_network import NETWORK, OTHERS, forgotten, install, write_project

ENTRY_POINTS = """
[nightshift.losses]
rare = ourvision.nets:Poly
[nightshift.transforms]
dust = ourvision.nets:Dust
"""
OURS: dict[str, Any] = {
    "model": "ourvision.nets:PartsNet",
    "loss": "ourvision.nets:Poly",
    "transform": "ourvision.nets:Dust",
    "label_smoothing": 0.0,
    "optimizer": "sgd",
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the package is installed, with a project file beside it that admits it."""
    install(tmp_path / "site", "ourvision", NETWORK + OTHERS, "1.0", ENTRY_POINTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    write_project(monkeypatch, tmp_path, ("ourvision",))
    with forgotten("ourvision"):
        yield tmp_path


def train(home: Path, prefix: str, site: Path, run_id: str, killed_at: int = 0) -> tuple[str, list[Any]]:
    """sha256 of everything a run ends with, and its curve; in a process of its own, which may be killed."""

    def strike(step: int) -> bool:
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    os.chdir(site)
    sys.path.insert(0, str(site / "site"))
    with embedded_s3(home, prefix) as store:
        workspace = Workspace(store, home, lease_seconds=6, save_retry_seconds=5)
        ref = known(workspace, 32, 3, train=100)
        config = config_of(**OURS, mixup=0.2, epochs=2, drop_last=False, checkpoint_every_steps=2)
        if killed_at:  # something is saved, whatever comes
            with pytest.raises(TrainingInterrupted):
                train_alone(workspace, run_id, config, ref, should_stop=lambda step: step == 3)
        last = train_alone(workspace, run_id, config, ref, should_stop=strike)
        return state_sha256(read_payload(store, last)), read_record(store, run_id)[0].curve


def test_it_is_trained_with_killed_resumed_to_the_same_bits_exported_predicted_with_and_becomes_champion(
    site: Path, home: Path, server: S3, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_a_process(run_id: str, killed_at: int = 0) -> tuple[str, list[Any]]:
        with ProcessPoolExecutor(1, mp_context=forked()) as pool:
            return pool.submit(train, home, prefix, site, run_id, killed_at).result()

    whole = in_a_process("whole")
    with pytest.raises(BrokenProcessPool):
        in_a_process("run", killed_at=10)
    assert in_a_process("run") == whole

    with embedded_s3(home, prefix) as store:
        workspace = Workspace(store, home, lease_seconds=60, save_retry_seconds=5)
        ref = known(workspace, 32, 3, train=100)
        record, _ = read_record(store, "run")
        assert {"network", "loss", "transform"} <= record.environment.keys()
        assert record.chosen
        checkpoint = record.ref(record.chosen)
        model = publish_model(workspace, checkpoint, ref, evaluation.evaluate(workspace, checkpoint, ref))
        for kind in FORMATS:
            assert export_run(workspace, record, kind)
        Image.new("RGB", (32, 32)).save(site / "black.png")
        (predicted,) = Classifier(store, NAME, "run").predict(store, [str(site / "black.png")])
        assert predicted.label
        assert gate.promote(store, model, GateSettings()).promoted
        assert champion_of(store, read_history(store, NAME)).version == "run"


def test_its_images_are_the_same_for_one_rank_and_for_several(site: Path) -> None:
    dataset = made_up(32, 3, train=40)
    config = config_of(**OURS, batch_size=8, max_train_images=40)
    plan = batches.make_plan(config, dataset)
    images, _ = batches.training_batch(dataset, config, plan, 1, slice(0, 8))
    shares = [batches.training_batch(dataset, config, plan, 1, slice(at, at + 2))[0] for at in range(0, 8, 2)]
    assert torch.equal(torch.cat(shares), images)
    plain, _ = batches.training_batch(dataset, config.override({"transform": "none"}), plan, 1, slice(0, 8))
    assert not torch.equal(images, plain)
    other = transformed(plain, config.augment, config.seed, 1, range(8), dataset.mean)
    assert not torch.equal(other, images)  # another epoch


def test_its_loss_and_transform_have_short_names_by_entry_points(site: Path) -> None:
    assert load("rare", LOSS) is load("ourvision.nets:Poly", LOSS)
    assert load("dust", TRANSFORM) is load("ourvision.nets:Dust", TRANSFORM)
    with pytest.raises(
        ConfigError, match=r"there is no loss 'dust'\. The losses are: cross_entropy, focal, binary; and"
    ):
        load("dust", LOSS)


def test_a_change_of_its_code_changes_what_the_record_says_of_each(site: Path) -> None:
    before = all_described(config_of(**OURS))
    (site / "site" / "ourvision" / "more.py").write_text("WIDTH = 16\n")
    after = all_described(config_of(**OURS))
    assert all(before[name] != after[name] for name in ("network", "loss", "transform"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"loss": "ourvision.nets:Polly"}, "there is no Polly in ourvision.nets. Did you mean Poly?"),
        ({"loss": "ourvision.nets:PartsNet"}, "loss 'ourvision.nets:PartsNet' fails: |cannot be made|has parameters"),
        (
            {"transform": "ourvision.nets:Poly"},
            "transform 'ourvision.nets:Poly' cannot be made for images of 32 pixels",
        ),
        ({"transform": "ourvision.nets:nothing"}, "there is no nothing in ourvision.nets"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_stored(overrides: dict[str, Any], told: str, site: Path) -> None:
    workspace = in_memory(site / "home")
    ref = known(workspace, 32, 3)
    with pytest.raises(ConfigError, match=told):
        train_alone(workspace, "run", config_of(**{**OURS, **overrides}), ref)
    assert not list(workspace.store.list("runs/"))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"loss": "hubber"}, "there is no loss 'hubber'"),
        ({"loss": "focall"}, "there is no loss 'focall'. Did you mean focal?"),
        ({"transform": "blur"}, "there is no transform 'blur'. Yours is named PACKAGE.MODULE:NAME"),
        ({"loss": "ourvision:"}, "loss 'ourvision:' is not valid: one of your own is named PACKAGE.MODULE:NAME"),
        ({"loss": OURS["loss"]}, "are not handed to a loss of your own, as ourvision.nets:Poly is one"),
    ],
)
def test_a_name_that_is_none_is_told_in_a_sentence(overrides: dict[str, Any], told: str, site: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        checked_config("quick", overrides)
