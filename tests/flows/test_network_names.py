"""A flow on a server trains no network whose code the worker's own project file does not admit."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.retrain import retrain
from flows.train_cifar import train_cifar
from nightshift.errors import ConfigError
from nightshift.local.prefect import PrefectServer
from nightshift.sweeps.stored import Sweep, begin, plan
from tests.own_network import NETWORK, forgotten, install, write_project
from tests.stores import memory_store

STRANGE = "strangers.nets:PartsNet"
REFUSED = "model 'strangers.nets:PartsNet' names code of the package strangers"


@pytest.fixture(autouse=True)
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefect_server: PrefectServer) -> Iterator[None]:
    """A worker with the package, in a folder whose project file admits another one."""
    install(tmp_path / "site", "strangers", NETWORK, "1.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("NIGHTSHIFT_HOME", str(tmp_path / "home"))
    write_project(monkeypatch, tmp_path)
    login = prefect_server.environment["PREFECT_API_AUTH_STRING"]
    server = {PREFECT_API_URL: prefect_server.api_url, PREFECT_API_AUTH_STRING: login}
    with forgotten("strangers"), temporary_settings(server):
        yield
    assert not list(tmp_path.rglob("it-was-run"))


@pytest.mark.parametrize("field", ["model", "loss", "transform"])
@pytest.mark.parametrize("flow", [train_cifar, retrain], ids=["train-cifar", "retrain"])
def test_a_parameter_of_a_flow_cannot_name_it(flow: Callable[..., object], field: str) -> None:
    with pytest.raises(ConfigError, match=REFUSED.replace("model", field, 1)):
        flow("quick", {field: STRANGE, "label_smoothing": 0})


@pytest.mark.parametrize("flow", [train_cifar, retrain], ids=["train-cifar", "retrain"])
def test_what_only_importing_a_package_shows_is_told_before_any_image_is_read(
    flow: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(monkeypatch, tmp_path, ("tests",))
    with pytest.raises(ConfigError, match=r"there is no Missing in tests\.own_network"):
        flow("quick", {"model": "tests.own_network:Missing"})


def test_a_stored_sweep_cannot_name_it() -> None:
    planned = plan("tuned", "quick", {"lr": [0.1, 0.2]})
    stored = begin(memory_store(), Sweep.model_validate({**planned.model_dump(), "overrides": {"model": STRANGE}}))
    with pytest.raises(ConfigError, match=REFUSED):
        train_cifar(stored.recipe, {**stored.overrides, "lr": 0.1}, "tuned-01")
