"""What may import what, and other promises about the house that no unit of it can keep alone."""

import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).parent.parent

REFUSE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {forbidden!r}:
            raise ModuleNotFoundError(f"{{name}} is not to be imported here")

sys.meta_path.insert(0, Refuse())
"""
IMPORT_ALL = """
import importlib, pkgutil
for package in ("models", "nightshift"):
    for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
        importlib.import_module(module.name)
        print(*[] if module.ispkg else [module.name])
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_core_and_the_models_import_where_there_is_no_prefect() -> None:
    done = run_python(REFUSE.format(forbidden=["prefect"]) + IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    files = [path.relative_to(ROOT) for package in ("models", "nightshift") for path in (ROOT / package).rglob("*.py")]
    modules = {".".join(path.with_suffix("").parts) for path in files if path.name != "__init__.py"}
    assert modules == set(done.stdout.split())


def test_what_runs_on_a_gpus_machine_imports_torch_numpy_and_what_gpu_txt_names() -> None:
    allowed = {canonicalize_name(name) for name in (ROOT / "benchmarks" / "gpu.txt").read_text().split()}
    new = {canonicalize_name("torch"), canonicalize_name("numpy"), canonicalize_name("nightshift")}
    while new:
        allowed |= new
        new = set[NormalizedName]().union(*map(needed_by, new - {"nightshift"})) - allowed
    there = packages_distributions()
    forbidden = [top for top, names in there.items() if not allowed & {canonicalize_name(name) for name in names}]
    refuse = REFUSE.format(forbidden=forbidden)
    parts = ("bits", "loading", "preflight", "ranks", "snapshots", "speed")
    imports = "\n".join(f"import tests.gpu.{part}" for part in parts)
    done = run_python(f"{refuse}\n{imports}\nimport typer, rich.table")
    assert done.returncode == 0, done.stderr
    assert "boto3 is not to be imported here" in run_python(f"{refuse}\nimport nightshift.storage.s3").stderr


def needed_by(name: str) -> set[NormalizedName]:
    """What an installed package needs without extras; nothing of one that only other systems have."""
    with suppress(PackageNotFoundError):
        found = map(Requirement, requires(name) or [])
        return {canonicalize_name(one.name) for one in found if "extra ==" not in str(one.marker)}
    return set()


def test_storage_and_settings_import_where_there_is_no_torch() -> None:
    modules = ("storage.s3", "records.lease", "records.champions", "local.s3", "settings", "config.recipes")
    imports = "\n".join(f"import nightshift.{module}" for module in modules)
    done = run_python(REFUSE.format(forbidden=["torch"]) + imports)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("forbidden", "module"),
    [("prefect", "flows.train_cifar"), ("torch", "models.quick_cnn"), ("torch", "nightshift.training.state")],
)
def test_what_is_kept_out_of_those_is_really_not_to_be_had_there(forbidden: str, module: str) -> None:
    done = run_python(REFUSE.format(forbidden=[forbidden]) + f"import {module}")
    assert f"{forbidden} is not to be imported here" in done.stderr


def test_steps_that_are_not_compiled_do_not_import_the_compiler() -> None:
    """It takes 2 s, and each resume of the recipe quick had to wait for it."""
    done = run_python("""
import sys, torch
from models.quick_cnn import QuickCNN
from nightshift.config.recipes import make_config
from nightshift.hardware import Hardware
from nightshift.training.optimizers import build_optimizer

config = make_config("quick", {})
network = QuickCNN(10, 32)
with Hardware.resolve(config.hardware, 10).numerics():
    assert torch.are_deterministic_algorithms_enabled()
    optimizer = build_optimizer(network, config.optimizer)
    network(torch.rand(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
assert not torch.are_deterministic_algorithms_enabled()
print({"torch._dynamo", "torch._inductor", "scipy", "matplotlib"} & sys.modules.keys())
""")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_needs_none_of_the_heavy_libraries(arguments: list[str]) -> None:
    code = f"""
import atexit, sys
atexit.register(lambda: print("imported:", *{{"torch", "prefect", "boto3"}} & sys.modules.keys()))
from nightshift.cli import main
sys.argv = ["nightshift", *{arguments!r}]
main()
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["imported:"]


def test_the_lock_pins_every_requirement_and_names_no_place() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert "@ " not in text
    requirements = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    assert requirements
    entry = r"[A-Za-z0-9._-]+(\[[\w,.-]+\])?==\S|    --hash=sha256:[0-9a-f]{64}( \\)?$"
    assert [line for line in requirements if not re.match(entry, line)] == []


def test_imports_run_one_way_through_the_house() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pre_commit_runs_what_make_check_runs() -> None:
    (recipe,) = re.findall(r"^check:.*\n((?:\t.*\n?)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    checked = [line.strip().removeprefix("@") for line in recipe.splitlines()]
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert local["repo"] == "local"
    assert [hook["entry"] for hook in local["hooks"]] == checked
    # Each looks at the whole project, as `make check` does: a change can break a file that it does not touch.
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in local["hooks"])


def test_the_readme_shows_the_directories_there_are() -> None:
    section = (ROOT / "README.md").read_text().partition("\n## The tree\n")[2].partition("\n## ")[0]
    shown, parent = [], ""
    for indent, name in re.findall(r"^( *)([\w-]+)/ +\w", section, re.MULTILINE):
        parent = parent if indent else name
        shown.append(f"{parent}/{name}" if indent else name)
    written = {".py", ".md", ".yaml", ".json"}
    there = {path.parent.relative_to(ROOT) for path in ROOT.glob("[!.]*/**/*") if path.suffix in written}
    there |= {Path(folder.parts[0]) for folder in there}
    # A folder of tests is named after the package it tests, and a page's templates lie beside the page.
    expected = [
        str(folder)
        for folder in there
        if len(folder.parts) == 1 or (len(folder.parts) == 2 and folder.parts[0] != "tests")
    ]
    assert sorted(shown) == sorted(expected)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/operations.md", "docs/storage.md"])
def test_a_page_names_only_files_and_make_targets_there_are(page: str) -> None:
    text = (ROOT / page).read_text()
    files = re.findall(r"`((?:nightshift|flows|tasks|models|tests|deployments|benchmarks|docs)/[\w./-]+)`", text)
    linked = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    there = [ROOT / file for file in files] + [(ROOT / page).parent / file for file in linked]
    assert [str(path) for path in there if not path.exists()] == []
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+(?:-[a-z]+)?)(?=`|\n```)", text)) <= targets


def test_text_reaches_a_screen_in_one_place_only() -> None:
    """Elsewhere nobody makes a console, takes markup, or escapes: `text` and `Screen` do."""
    ways_around = re.compile(
        r"\bConsole\(|from_markup|rich\.markup|markup=True|\bText\(|html\.escape|csv\.writer\(|\| *safe\b|escape=False"
    )
    sources = [
        path
        for folder in ("nightshift", "flows", "tasks", "deployments")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".html", ".md"}
    ]
    names = {path.relative_to(ROOT).as_posix() for path in sources if ways_around.search(path.read_text())}
    assert names == {"nightshift/cli/screen.py"}


def test_every_task_fits_on_less_than_thirty_lines() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "tasks").glob("*.py")}
    # The package says what all tasks share; it is none itself.
    del lines["__init__.py"]
    assert lines
    assert {name: count for name, count in lines.items() if count >= 30} == {}


def test_every_link_of_the_docs_to_a_file_leads_to_one() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    links = [
        (page, target)
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text())
        if not target.startswith("http")
    ]
    assert len(links) > 20
    assert [(page.name, target) for page, target in links if not (page.parent / target).exists()] == []
