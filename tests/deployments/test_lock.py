"""requirements.lock: nothing is installed, and nothing takes part in an installation, whose hash is not in it."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.deployments.manifests import DEPLOYMENTS, ROOT

ENTRY = re.compile(r"(?m)^([A-Za-z0-9._-]+)==(?:.*\\\n)*.*$")
TORCH = {"torch", "torchvision"}


def entries(lock: str) -> dict[str, str]:
    """The lines of each package."""
    return {found[1]: found[0] for found in ENTRY.finditer(lock)}


def without_hash(packages: dict[str, str]) -> set[str]:
    return {name for name, entry in packages.items() if not re.search(r"--hash=sha256:[0-9a-f]{64}", entry)}


def test_every_package_of_the_lock_has_a_hash() -> None:
    packages = entries((ROOT / "requirements.lock").read_text())
    assert len(packages) > 150
    assert without_hash(packages) == set()


def test_a_cpu_build_leaves_out_the_libraries_of_cuda_and_the_hashes_of_torch_only() -> None:
    lock = ROOT / "requirements.lock"
    command = ["sed", "-E", "-f", str(DEPLOYMENTS / "cpu-build.sed"), str(lock)]
    packages = entries(lock.read_text())
    left = entries(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert without_hash(left) == TORCH
    assert {name for name in packages if name not in left} == {
        name for name in packages if name.startswith(("cuda", "nvidia", "triton"))
    }
    assert all(left[name] == packages[name] for name in left if name not in TORCH)
    assert "==" in left["torch"]
    assert "\\" not in left["torch"]


@pytest.mark.parametrize(
    "package", ["iniconfig", *(pytest.param(name, marks=pytest.mark.soak) for name in ("uv", "hatchling"))]
)
def test_setup_refuses_a_package_whose_hash_is_not_the_locks(package: str, tmp_path: Path) -> None:
    """The program that installs, a package, and what builds ours."""
    names = [
        "uv",
        "iniconfig",
        "hatchling",
        "editables",
        "packaging",
        "pathspec",
        "pluggy",
        "tomlkit",
        "trove-classifiers",
    ]
    packages = entries((ROOT / "requirements.lock").read_text())
    lock = "".join(f"{packages[name]}\n    # via nightshift\n" for name in sorted(names))
    replaced = re.sub(r"(--hash=sha256:)[0-9a-f]{8}", r"\g<1>00000000", packages[package])
    (tmp_path / "requirements.lock").write_text(lock.replace(packages[package], replaced))
    for name in ("Makefile", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    made = subprocess.run(["make", "setup"], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode != 0
    assert re.search(rf"(?is)hash.*\b{package}==", made.stderr), made.stderr
    assert not (tmp_path / ".venv" / ".ready").exists()
