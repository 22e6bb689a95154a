"""What a page of the documentation shows is what works."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nightshift.config.project import load_project
from nightshift.data.names import named_config
from nightshift.networks import build_network
from nightshift.records.run import read_record
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.made_up import in_memory
from tests.own_images import write_images
from tests.own_network import forgotten
from tests.training import choices

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "networks.md").read_text()


def blocks(language: str, page: str = PAGE) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which somebody has followed the page."""
    one_function, one_class, _ = blocks("python")
    (tmp_path / "ournets.py").write_text(one_function + one_class)
    (tmp_path / "nightshift.toml").write_text(blocks("toml")[0])
    monkeypatch.chdir(tmp_path)
    with forgotten("ournets"):
        yield tmp_path


@pytest.mark.slow
def test_the_network_of_the_page_is_trained_by_the_command_of_the_page(
    folder: Path, nightshift: Callable[..., Finished], workspace: Workspace, prefect_api: str
) -> None:
    write_images(folder, range(90))
    command, *_ = re.findall(r"nightshift (train .*)", PAGE)
    done = nightshift(*command.split(), "--set", "epochs=1", "--json", PREFECT_API_URL=prefect_api)
    assert done.exit_code == 0, done.err
    assert done.json["status"] == "finished"
    record, _ = read_record(workspace.store, done.json["run_id"])
    assert record.config["model"] == {"name": "ournets:parts_net"}
    assert record.environment["network"].startswith("ournets, sha256 ")


def test_the_class_of_the_page_passes_the_test_of_the_page(folder: Path) -> None:
    test = blocks("python")[2]
    assert build_network("ournets:PartsNet", 3, 32)
    found: dict[str, Callable[[], None]] = {}
    exec(test, found)
    found["test_parts_net_can_be_trained_and_published"]()


def test_the_transform_and_the_loss_of_the_page_pass_its_test_and_are_trained_with_by_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (DOCS / "training.md").read_text()
    ours, test = blocks("python", page)
    (tmp_path / "ournets.py").write_text(ours)
    (tmp_path / "nightshift.toml").write_text(next(text for text in blocks("toml", page) if "plugins" in text))
    monkeypatch.chdir(tmp_path)
    project = load_project(Path("nightshift.toml"))
    with forgotten("ournets"):
        config = named_config("parts-own", {"epochs": 1}, project=project)
        found: dict[str, Callable[[], None]] = {}
        exec(test, found)
        found["test_our_training_can_be_resumed"]()
        workspace = in_memory(tmp_path / "home")
        ref = choices.images(workspace, tmp_path / "images")
        train_alone(workspace, "run", config, ref)
        environment = read_record(workspace.store, "run")[0].environment
        assert {"loss", "transform"} <= environment.keys()
