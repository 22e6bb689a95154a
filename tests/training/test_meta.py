"""A step on a GPU, where there is none: meta tensors stand for its memory.

They have shapes and no values. So what lies on the other device by mistake is an error, and so is each question that
the CPU would have to wait for. torch's fake CUDA tensors cannot stand for it: their backward pass needs a driver.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nightshift.config.recipes import make_config, recipe_names
from nightshift.data.batches import Batches, make_plan, resident
from nightshift.data.datasets import Dataset
from nightshift.hardware import Hardware
from nightshift.training.loop import Loop
from nightshift.training.ranks import ALONE
from nightshift.training.recorder import Recorder
from tests.gpu.loading import SIDE, photographs, stored_images
from tests.gpu.stage import Stage
from tests.made_up import made_up

META = torch.device("meta")
OVERRIDES: dict[str, Mapping[str, Any]] = {
    **{name: {} for name in recipe_names()},
    "finetune": {"start.name": "scratch"},  # the weights of others are not at hand
}
OTHERS: dict[str, Mapping[str, Any]] = {
    "sgd with clipped gradients in parts": {"optimizer.name": "sgd", "clip_norm": 1.0, "accumulate": 2},
    "mixed images": {"mixup": 0.2, "cutmix": 1.0},
    "focal loss of weighed classes": {"loss.name": "focal", "class_weights": "balanced", "label_smoothing": 0.0},
    "transforms of torchvision": {"randaugment": 2, "erasing": 0.3},
    "balanced sampling and layers of several rates": {
        **{"optimizer.name": "adamw", "lr": 1e-3, "momentum": 0.9},
        **{"sampling": "balanced", "layer_decay": 0.5},
    },
}


class OnMeta(Hardware):
    def autocast(self) -> nullcontext[None]:  # there is none for meta tensors
        return nullcontext()


class Copies(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is copied to the device, and is waited for."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waited_for: list[str] = []
        self.begun = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and result.is_meta
            and any(isinstance(arg, Tensor) and arg.is_cpu for arg in args)
        ):
            if (kwargs or {}).get("non_blocking"):
                self.begun += 1
            else:
                self.waited_for.append(f"{func}: {[tuple(arg.shape) for arg in args if isinstance(arg, Tensor)]}")
        return result


def loop_of(recipe: str, dataset: Dataset | None = None, **overrides: Any) -> Loop:
    config = make_config(recipe, {"batch_size": 16, **overrides})
    dataset = dataset or made_up(32, 10, train=96)
    plan = make_plan(config, dataset)
    hardware = OnMeta(META, "float32", compiled=False, deterministic=True)
    loop = Loop(config, dataset, plan, hardware, ALONE, Recorder())
    # Before the first step pixels and labels are looked at; from then on they lie on the device.
    loop._batches = Batches(resident(dataset, config, META), config, plan, ALONE.share_of)
    return loop


def take_steps(loop: Loop) -> Copies:
    copies = Copies()
    with copies:
        for step in range(3):
            loop._train_step(*loop._batches.batch(step))
    return copies


@pytest.mark.parametrize("recipe", OVERRIDES)
def test_a_step_of_each_recipe_has_all_on_the_device_and_waits_for_nothing(recipe: str) -> None:
    copies = take_steps(loop_of(recipe, **OVERRIDES[recipe]))
    assert copies.waited_for == []
    assert copies.begun, "the numbers of the images are drawn on the CPU"


@pytest.mark.parametrize("name", OTHERS)
def test_a_step_of_other_configs_does_so_too(name: str) -> None:
    assert take_steps(loop_of("quick", **OTHERS[name])).waited_for == []


def test_encoded_images_are_augmented_on_the_device(tmp_path: Path) -> None:
    encoded = stored_images(Stage(tmp_path), photographs(96), 1)
    loop = loop_of("quick", replace(made_up(SIDE, 10, train=96), train_images=encoded), translate=2)
    images, _ = loop._batches.batch(0)
    assert images.shape == (16, SIDE, SIDE, 3)
    assert images.device == META
    assert take_steps(loop).waited_for == []


def misplace_input(loop: Loop) -> None:
    loop._scale = torch.ones(3, 1, 1)


def misplace_parameter(loop: Loop) -> None:
    head = next(module for module in loop._state.model.modules() if isinstance(module, nn.Linear))
    head.weight = nn.Parameter(torch.zeros(head.weight.shape))


def misplace_average(loop: Loop) -> None:
    assert loop._state.average
    loop._state.average.to_empty(device="cpu")


def ask(loop: Loop) -> None:
    loss = loop._loss
    loop._loss = lambda *of: loss(*of) * loss(*of).item()


@pytest.mark.parametrize(
    "break_it", [misplace_input, misplace_parameter, misplace_average, ask], ids=lambda made: made.__name__
)
def test_what_is_misplaced_or_asked_for_is_found(break_it: Callable[[Loop], None]) -> None:
    loop = loop_of("quick")
    break_it(loop)
    with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|cpu"):
        take_steps(loop)


def test_a_copy_that_is_waited_for_is_found() -> None:
    loop = loop_of("quick")
    loss = loop._loss
    loop._loss = lambda *of: loss(*of) * torch.ones(()).to(META)
    assert len(take_steps(loop).waited_for) == 3
