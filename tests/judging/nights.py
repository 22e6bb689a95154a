"""Nights of a team's own images whose models need no training: each always says the same class."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from models import build_model
from nightshift.data import batches
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import make_snapshot
from nightshift.judging import evaluation
from nightshift.judging.answers import PREDICTIONS
from nightshift.records.lease import RunSpec
from nightshift.records.lease import hold as hold_run
from nightshift.records.versions import publish_version
from nightshift.refs import DatasetRef, ModelRef
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.data.pictures import config, picture, write
from tests.records.test_versions import card_of

NAME = "photos"
HALVES = {"test": 0.5, "validation": 0.1, "by": "image"}


def images(
    workspace: Workspace,
    root: Path,
    classes: Mapping[str, range],
    table: str = "",
    size: int = 32,
    split: Mapping[str, object] = HALVES,
) -> DatasetRef:
    """Tonight's images: a picture for each number of each class. With a `table` they are listed there."""
    write(root, {f"{name}/{number:05}.png": picture(number) for name, of in classes.items() for number in of})
    if table:
        (root / "labels.csv").write_text(table)
    source = config(root / "labels.csv" if table else root, image_size=size, split=dict(split))
    return pack_snapshot(workspace, make_snapshot(workspace.store, NAME, source))


def publish(
    workspace: Workspace, ref: DatasetRef, version: str, says: str | None, network: str = "simple_cnn", **changed: Any
) -> ModelRef:
    """A run of this night, and its published version, which says one class of every image; None: whatever it says."""
    dataset, run_config = open_dataset(workspace, ref), small_config(dataset=NAME, epochs=1)
    with hold_run(workspace.store, RunSpec(version, run_config, ref, {"torch": "x"}, 10), 60):
        pass
    torch.manual_seed(int(hashlib.sha256(version.encode()).hexdigest()[:8], 16))
    model = build_model("simple_cnn", len(dataset.classes), 32).eval()
    weights = model.state_dict()
    if says is None:  # of noise, an untrained network says the same all the time; so it says each class of a half
        inputs = batches.to_input(
            dataset.test_images[:], *batches.normalizer(dataset, small_config(normalization="dataset"))
        )
        weights["fc2.bias"] -= evaluation.predict(model, inputs).mean(0)
    else:
        weights["fc2.weight"].zero_()
        weights["fc2.bias"].copy_(torch.tensor([float(name == says) for name in dataset.classes]))
    files = {PREDICTIONS: predictions(dataset, says or dataset.classes[0]), "weights.safetensors": save(weights)}
    card = card_of(
        version,
        name=NAME,
        classes=dataset.classes,
        dataset_digest=ref.digest,
        config={**run_config.model_dump(), "model": {"name": network}},
        mean=dataset.mean,
        std=dataset.std,
        weights_sha256=hashlib.sha256(version.encode()).hexdigest(),
        **changed,
    )
    publish_version(workspace.store, card, files)
    return card.ref()


def predictions(dataset: Dataset, says: str) -> bytes:
    """The file of a version that says one class of every test image."""
    logits = torch.zeros(len(dataset.test_labels), len(dataset.classes))
    logits[:, dataset.classes.index(says)] = 1
    return evaluation.predictions_file(evaluation.answers_to(logits, dataset.test_labels.long()), dataset)
