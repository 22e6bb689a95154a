"""The project file: what is wrong in it is named by file, table and field."""

from pathlib import Path

import pytest

from nightshift.config.project import Project, load_project
from nightshift.errors import ConfigError


def test_without_a_file_everything_is_as_nightshift_ships_it(tmp_path: Path) -> None:
    assert load_project(tmp_path / "nightshift.toml") == Project()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[deployments.nightly]\ncorn = '0 2 * * *'", "deployments.nightly.corn: Extra inputs are not permitted"),
        ("[deployments.nightly]\ncron = 2", "deployments.nightly.cron: should be a valid string"),
        ("[deployments", "cannot be read"),
        ("[datasets.parts]\n", "datasets: Extra inputs are not permitted"),
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
