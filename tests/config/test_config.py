"""Settings and TrainConfig: a mistake is refused with a message from which it can be corrected."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from models import known_models
from nightshift.config.recipes import get_recipe, make_config, recipe_names
from nightshift.config.train import TrainConfig
from nightshift.data.specs import SPECS
from nightshift.errors import ConfigError, SettingsError
from nightshift.settings import S3Settings, Settings

# A second value for each field. A new field has to be entered here: its author decides whether it decides bits.
OTHER: dict[str, Any] = {
    "recipe": "tutorial",
    "model": "simple_cnn",
    "dataset": "another",
    "max_train_images": 100,
    "epochs": 7,
    "batch_size": 64,
    "drop_last": False,
    "optimizer": "adamw",
    "lr": 0.2,
    "momentum": 0.8,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "ema_decay": 0.5,
    "label_smoothing": 0.2,
    "flip": "off",
    "translate": 3,
    "normalization": "half",
    "tta": "flip",
    "seed": 1,
    "checkpoint_every_steps": 5,
    "checkpoint_every_seconds": None,
    "keep_last": 9,
    "keep_best": False,
    "keep_every_epochs": 4,
    "deterministic": False,
    "device": "cpu",
    "precision": "bfloat16",
    "compile": "on",
    "tensorboard": True,
    "nproc_per_node": 2,
}
WITHOUT_EFFECT_ON_BITS = {
    "recipe",
    "checkpoint_every_steps",
    "checkpoint_every_seconds",
    "keep_last",
    "keep_best",
    "keep_every_epochs",
    "tta",
    "tensorboard",
    "device",
    "nproc_per_node",
}


def refusal_of(overrides: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refusal:
        make_config("quick", overrides)
    return str(refusal.value)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment without settings, in an empty directory."""
    for name in variables(Settings):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return monkeypatch


def variables(model: type[BaseModel], prefix: str = "NIGHTSHIFT_") -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}".upper()
        if field.annotation is S3Settings:
            yield from variables(S3Settings, f"{prefix}{name}__")


def settings_refusal() -> str:
    with pytest.raises(SettingsError) as refusal:
        Settings.load()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("epochs", 0, "greater than or equal to 1"),
        ("epochs", "0", "greater than or equal to 1"),
        ("epochs", 10_001, "less than or equal to 10000"),
        ("lr", 0, "greater than 0"),
        ("momentum", 1, "less than 1"),
        ("translate", 17, "less than or equal to 16"),
        ("seed", 2**31, f"less than {2**31}"),
        ("keep_last", 0, "greater than or equal to 1"),
        ("checkpoint_every_seconds", 0, "greater than 0"),
        ("lr", float("nan"), "a finite number"),
        ("epochs", "many", "a valid integer"),
        ("epochs", None, "a valid integer"),
        ("seed", 1.5, "a valid integer"),
        ("lr", "fast", "a valid number"),
        ("keep_best", "perhaps", "a valid boolean"),
        ("flip", "perhaps", "'off', 'random' or 'alternating'"),
        ("model", 3, "a valid string"),
        ("optimizer", "rmsprop", "'sgd', 'adam', 'adamw' or 'muon'"),
        ("schedule", "steps", "'constant', 'triangular', 'one_cycle', 'cosine' or 'linear'"),
        ("device", "tpu", "'auto', 'cpu' or 'cuda'"),
        ("precision", "float16", "'float32', 'bfloat16' or 'auto'"),
    ],
)
def test_a_bad_value_is_refused_with_the_field_the_value_and_what_is_allowed(
    field: str, value: Any, allowed: str
) -> None:
    message = refusal_of({field: value})
    assert f"{field}={value!r}" in message
    assert allowed in message


@pytest.mark.parametrize(("wrong", "right"), [("epoch", "epochs"), ("batchsize", "batch_size"), ("modle", "model")])
def test_an_unknown_field_is_refused_with_the_nearest_and_a_list_of_all(wrong: str, right: str) -> None:
    message = refusal_of({wrong: 3})
    assert repr(wrong) in message
    assert f"Did you mean {right}?" in message
    assert all(name in message for name in TrainConfig.model_fields)


def test_several_mistakes_are_all_named_at_once() -> None:
    message = refusal_of({"epochs": 0, "lr": "fast", "optimizer": "rmsprop", "epoch": 2})
    assert all(part in message for part in ("epochs=0", "lr='fast'", "optimizer='rmsprop'", "'epoch'"))


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("epochs", "3", 3),
        ("lr", "1e-3", 0.001),
        ("keep_best", "true", True),
        ("keep_best", "false", False),
        ("optimizer", "adam", "adam"),
        ("checkpoint_every_seconds", "none", None),
        ("checkpoint_every_seconds", "2.5", 2.5),
        ("checkpoint_every_steps", "10", 10),
    ],
)
def test_text_from_the_command_line_is_parsed_as_the_fields_type(field: str, text: str, value: Any) -> None:
    parsed = getattr(make_config("tutorial", {field: text}), field)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("field", sorted(TrainConfig.model_fields.keys() - {"recipe"}))
def test_every_fields_value_can_be_given_as_text(field: str) -> None:
    config = make_config("quick")
    assert make_config("quick", {field: str(getattr(config, field))}) == config


