"""Which code a config may name: only the project file of this machine says so, whoever asks."""

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from nightshift import plugins
from nightshift.config.project import load_project
from nightshift.config.recipes import make_config
from nightshift.data.names import checked_config
from nightshift.errors import ConfigError
from nightshift.judging import evaluation
from nightshift.networks import build_network
from nightshift.plugins import LOSS, MODEL, TRANSFORM
from nightshift.publishing.prediction import Classifier
from nightshift.publishing.publish import export_run, publish_model
from nightshift.records.run import RunRecord, read_record, write_record
from nightshift.records.versions import read_card
from nightshift.sweeps.stored import plan
from nightshift.training.run import train_alone
from nightshift.training.state import payload_check
from nightshift.workspace import Workspace
from tests.made_up import NAME, config_of, in_memory, known
from tests.own_network import NETWORK, forgotten, install, write_project
from tests.records.test_versions import replace_card

STRANGE = "strangers.nets:PartsNet"
REFUSED = "model 'strangers.nets:PartsNet' names code of the package strangers, which `plugins` of nightshift.toml"
KINDS = [MODEL, LOSS, TRANSFORM]
FIELDS = ["model", "loss", "transform"]


def refused(field: str) -> str:
    return REFUSED.replace("model", field, 1)


def naming(field: str) -> dict[str, object]:
    """What names code of the strangers in a field."""
    return {field: STRANGE, "label_smoothing": 0}


@pytest.fixture(autouse=True)
def no_plugin_stays() -> Iterator[None]:
    with forgotten("ournets", "ourvision", "strangers"):
        yield


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package that is installed and works, and that the project file does not admit. It is not run."""
    points = "".join(f"[{kind.group}]\nstrange = {STRANGE}\n" for kind in KINDS)
    install(tmp_path / "site", "strangers", NETWORK, "1.0", points)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    write_project(monkeypatch, tmp_path)
    yield tmp_path
    assert "strangers" not in sys.modules
    assert not list(tmp_path.rglob("it-was-run"))


@pytest.mark.parametrize("name", [STRANGE, "strange"])
@pytest.mark.parametrize("kind", KINDS, ids=FIELDS)
def test_code_of_any_kind_is_refused_under_any_name(strangers: Path, name: str, kind: plugins.Kind) -> None:
    for ask in (plugins.load, plugins.place_of):
        with pytest.raises(ConfigError, match=f"{kind.title} '{name}' names code of the package strangers"):
            ask(name, kind)


@pytest.mark.parametrize("name", [STRANGE, "strange"])
def test_code_that_the_project_file_does_not_admit_is_refused_under_any_name(strangers: Path, name: str) -> None:
    for ask in (plugins.check_network_name, plugins.load, plugins.described, lambda name: build_network(name, 10, 32)):
        with pytest.raises(ConfigError, match=f"model '{name}' names code of the package strangers"):
            ask(name)
    assert plugins.own_networks() == []


@pytest.mark.parametrize("field", FIELDS)
def test_a_value_for_a_field_cannot_name_it(strangers: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=refused(field)):
        checked_config("quick", naming(field))


@pytest.mark.parametrize("field", FIELDS)
def test_a_recipe_of_the_project_file_cannot_name_it(
    strangers: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    write_project(monkeypatch, strangers, text=f'[recipes.parts]\n{field} = "{STRANGE}"\nlabel_smoothing = 0\n')
    with pytest.raises(ConfigError, match=refused(field)):
        checked_config("parts", project=load_project(Path("nightshift.toml")))


@pytest.mark.parametrize("field", FIELDS)
def test_a_sweep_cannot_name_it(strangers: Path, field: str) -> None:
    with pytest.raises(ConfigError, match=refused(field)):
        plan("tuned", "quick", {field: [STRANGE, STRANGE + "s"]}, {"label_smoothing": 0})


@pytest.fixture
def trained(strangers: Path) -> Workspace:
    """A published run."""
    workspace = in_memory(strangers / "home")
    ref = known(workspace, 32, 3)
    checkpoint = train_alone(workspace, "run", config_of(epochs=1), ref)
    publish_model(workspace, checkpoint, ref, evaluation.evaluate(workspace, checkpoint, ref))
    return workspace


def renamed(workspace: Workspace, field: str) -> RunRecord:
    """The run's record after somebody who may write to the bucket has put other code into it."""
    record, etag = read_record(workspace.store, "run")
    config = record.train_config().override(naming(field))
    changed = record.changed(config=config.model_dump(), config_digest=config.digest, status="interrupted")
    write_record(workspace.store, changed, etag)
    return read_record(workspace.store, "run")[0]


@pytest.mark.parametrize("field", ["loss", "transform"])
def test_a_stored_record_cannot_name_what_is_trained_with(trained: Workspace, field: str) -> None:
    record = renamed(trained, field)
    with pytest.raises(ConfigError, match=refused(field)):
        train_alone(trained, "run", record.train_config(), record.dataset)


@pytest.mark.parametrize("field", ["loss", "transform"])
def test_a_card_can_name_what_is_trained_with_and_none_of_it_is_run_to_predict(trained: Workspace, field: str) -> None:
    card = read_card(trained.store, NAME, "run")
    section, name = ("loss", "name") if field == "loss" else ("augment", "transform")
    replace_card(trained.store, card.changed(config={**card.config, section: {**card.config[section], name: STRANGE}}))
    Classifier(trained.store, NAME, "run")


