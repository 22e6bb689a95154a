"""What a config names is looked for before anything starts."""

import pytest

from nightshift.config.project import DatasetConfig, Project, RecipeConfig
from nightshift.data.names import check_flow, checked_config, name_of_place, named_config
from nightshift.errors import ConfigError

PROJECT = Project(
    datasets={"parts": DatasetConfig(source="s3://factory/parts/")},
    recipes={"parts": RecipeConfig.model_validate({"dataset": "parts"})},
)


@pytest.mark.parametrize(
    ("flow", "recipe", "told"),
    [
        ("retrain", "quick", "cifar10 is nightshift's own data set.* Those of the project file are: parts"),
        ("train-cifar", "parts", "the flow train-cifar trains on cifar10, not on 'parts'"),
    ],
)
def test_a_flow_refuses_a_data_set_that_it_does_not_train_on(flow: str, recipe: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_flow(flow, checked_config(recipe, project=PROJECT), PROJECT)


def test_a_data_set_is_named_after_the_place_of_its_images_unless_it_is_given_a_name() -> None:
    assert named_config("parts", project=PROJECT, images="holiday/").data.dataset == name_of_place("holiday")
    assert named_config("quick", {"dataset": "mine"}, images="holiday/").data.dataset == "mine"


def test_a_config_can_be_made_again_when_its_data_set_is_gone_but_nothing_new_is_begun_with_it() -> None:
    assert named_config("quick", {"dataset": "gone"}).data.dataset == "gone"
    with pytest.raises(ConfigError, match="there is no data set 'gone'"):
        checked_config("quick", {"dataset": "gone"})
