"""A team with images of its own: a folder a class, and a project file that deploys a recipe for them."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from nightshift.errors import RunNotFoundError
from nightshift.records.history import read_history
from nightshift.records.run import read_record
from nightshift.storage.store import Store

CLASSES = ("bolt", "nut", "screw")
DATASET = """
[datasets.parts]
source = "images"             # beside this file
image_size = 32
rules = {few_images = "off"}

[recipes.parts]
base = "tutorial"
dataset = "parts"
epochs = 2
checkpoint_every_steps = 2
"""
EVERY_NIGHT = DATASET.replace("image_size", "retrain_unchanged = true\nimage_size")
"""The same, trained on also when nothing has changed."""
DEPLOYMENT = """
[deployments.parts]
recipe = "parts"
cron = "0 3 * * *"
timezone = "Europe/Berlin"
"""


def write_images(folder: Path, numbers: Iterable[int]) -> None:
    """Each number is another picture, in a folder of its class."""
    for number in numbers:
        path = folder / "images" / CLASSES[number % len(CLASSES)] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)


def transitions_of(store: Store) -> list[str]:
    """The runs that have been champion, the live one last."""
    return [transition.run_id for transition in read_history(store, "parts").transitions]


def has_saved(store: Store, run_id: str) -> bool:
    """Whether a run has begun, and has a checkpoint."""
    try:
        return bool(read_record(store, run_id)[0].checkpoints)
    except RunNotFoundError:
        return False