def test_a_stored_record_cannot_name_it(trained: Workspace) -> None:
    record = renamed(trained, "model")
    for ask in (
        lambda: train_alone(trained, "run", record.train_config(), record.dataset),
        lambda: export_run(trained, record, "state_dict"),
        lambda: payload_check(record.train_config(), 3),
    ):
        with pytest.raises(ConfigError, match=REFUSED):
            ask()


def test_a_card_cannot_name_it(trained: Workspace) -> None:
    card = read_card(trained.store, NAME, "run")
    replace_card(trained.store, card.changed(config={**card.config, "model": {"name": STRANGE}}))
    with pytest.raises(ConfigError, match=REFUSED):
        Classifier(trained.store, NAME, "run")


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/resnet18", "hf_hub:timm/resnet18", "local-dir:models", "../resnet18", "resnet18.a1_in1k"]
)
def test_timm_is_given_no_address_of_a_network(name: str) -> None:
    with pytest.raises(ConfigError, match="has no network"):
        build_network(f"timm:{name}", 10, 32)


def test_a_file_beside_the_project_file_is_a_network_wherever_the_process_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(monkeypatch, tmp_path)
    (tmp_path / "ournets.py").write_text(NETWORK)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("NIGHTSHIFT_PROJECT", str(tmp_path / "nightshift.toml"))
    assert type(build_network("ournets:PartsNet", 3, 32)).__name__ == "PartsNet"


def test_an_entry_point_is_a_short_name_for_a_network_of_an_admitted_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "ourvision", NETWORK, "1.0", "[nightshift.models]\nparts = ourvision.nets:PartsNet\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    write_project(monkeypatch, tmp_path, ("ourvision",), '[recipes.a]\nmodel = "ourvision.nets:PartsNet"\n')
    assert plugins.load("parts") is plugins.load("ourvision.nets:PartsNet")
    assert plugins.own_networks() == ["ourvision.nets:PartsNet", "parts"]


def test_code_that_an_admitted_module_has_imported_from_elsewhere_is_not_called(
    strangers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (strangers / "ournets.py").write_text("from os import kill\nfrom shutil import rmtree\n")
    for name in ("kill", "rmtree"):
        with pytest.raises(ConfigError, match=rf"model 'ournets:{name}' is \w+:{name}, .* so it is not called"):
            plugins.load(f"ournets:{name}")


def test_what_a_network_is_has_its_package_version_and_a_digest_that_any_change_of_its_files_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path / "site", "ourvision", NETWORK, "1.0")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    write_project(monkeypatch, tmp_path, ("ourvision", "ournets"))
    before = plugins.described("ourvision.nets:PartsNet")
    assert before
    assert before.startswith("ourvision 1.0, sha256 ")
    assert plugins.described("ourvision.nets:PartsNet") == before
    (tmp_path / "site" / "ourvision" / "layers.py").write_text("WIDTH = 16\n")
    after = plugins.described("ourvision.nets:PartsNet")
    assert after != before
    (tmp_path / "ournets.py").write_text(NETWORK)
    assert (plugins.described("ournets:PartsNet") or "").startswith("ournets, sha256 ")


def test_what_a_network_of_a_library_is_has_the_librarys_version_and_nightshifts_own_have_none() -> None:
    assert plugins.described("torchvision:resnet18") == f"torchvision {metadata.version('torchvision')}"
    assert plugins.described("quick_cnn") is None


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ournets:PartsNets", "there is no PartsNets in ournets. Did you mean PartsNet?"),
        ("ournets.more:PartsNet", "cannot be imported: ModuleNotFoundError"),
        ("ournets:WIDTH", "is a int, which cannot be called"),
        ("ournets:", "is not valid: one of your own is named PACKAGE.MODULE:NAME"),
        ("ournets:a.b", "is not valid"),
        (":PartsNet", "is not valid"),
        ("ourvision:PartsNet", "the package ourvision is not installed on this machine"),
        ("torchvision:resnet19", "torchvision has no network 'resnet19' for classification. Did you mean resnet1"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no network"),
        ("quick_cn", "Did you mean quick_cnn?"),
    ],
)
def test_a_name_that_is_none_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, told: str
) -> None:
    write_project(monkeypatch, tmp_path, ("ournets", "ourvision"))
    (tmp_path / "ournets.py").write_text(f"{NETWORK}\nWIDTH = 3\n")
    with pytest.raises(ConfigError) as refused:
        build_network(name, 10, 32)
    assert told in str(refused.value)


@pytest.mark.parametrize(
    "source",
    ["import nothing_of_this_name", "raise ValueError('not today')", "def (:", "import sys; sys.exit(0)", "1 / 0"],
)
def test_a_module_that_cannot_be_imported_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    write_project(monkeypatch, tmp_path)
    (tmp_path / "ournets.py").write_text(source)
    with pytest.raises(ConfigError, match="model 'ournets:PartsNet' cannot be imported: ") as refused:
        plugins.load("ournets:PartsNet")
    assert "\n" not in str(refused.value)
    assert "ournets.py, line 1" in str(refused.value)


def test_a_package_that_is_no_name_of_one_is_refused_in_the_project_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_project(monkeypatch, tmp_path, ("our-vision",))
    with pytest.raises(ConfigError, match=r"plugins\.0"):
        make_config("quick", project=load_project(Path("nightshift.toml")))
