"""TrainConfig: a mistake is refused with a message from which it can be corrected, and stored configs stay readable."""

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import ValidationError

from nightshift.config.recipes import get_recipe, make_config, named, recipe_names
from nightshift.config.sections import is_decisive
from nightshift.config.train import TrainConfig, fields
from nightshift.data.specs import SPECS
from nightshift.errors import ConfigError
from nightshift.plugins import check_network_name

# A second value for each field. A new field has to be entered here.
OTHER: dict[str, Any] = {
    "recipe": "tutorial",
    "seed": 1,
    "model.name": "simple_cnn",
    "start.name": "shrink",
    "start.weights": "hub",
    "start.names": "order",
    "start.shrink": 0.5,
    "start.perturb": 0.1,
    "start.scratch_every": 7,
    "data.dataset": "another",
    "data.max_train_images": 100,
    "data.batch_size": 64,
    "data.drop_last": False,
    "data.normalization": "half",
    "data.sampling": "balanced",
    "optimizer.name": "adamw",
    "optimizer.lr": 0.2,
    "optimizer.momentum": 0.8,
    "optimizer.weight_decay": 0.1,
    "optimizer.ema_decay": 0.5,
    "optimizer.layer_decay": 0.7,
    "optimizer.clip_norm": 1.0,
    "optimizer.accumulate": 2,
    "schedule.name": "cosine",
    "schedule.epochs": 7,
    "schedule.warmup": 0.1,
    "schedule.frozen_epochs": 2,
    "augment.flip": "off",
    "augment.translate": 3,
    "augment.crop": 0.5,
    "augment.randaugment": 9,
    "augment.trivialaugment": True,
    "augment.jitter": 0.4,
    "augment.hue": 0.1,
    "augment.erasing": 0.25,
    "augment.transform": "ours:Dust",
    "augment.mixup": 0.2,
    "augment.cutmix": 1.0,
    "loss.name": "focal",
    "loss.class_weights": "balanced",
    "loss.gamma": 1.0,
    "loss.label_smoothing": 0.2,
    "evaluation.tta": "flip",
    "evaluation.validate_every": 2,
    "evaluation.metric": "loss",
    "evaluation.keep": "best",
    "evaluation.patience": 3,
    "saving.checkpoint_every_steps": 5,
    "saving.checkpoint_every_seconds": None,
    "saving.keep_last": 9,
    "saving.keep_best": False,
    "saving.keep_every_epochs": 4,
    "budget.finish_by": "06:30",
    "budget.max_hours": 8.0,
    "budget.max_cost": 20.0,
    "hardware.deterministic": False,
    "hardware.device": "cpu",
    "hardware.precision": "bfloat16",
    "hardware.compile": "on",
    "hardware.nproc_per_node": 2,
    "hardware.loader_threads": 3,
    "tracking.tensorboard": True,
    "publish.triton": True,
}
FIELDS = dict(fields(TrainConfig))
# What a value above makes sense beside only, and what makes none beside another.
NEEDED: dict[str, dict[str, Any]] = {
    "loss.gamma": {"loss.name": "focal"},
    "optimizer.layer_decay": {"optimizer.name": "adam"},
    "schedule.frozen_epochs": {"optimizer.name": "adam"},
    "evaluation.keep": {"evaluation.validate_every": 1},
    "evaluation.patience": {"evaluation.validate_every": 1},
}
CONTRADICTING = {"augment.trivialaugment", "loss.class_weights"}

