"""A data set of a few images, and machines that have nothing yet."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from safetensors import safe_open

from nightshift.data.known import fetch, pack
from nightshift.data.sources import cifar10
from nightshift.data.specs import SPECS, Arrays, Spec
from nightshift.progress import LogProgress, shown_by
from nightshift.refs import DatasetRef
from nightshift.storage.memory import MemoryStore
from nightshift.workspace import Workspace


@dataclass
class Told(LogProgress):
    """What was told while something ran."""

    transfers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @contextmanager
    def transfer(self, what: str, size: int | None) -> Iterator[Callable[[int], object]]:
        self.transfers.append(what)
        yield lambda count: None

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@pytest.fixture
def told() -> Iterator[Told]:
    with shown_by(told := Told()):
        yield told


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "photos"


@pytest.fixture
def memory() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def fresh(workspace: Workspace, tmp_path: Path) -> Workspace:
    """This test's prefix of the store, on a machine that has nothing yet."""
    return replace(workspace, home=tmp_path / "home")


@pytest.fixture(scope="session")
def packed(home: Path, cifar10: DatasetRef) -> Path:
    return home / "datasets" / f"{cifar10.digest}.safetensors"


@pytest.fixture(scope="session")
def few(packed: Path) -> Arrays:
    with safe_open(packed, framework="np") as file:
        return {name: file.get_slice(name)[: 500 if "train" in name else 100] for name in SPECS["cifar10"].sha256}


@pytest.fixture
def small(few: Arrays, monkeypatch: pytest.MonkeyPatch) -> Spec:
    """A data set of the first 600 images, because a fault is a fault at any size; one outside source has it."""
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in few.items()}
    classes = SPECS["cifar10"].classes
    spec = Spec("small", classes, sums)
    monkeypatch.setitem(SPECS, "small", spec)
    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {"elsewhere": lambda scratch: dict(few)})
    return spec


def no_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "OUTSIDE_SOURCES", {})


def provide(workspace: Workspace, name: str) -> DatasetRef:
    return pack(workspace, fetch(workspace, name))


def raw(workspace: Workspace, spec: Spec) -> Path:
    """The file with the arrays from outside."""
    return workspace.home / "datasets" / f"{spec.digest}.safetensors"


def cache(workspace: Workspace, ref: DatasetRef) -> Path:
    return workspace.home / "datasets" / f"{ref.digest}.safetensors"


def files(workspace: Workspace) -> list[str]:
    return sorted(path.name for path in (workspace.home / "datasets").iterdir())