def test_a_number_and_its_text_give_the_same_digest() -> None:
    assert len({make_config("quick", {"lr": lr}).digest for lr in (1, 1.0, "1", "1e0")}) == 1


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_names_things_that_exist(name: str) -> None:
    recipe = get_recipe(name)
    assert TrainConfig.parse(recipe.config.model_dump()) == recipe.config
    assert recipe.config.recipe == name
    assert recipe.config.model in known_models()
    assert recipe.config.dataset in SPECS
    assert recipe.detail


def test_an_unknown_recipe_is_refused_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'quik'") as refusal:
        make_config("quik")
    assert all(name in str(refusal.value) for name in recipe_names())


def test_the_recipe_is_not_one_of_its_own_overrides() -> None:
    assert "--recipe" in refusal_of({"recipe": "tutorial"})


@pytest.mark.parametrize("model", [TrainConfig, Settings, S3Settings])
def test_every_field_says_what_it_is_for(model: type[BaseModel]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_the_fields_the_design_promises_exist() -> None:
    promised = """
        recipe model dataset epochs batch_size optimizer lr momentum weight_decay schedule label_smoothing flip
        translate seed checkpoint_every_steps checkpoint_every_seconds keep_last deterministic device precision
        compile nproc_per_node
    """
    assert set(promised.split()) <= TrainConfig.model_fields.keys()


@pytest.mark.parametrize("field", TrainConfig.model_fields)
def test_the_digest_changes_with_a_field_if_and_only_if_the_field_decides_bits(field: str) -> None:
    config = make_config("quick")
    changed = config.override({field: OTHER[field]})
    assert changed != config
    assert (changed.digest == config.digest) == (field in WITHOUT_EFFECT_ON_BITS)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_config("quick").epochs = 3


@pytest.mark.parametrize("name", recipe_names())
def test_a_config_survives_being_stored(name: str) -> None:
    config = make_config(name, {"seed": 3, "checkpoint_every_seconds": None, "checkpoint_every_steps": 7, "lr": 0.1})
    restored = TrainConfig.parse(json.loads(json.dumps(config.model_dump())))
    assert restored == config
    assert restored.digest == config.digest


def test_an_endpoint_without_a_bucket_is_refused_with_the_variable_to_set(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NIGHTSHIFT_S3__ENDPOINT_URL", "http://localhost:9000")
    assert "NIGHTSHIFT_S3__BUCKET" in settings_refusal()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NIGHTSHIFT_LEASE_SECONDS", "abc"),
        ("NIGHTSHIFT_LEASE_SECONDS", "5"),
        ("NIGHTSHIFT_S3", "abc"),
        ("NIGHTSHIFT_S3__ENDPOINT_URL", "localhost:9000"),
        ("NIGHTSHIFT_S3__BUCKET", "ab"),
        ("NIGHTSHIFT_S3__CHECKSUMS", "sometimes"),
        ("NIGHTSHIFT_S3__ALLOW_UNFENCED", "perhaps"),
    ],
)
def test_a_value_that_does_not_parse_is_refused_with_its_variable(
    environment: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    environment.setenv(variable, value)
    assert f"{variable}:" in settings_refusal()


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("NIGHTSHIFT_S3_BUCKET", "NIGHTSHIFT_S3__BUCKET"),
        ("NIGHTSHIFT_LEASE_SECOND", "NIGHTSHIFT_LEASE_SECONDS"),
    ],
)
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_an_unknown_variable_is_refused_with_the_nearest(
    environment: pytest.MonkeyPatch, place: str, wrong: str, right: str
) -> None:
    if place == ".env":
        Path(".env").write_text(f"{wrong}=5\n")
    else:
        environment.setenv(wrong, "5")
    message = settings_refusal()
    assert wrong in message
    assert f"Did you mean {right}?" in message


def test_variables_of_others_are_left_alone_in_the_environment_and_in_the_file(
    environment: pytest.MonkeyPatch,
) -> None:
    environment.setenv("AWS_REGION", "eu-west-1")
    Path(".env").write_text("PREFECT_API_URL=http://localhost:4200/api\n")
    assert Settings.load().s3 == S3Settings()


def test_the_file_in_the_current_directory_is_read_and_the_environment_wins(environment: pytest.MonkeyPatch) -> None:
    Path(".env").write_text("NIGHTSHIFT_LEASE_SECONDS=7\nNIGHTSHIFT_S3__BUCKET=team\nNIGHTSHIFT_S3__PREFIX=file\n")
    environment.setenv("NIGHTSHIFT_S3__PREFIX", "environment")
    settings = Settings.load()
    assert (settings.lease_seconds, settings.s3.bucket, settings.s3.prefix) == (7, "team", "environment")


@pytest.mark.parametrize("home", [None, "here", "/there", "~/mine"])
def test_home_is_absolute_after_loading(environment: pytest.MonkeyPatch, tmp_path: Path, home: str | None) -> None:
    environment.setenv("HOME", str(tmp_path / "user"))
    if home:
        environment.setenv("NIGHTSHIFT_HOME", home)
    expected = {None: tmp_path / ".nightshift", "here": tmp_path / "here", "/there": Path("/there")}
    assert Settings.load().home == expected.get(home, tmp_path / "user" / "mine").resolve()


def test_the_embedded_server_is_used_if_and_only_if_no_bucket_is_named(environment: pytest.MonkeyPatch) -> None:
    assert Settings.load().s3.embedded
    environment.setenv("NIGHTSHIFT_S3__BUCKET", "team")
    assert not Settings.load().s3.embedded
