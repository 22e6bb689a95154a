"""A mistake that can be seen in the command alone is reported at once: nothing slow is imported, nothing is started."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

MISTAKES = {
    ("train", "--set", "start=pretrained"): "start=pretrained needs start.weights: a file, s3://BUCKET/KEY, or hub",
    ("train", "--recipe", "finetune", "--set", "model=quick_cnn"): "network is for networks of torchvision and timm",
    ("train", "--recipe", "nope"): "The recipes are: finetune, quick",
    ("train", "--set", "epoch=3"): "Did you mean epochs?",
    ("train", "--set", "schedule.epoch=3"): "there is no field 'schedule.epoch'",
    ("train", "--set", "epochs=0"): "schedule.epochs='0' is not valid",
    ("train", "--set", "optimizer=lion"): "'sgd', 'adam', 'adamw' or 'muon'",
    ("train", "--set", "model=vgg"): "The models are:",
    ("train", "--set", "model=torchvision:resnet19"): "torchvision has no network 'resnet19'",
    ("train", "--set", "model=torchvision:alexnet"): "takes images with a side of 63 to 512 pixels",
    ("train", "--set", "model=strangers.nets:Net"): "names code of the package strangers, which `plugins`",
    ("train", "--set", "loss=strangers.nets:Poly"): "loss 'strangers.nets:Poly' names code of the package strangers",
    ("train", "--set", "transform=strangers:Dust"): "transform 'strangers:Dust' names code of the package strangers",
    ("train", "--set", "loss=focall"): "there is no loss 'focall'. Did you mean focal?",
    ("submit", "--set", "loss=strangers.nets:Poly"): "loss 'strangers.nets:Poly' names code of the package strangers",
    ("submit", "--set", "model=strangers.nets:Net"): "names code of the package strangers, which `plugins`",
    ("sweep", "--over", "model=quick_cnn,strangers:Net"): "names code of the package strangers, which `plugins`",
    ("train", "--set", "crop=2"): "augment.crop='2' is not valid",
    ("train", "--set", "accumulate=512"): "more parts than data.batch_size=256 has images",
    ("train", "--set", "loss=binary"): "loss.name=binary is for two classes, and cifar10 has 10",
    ("train", "--set", "validate_every=1"): "needs validation images, and cifar10 has none",
    ("train", "--set", "keep=best"): "set evaluation.validate_every=1",
    (
        "train",
        "--set",
        "finish_by=25:00",
    ): "budget.finish_by='25:00' is not valid: should be a time of day such as 06:30",
    ("train", "--set", "max_hours=0"): "budget.max_hours='0' is not valid",
    ("train", "--set", "max_cost=5"): "needs to know what an hour costs: set NIGHTSHIFT_PRICE_PER_HOUR",
    ("submit", "--set", "finish_by=soon"): "budget.finish_by='soon' is not valid",
    ("train", "--set", "dataset=mnist"): "The data sets are: cifar10",
    ("train", "--images", "/no/such/folder"): "there is nothing at /no/such/folder",
    ("train", "--images", "/no/such/table.csv"): "there is nothing at /no/such/table.csv",
    ("train", "--snapshot", "0123"): "cifar10 never changes",
    ("train", "--images", ""): "an empty name is no place of images",
    ("data", "check", "parts"): "there is no data set 'parts'",
    ("data", "list", "shards"): "is not a valid name",
    ("init", "/no/such/folder"): "there is nothing at /no/such/folder",
    ("train", "--set", "epochs"): "is not FIELD=VALUE",
    ("train", "--run-id", "a/b"): "is not valid: use up to 100 letters",
    ("train", "--run-id", "a..b"): "without '..'",
    ("train", "--run-id", ""): "is not valid",
    ("resume", "a/b"): "is not valid: use up to 100 letters",
    ("verify", "../nobody"): "is not valid: use up to 100 letters",
    ("verify",): "or type --published",
    ("verify", "--published", "../nobody"): "is not valid: use up to 100 letters",
    ("delete", "a/b", "--yes"): "is not valid: use up to 100 letters",
    ("republish", "a/b"): "is not valid: use up to 100 letters",
    ("train", "--nope"): "No such option",
    ("submit", "--recipe", "nope"): "The recipes are: finetune, quick",
    ("submit", "--set", "lr=much"): "optimizer.lr='much' is not valid",
    ("submit", "--set", "model=vgg"): "The models are:",
    ("submit", "train-cifar/adhoc", "--recipe", "tutorial", "--set", "epochs=0"): "schedule.epochs='0' is not valid",
    ("submit", "--run-id", "a/b-{date}"): "is not valid: use up to 100 letters",
    ("gc", "--older-than-hours", "inf"): "Invalid value for '--older-than-hours'",
    ("recover", "--within-hours", "nan"): "Invalid value for '--within-hours'",
    ("recover", "--within-hours", "1e9"): "Invalid value for '--within-hours'",
    ("predict", "holiday/", ""): "an empty name is no place of images",
    ("sweep", "--over", "lr"): "is not FIELD=V1,V2",
    ("sweep", "--over", "lr=0.1,much"): "'much' is not valid",
    ("sweep", "--over", "lr=0.1..0.2"): "Say how many trials",
    ("sweep", "--over", "model=quick_cnn,vgg"): "The models are:",
    ("sweep", "--over", "lr=0.1,0.2", "--recipe", "nope"): "The recipes are: finetune, quick",
    ("sweep", "--over", "lr=0.1,0.2", "--set", "dataset=mnist"): "The data sets are: cifar10",
    ("sweep", "--over", "lr=0.1,0.2", "--sweep-id", "a/b"): "is not valid: use up to 100 letters",
}
PROJECT = """
[datasets.parts]
source = "parts"

