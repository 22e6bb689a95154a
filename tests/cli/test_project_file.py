"""The commands that write the project file, and that list what it has."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nightshift.cli.config import _recipe_names
from nightshift.config.project import load_project
from tests.commands import Finished
from tests.own_images import DATASET, write_images


def test_what_init_writes_means_the_images_that_were_named_wherever_the_file_lies(
    nightshift: Callable[..., Finished], tmp_path: Path
) -> None:
    write_images(tmp_path, range(3))
    (tmp_path / "conf").mkdir()
    made = nightshift("init", "images", "--json", NIGHTSHIFT_PROJECT="conf/nightshift.toml")
    assert made.json == {"path": "conf/nightshift.toml", "dataset": "images"}, made.err
    assert load_project(tmp_path / "conf" / "nightshift.toml").datasets["images"].source == str(tmp_path / "images")


def test_recipes_lists_those_of_the_project_too(nightshift: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "nightshift.toml").write_text(DATASET)
    listed = {recipe["name"]: recipe for recipe in nightshift("recipes", "--json").json["recipes"]}
    assert listed["parts"].items() >= {"model": "simple_cnn", "dataset": "parts", "epochs": 2}.items()
    assert listed["quick"]["dataset"] == "cifar10"


def test_the_shell_completes_the_recipes_of_the_project_and_those_of_nightshift_if_its_file_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nightshift.toml").write_text(DATASET)
    assert {"parts", "quick"} <= set(_recipe_names())
    (tmp_path / "nightshift.toml").write_text("[recipes")
    assert "quick" in _recipe_names()
    assert "parts" not in _recipe_names()
