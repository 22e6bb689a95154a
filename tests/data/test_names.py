"""What a config names exists, and fits the images and the classes there are."""

import json
import subprocess
import sys

import pytest

from nightshift.config.recipes import make_config
from nightshift.data.names import check_classes, check_fits
from nightshift.errors import ConfigError
from nightshift.values import LONGEST_CLASS_NAMES, MOST_CLASSES


@pytest.mark.parametrize("size", [16, 17, 32, 96, 512])
def test_the_quick_recipe_fits_images_of_every_size(size: int) -> None:
    check_fits(make_config("quick"), size)


@pytest.mark.parametrize("size", [-1, 0, 15, 513, 10**9])
def test_a_size_that_no_images_have_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"image_size={size} is not valid: images have a side of 16 to 512 pixels"):
        check_fits(make_config("quick"), size)


def test_a_network_that_takes_no_images_of_this_size_is_told_without_torch() -> None:
    program = """
import sys
from nightshift.config.recipes import make_config
from nightshift.data.names import check_fits
from nightshift.errors import ConfigError
try:
    check_fits(make_config("tutorial"), 96)
except ConfigError as error:
    print(error)
print(sorted({"torch", "numpy", "prefect"} & sys.modules.keys()))
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.splitlines() == [
        "model 'simple_cnn' takes images with a side of 32 pixels, and these have 96. "
        "Models that take these: quick_cnn, resnet18, speednet",
        "[]",
    ]


def test_the_most_and_the_longest_classes_fit() -> None:
    check_classes(["cat", "", "a\nb"])
    check_classes([str(number) for number in range(MOST_CLASSES)])
    names = [f"{number:0998}" for number in range(LONGEST_CLASS_NAMES // 1002)]
    assert LONGEST_CLASS_NAMES - 1002 < len(json.dumps(names)) <= LONGEST_CLASS_NAMES
    check_classes(names)


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        ([], "has 0 classes: it takes 2 to 100,000"),
        (["cat"], "has 1 classes"),
        ([str(number) for number in range(MOST_CLASSES + 1)], "has 100,001 classes"),
        (["cat", "dog", "cat"], "two classes of the data set have the same name"),
        (["cat", "caf\udce9"], r"no text in UTF-8: 'caf\\udce9'"),
        (["cat", "x" * 1001], "has 1,001 characters, and 1,000 are the most"),
        ([f"{number:0200}" for number in range(50_000)], "50,000 classes have more than 8,000,000 bytes together"),
    ],
)
def test_classes_that_no_card_could_hold_are_refused(classes: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_classes(classes)
