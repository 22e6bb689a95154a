"""A run of any network, killed in the middle of an epoch, ends with the bits of one that was not."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.commands import Command
from tests.conftest import eventually
from tests.own_network import NETWORK

TRAIN = (
    *("train", "--recipe", "tutorial", "--json", "--set", "max_train_images=640", "--set", "epochs=4"),
    *("--set", "checkpoint_every_steps=7"),
)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["ournets:PartsNet", "torchvision:mobilenet_v3_small", "timm:convnext_atto"])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_weights_and_goes_live(
    start: Callable[..., Command],
    workspace: Workspace,
    prefect_api: str,
    cifar10: DatasetRef,
    tmp_path: Path,
    name: str,
) -> None:
    (tmp_path / "nightshift.toml").write_text('plugins = ["ournets"]')
    (tmp_path / "ournets.py").write_text(NETWORK)

    def begin(*arguments: str) -> Command:
        return start(*arguments, PREFECT_API_URL=prefect_api)

    killed = begin(*TRAIN, "--set", f"model={name}", "--run-id", "killed")
    killed.wait_for_line(f"training {name}")
    eventually(lambda: bool(read_record(workspace.store, "killed")[0].checkpoints))
    killed.send(signal.SIGKILL)
    killed.finish()
    assert read_record(workspace.store, "killed")[0].status == "running"
    resumed = begin("resume", "killed", "--json").finish()
    assert resumed.exit_code == 0, resumed.err
    assert 0 < resumed.json["resumed_from_step"] < resumed.json["step"] == 80
    assert resumed.json["champion"]["version"] == "killed"
    whole = begin(*TRAIN, "--set", f"model={name}", "--run-id", "whole").finish()
    assert resumed.json["weights_sha256"] == whole.json["weights_sha256"]
    predicted = begin("predict", str(tmp_path), "--json").finish()
    assert "none of" in predicted.json["error"]  # it was made and loaded; there is only no image
