"""The project file: what is wrong in it is named by file, table and field."""

from pathlib import Path

import pytest

from nightshift.config.project import Project, load_project
from nightshift.config.recipes import make_config, recipe_names
from nightshift.errors import ConfigError


def test_without_a_file_everything_is_as_nightshift_ships_it(tmp_path: Path) -> None:
    assert load_project(tmp_path / "nightshift.toml") == Project()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[deployments.nightly]\ncorn = '0 2 * * *'", "deployments.nightly.corn: Extra inputs are not permitted"),
        ("[deployments.nightly]\ncron = 2", "deployments.nightly.cron: should be a valid string"),
        ("[deployments", "cannot be read"),
        ("[datasets.parts]\n", "datasets.parts.source: Field required"),
        ("[datasets.parts]\nsource = ''", "datasets.parts.source: String should have at least 1 character"),
        ("deployments = 1", "deployments: should be a valid dictionary"),
    ],
)
def test_a_mistake_is_named_by_file_table_and_field(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "nightshift.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)) as refused:
        load_project(path)
    assert told in str(refused.value)


@pytest.mark.parametrize("body", [b"\xff\xfe\x00", b"x = '\x00'"])
def test_a_file_that_is_no_text_is_told_in_a_sentence(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "nightshift.toml"
    path.write_bytes(body)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_project(path)


def test_a_folder_in_its_place_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_project(tmp_path)


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("images", "{folder}/images"),
        ("labels/of today.csv", "{folder}/labels/of today.csv"),
        ("/srv/images", "/srv/images"),
        ("~/images", "~/images"),
        ("s3://factory/parts/", "s3://factory/parts/"),
    ],
)
def test_a_relative_source_lies_beside_the_file_wherever_it_is_read_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, meant: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf"
    folder.mkdir()
    (folder / "nightshift.toml").write_text(f"[datasets.parts]\nsource = '{source}'")
    project = load_project(Path("conf/nightshift.toml"))
    assert project.datasets["parts"].source == meant.format(folder=folder)


def test_a_recipe_with_the_name_of_one_of_nightshifts_is_refused_whatever_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "nightshift.toml"
    path.write_text("[recipes.quick]\nepochs = 20")
    with pytest.raises(ConfigError, match=r"\[recipes.quick\].*Give yours another"):
        make_config("tutorial", project=load_project(path))


def test_the_recipes_of_a_project_are_named_after_those_of_nightshift(tmp_path: Path) -> None:
    path = tmp_path / "nightshift.toml"
    path.write_text("[recipes.bolts]\nepochs = 20")
    assert recipe_names(load_project(path)) == [*recipe_names(), "bolts"]