# What 312a4ed stored of the recipe quick, with two fields replaced.
FORMAT_1 = {
    "recipe": "quick",
    "model": "quick_cnn",
    "dataset": "cifar10",
    "max_train_images": 1280,
    "epochs": 3,
    "batch_size": 256,
    "drop_last": True,
    "optimizer": "muon",
    "lr": 0.05,
    "momentum": 0.6,
    "weight_decay": 0.0005,
    "schedule": "linear",
    "ema_decay": 0.9,
    "label_smoothing": 0.1,
    "flip": "alternating",
    "translate": 2,
    "normalization": "dataset",
    "tta": "off",
    "seed": 0,
    "checkpoint_every_steps": None,
    "checkpoint_every_seconds": 30.0,
    "keep_last": 3,
    "keep_best": True,
    "keep_every_epochs": None,
    "deterministic": True,
    "device": "auto",
    "precision": "auto",
    "compile": "off",
    "tensorboard": False,
    "nproc_per_node": 1,
}


def refusal_of(overrides: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as refusal:
        make_config("quick", overrides)
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
        ("crop", 0, "greater than 0"),
        ("crop", 1.5, "less than or equal to 1"),
        ("randaugment", 31, "less than or equal to 30"),
        ("erasing", 2, "less than or equal to 1"),
        ("hue", 0.6, "less than or equal to 0.5"),
        ("mixup", -1, "greater than or equal to 0"),
        ("clip_norm", 0, "greater than 0"),
        ("accumulate", 0, "greater than or equal to 1"),
        ("class_weights", "some", "'off' or 'balanced'"),
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
    assert all(path in message for path in FIELDS)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"randaugment": 9, "trivialaugment": True}, "are two ways to do the same"),
        ({"mixup": 0.2, "batch_size": 1}, "data.batch_size=1 has only one"),
        ({"accumulate": 512}, "optimizer.accumulate=512 divides a batch into more parts than data.batch_size=256 has"),
        ({"class_weights": "balanced", "sampling": "balanced"}, "both make up for rare classes: set one"),
        ({"loss": "binary", "class_weights": "balanced", "cutmix": 1}, "is of two: set data.sampling=balanced instead"),
        ({"gamma": 3}, "loss.gamma=3.0 is of the loss focal, and loss.name=cross_entropy: set loss.name=focal"),
    ],
)
def test_what_makes_no_sense_together_is_refused_in_one_sentence(overrides: dict[str, Any], told: str) -> None:
    message = refusal_of(overrides)
    assert told in message
    assert "\n" not in message


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
    parsed = make_config("tutorial", {field: text}).value_of(field)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize("field", sorted(FIELDS.keys() - {"recipe"}))
def test_every_fields_value_can_be_given_as_text(field: str) -> None:
    config = make_config("quick")
    assert make_config("quick", {field: str(config.value_of(field))}) == config


def test_a_number_and_its_text_give_the_same_digest() -> None:
    assert len({make_config("quick", {"lr": lr}).digest for lr in (1, 1.0, "1", "1e0")}) == 1


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_names_things_that_exist(name: str) -> None:
    recipe = get_recipe(name)
    assert TrainConfig.parse(recipe.config.model_dump()) == recipe.config
    assert recipe.config.recipe == name
    check_network_name(recipe.config.model.name)
    assert recipe.config.data.dataset in SPECS
    assert recipe.detail


def test_an_unknown_recipe_is_refused_with_a_list_of_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'quik'") as refusal:
        make_config("quik")
    assert all(name in str(refusal.value) for name in recipe_names())


def test_the_recipe_is_not_one_of_its_own_overrides() -> None:
    assert "--recipe" in refusal_of({"recipe": "tutorial"})


def test_every_field_says_what_it_is_for() -> None:
    assert [path for path, field in FIELDS.items() if not field.description] == []


def test_every_field_of_yesterday_is_named_as_it_was() -> None:
    assert {name: TrainConfig.path_of(name).removesuffix(".name").rpartition(".")[2] for name in FORMAT_1} == {
        name: name for name in FORMAT_1
    }


@pytest.mark.parametrize("path", FIELDS)
def test_the_digest_changes_with_a_field_if_and_only_if_the_field_decides_bits(path: str) -> None:
    config = make_config("quick", NEEDED.get(path))
    changed = config.override({path: OTHER[path]})
    assert changed != config
    assert (changed.digest == config.digest) == (not is_decisive(FIELDS[path]))


