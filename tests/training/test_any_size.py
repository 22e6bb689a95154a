"""Images of any size and any number of classes are trained on; what does not fit is told before the first step."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nightshift.checkpoints.payload import read_payload
from nightshift.checkpoints.verify import verify_checkpoints
from nightshift.errors import ConfigError
from nightshift.records.run import read_record
from nightshift.training.run import train_alone
from nightshift.training.state import payload_check, show_first_images
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.made_up import config_of, in_memory, known, made_up, whole_and_in_parts

SETS = [(16, 2), (24, 3), (48, 300)]


@pytest.fixture
def here(tmp_path: Path) -> Workspace:
    return in_memory(tmp_path)


@pytest.mark.parametrize(("size", "classes"), SETS)
def test_a_run_on_images_of_any_size_stopped_and_resumed_ends_with_the_same_bits(
    here: Workspace, size: int, classes: int
) -> None:
    dataset = known(here, size, classes, train=97)  # the last batch of an epoch has one image
    config = config_of(flip="alternating", translate=4, drop_last=False)
    whole, parts = whole_and_in_parts(here, config, dataset, (1, 9))
    ends = [state_sha256(read_payload(here.store, end)) for end in (whole, parts)]
    assert parts.step == whole.step == 21
    assert ends[0] == ends[1]


def test_a_network_learns_made_up_images_of_another_size(here: Workspace) -> None:
    train_alone(here, "run", config_of(), known(here, 24, 3))
    curve = read_record(here.store, "run")[0].curve
    assert curve[-1].loss < curve[0].loss


def test_a_stored_run_says_how_many_classes_there_are_so_that_its_payloads_can_be_checked(here: Workspace) -> None:
    train_alone(here, "run", config_of(epochs=1), known(here, 48, 300))
    record, _ = read_record(here.store, "run")
    assert (record.dataset.classes, record.dataset.image_size) == (300, 48)
    for classes, bad in ((300, False), (10, True)):
        check = payload_check(record.train_config(), classes, record.dataset.image_size)
        assert [problem is not None for _, problem in verify_checkpoints(here.store, record, check)] == [bad]


@pytest.mark.parametrize(
    ("size", "overrides", "told"),
    [
        (48, {"model": "simple_cnn"}, "a side of 32 pixels, and these have 48.*quick_cnn, resnet18, speednet$"),
        (16, {"model": "speednet"}, "a side of 17 to 512 pixels, and these have 16.*quick_cnn, resnet18$"),
        (16, {"translate": 16}, "augment.translate=16 shifts images of 16 by 16 pixels.*15 is the most"),
    ],
)
def test_what_does_not_fit_the_images_is_refused_before_anything_is_recorded(
    here: Workspace, size: int, overrides: dict[str, Any], told: str
) -> None:
    dataset = known(here, size, 3)
    with pytest.raises(ConfigError, match=told):
        train_alone(here, "run", config_of(**overrides), dataset)
    assert not list(here.store.list("runs/"))


@pytest.mark.parametrize(("size", "seen"), [(24, 5000), (32, 5000), (64, 1250), (512, 19)])
def test_a_network_sees_no_more_pixels_before_the_first_step_than_of_cifar10(size: int, seen: int) -> None:
    class Watching(torch.nn.Module):
        def initialize_from(self, images: torch.Tensor) -> None:
            self.images = len(images)

    few = made_up(16, 2, train=1, test=1)
    many = torch.zeros(1, 1, 1, 1, dtype=torch.uint8).expand(6000, size, size, 3)
    watching = Watching()
    show_first_images(watching, config_of(), type(few)(**{**vars(few), "train_images": many}))
    assert watching.images == seen