[deployments.parts]
recipe = "quick"
"""
IN_THE_PROJECT = ("deploy",), ("up",)
# One process makes them all, in this order: a module that one of them has imported stays for those after it.
ALL_OF_THEM = """
import contextlib, io, json, sys
from nightshift.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv, printed = ["nightshift", *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            main()
    except SystemExit as ended:
        heavy = {"torch", "prefect", "boto3", "numpy", "optuna"} & sys.modules.keys()
        print(json.dumps([ended.code, printed.getvalue(), sorted(heavy)]))
"""
End = tuple[int, str, list[str]]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nothing-is-started-here")


@pytest.fixture(scope="module")
def ends(empty: Path) -> dict[tuple[str, ...], End]:
    """Of each mistake the exit code, what was printed on standard error, and the heavy modules imported so far."""
    return ends_of(MISTAKES, empty)


def ends_of(commands: Iterable[tuple[str, ...]], folder: Path) -> dict[tuple[str, ...], End]:
    commands = list(commands)
    # A server that is asked for anything here would not answer.
    environment = {**os.environ, "NIGHTSHIFT_HOME": str(folder), "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    command = [sys.executable, "-c", ALL_OF_THEM, json.dumps(commands)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600)
    return dict(zip(commands, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_mistake_in_the_command_ends_with_exit_code_2_before_anything_slow_is_imported(
    ends: dict[tuple[str, ...], End], arguments: tuple[str, ...]
) -> None:
    exit_code, printed, imported = ends[arguments]
    assert (exit_code, imported) == (2, [])
    assert MISTAKES[arguments] in " ".join(printed.split())


def test_no_mistake_in_the_command_starts_or_stores_anything(ends: dict[tuple[str, ...], End], empty: Path) -> None:
    assert not list(empty.iterdir())


def test_a_mistake_in_the_project_is_told_before_a_server_is_started_or_asked(tmp_path: Path) -> None:
    (tmp_path / "nightshift.toml").write_text(PROJECT)
    for exit_code, printed, imported in ends_of(IN_THE_PROJECT, tmp_path).values():
        assert (exit_code, imported) == (2, [])
        assert "nightshift.toml: [deployments.parts] recipe 'quick': cifar10 is nightshift's own data set" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["nightshift.toml"]


def test_a_mistake_is_one_json_object_if_json_was_asked_for() -> None:
    program = "import sys; sys.argv[0] = 'nightshift'; from nightshift.cli import main; main()"
    command = [sys.executable, "-c", program, "train", "--recipe", "nope", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    answer = json.loads(done.stdout)
    assert answer["kind"] == "ConfigError"
    assert answer["exit_code"] == done.returncode == 2