def test_what_says_only_how_often_and_where_decides_no_bits() -> None:
    assert {path for path, field in FIELDS.items() if not is_decisive(field)} == {
        "recipe",
        "evaluation.tta",
        "saving.checkpoint_every_steps",
        "saving.checkpoint_every_seconds",
        "saving.keep_last",
        "saving.keep_best",
        "saving.keep_every_epochs",
        "budget.finish_by",
        "budget.max_hours",
        "budget.max_cost",
        "hardware.device",
        "hardware.nproc_per_node",
        "hardware.loader_threads",
        "tracking.tensorboard",
        "publish.triton",
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {"lr": 0.1, "optimizer": "sgd"},
        {"optimizer.lr": "0.1", "optimizer.name": "sgd"},
        {"optimizer": {"lr": 0.1, "name": "sgd"}},
    ],
)
def test_a_field_is_named_in_short_in_full_or_by_its_section(overrides: dict[str, Any]) -> None:
    assert named(make_config("quick", overrides)) == ("quick", {"optimizer.lr": 0.1, "optimizer.name": "sgd"})


def test_a_name_that_several_fields_have_is_refused_with_all_of_them() -> None:
    assert "model.name or start.name or optimizer.name or schedule.name" in refusal_of({"name": "sgd"})


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_config_is_its_recipe_and_what_differs_from_it(recipe: str) -> None:
    config = make_config(recipe, {path: OTHER[path] for path in OTHER.keys() - CONTRADICTING - {"recipe"}})
    assert make_config(*named(config)) == config


def test_a_config_of_format_1_is_read_as_one_of_today() -> None:
    assert TrainConfig.parse(FORMAT_1) == make_config("quick", {"max_train_images": 1280, "epochs": 3})


def test_a_stored_config_of_before_augmentation_losses_and_sampling_is_read_as_one_without_them() -> None:
    config = make_config("quick")
    stored = config.model_dump()
    since = {
        "data": ("sampling",),
        "optimizer": ("clip_norm", "accumulate"),
        "augment": ("crop", "randaugment", "trivialaugment", "jitter", "hue", "erasing", "mixup", "cutmix"),
        "loss": ("name", "class_weights", "gamma"),
    }
    for section, names in since.items():
        for name in names:
            del stored[section][name]
    assert TrainConfig.parse(stored) == config
    assert (config.augment.per_image, config.augment.mixes) == (False, False)


def test_a_config_of_a_newer_format_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"format 3; this one reads up to 2\): update nightshift"):
        TrainConfig.parse({**make_config("quick").model_dump(), "format": 3})


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        make_config("quick").schedule.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("name", recipe_names())
def test_a_config_survives_being_stored(name: str) -> None:
    config = make_config(name, {"seed": 3, "checkpoint_every_seconds": None, "checkpoint_every_steps": 7, "lr": 0.1})
    restored = TrainConfig.parse(json.loads(json.dumps(config.model_dump())))
    assert restored == config
    assert restored.digest == config.digest


def test_a_stored_run_may_change_what_does_not_decide_its_result_and_nothing_else() -> None:
    config = make_config("quick", {"nproc_per_node": 8})
    assert config.resumed_with({"nproc_per_node": "auto"}) == make_config("quick", {"nproc_per_node": "auto"})
    with pytest.raises(ConfigError, match=r"^optimizer.lr: decides the result"):
        config.resumed_with({"lr": "0.1", "keep_last": "1"})


def test_the_seed_date_is_another_number_each_night_and_the_config_has_the_number() -> None:
    tokyo = timezone(timedelta(hours=9))
    seeds = [make_config("quick", {"seed": "date"}, datetime(2026, 11, day, 2, tzinfo=tokyo)).seed for day in (25, 26)]
    assert seeds == [20261125, 20261126]
