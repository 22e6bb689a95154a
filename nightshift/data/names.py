"""Fast checks that what a config names exists and fits: without torch, numpy, Prefect or a server."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from models.names import check_image_size
from nightshift.config.project import DatasetConfig, Project
from nightshift.config.recipes import make_config
from nightshift.config.sections import LOSSES
from nightshift.config.train import TrainConfig
from nightshift.data.specs import SPECS
from nightshift.errors import ConfigError, SourceError
from nightshift.explain import near_miss
from nightshift.ids import parse_dataset_name
from nightshift.plugins import check_names_of_code, is_own, library_of
from nightshift.text import is_utf8
from nightshift.values import LARGEST_IMAGE, LONGEST_CLASS_NAME, LONGEST_CLASS_NAMES, MOST_CLASSES, SMALLEST_IMAGE


def named_config(
    recipe: str,
    overrides: Mapping[str, Any] | None = None,
    night: datetime | None = None,
    project: Project | None = None,
    images: str | None = None,
) -> TrainConfig:
    """A recipe's config with some fields replaced, after a check of its names; its data set may be gone by now.

    Args:
        project: what else there are recipes in.
        images: the place of the images. The data set is named after it, unless `overrides` name one.

    Raises:
        ConfigError: as `make_config` and `check_names`.
    """
    if images is not None:
        overrides = {"data.dataset": name_of_place(images), **(overrides or {})}
    config = make_config(recipe, overrides, night, project)
    check_names(config)
    return config


def checked_config(
    recipe: str,
    overrides: Mapping[str, Any] | None = None,
    night: datetime | None = None,
    project: Project | None = None,
    images: str | None = None,
) -> TrainConfig:
    """As `named_config`, after a check that its data set exists too.

    Raises:
        ConfigError: as `named_config` and `dataset_config`.
    """
    config = named_config(recipe, overrides, night, project, images)
    if config.data.dataset not in SPECS:
        dataset_config(project or Project(), config.data.dataset, images)
    return config


def check_flow(flow: str, config: TrainConfig, project: Project, images: str | None = None) -> None:
    """Raise ConfigError if a flow, `train-cifar` or `retrain`, does not train on the data set of a config."""
    if flow == "retrain":
        dataset_config(project, config.data.dataset, images)
    elif config.data.dataset not in SPECS:
        raise ConfigError(
            f"the flow {flow} trains on {', '.join(SPECS)}, not on {config.data.dataset!r}: that is what retrain is "
            "for. A table [deployments.NAME] of the project file with this recipe makes retrain/NAME"
        )


def dataset_config(project: Project, name: str, images: str | None = None) -> DatasetConfig:
    """Where the images of a data set are: as the project says, or at the place `images`.

    Raises:
        ConfigError: the project has no such data set, and no place is given; the message lists those there are.
    """
    if name in SPECS:
        raise ConfigError(
            f"{name} is nightshift's own data set and never changes: the flow train-cifar trains on it. Name one of "
            f"your own in dataset. Those of the project file are: {', '.join(sorted(project.datasets)) or 'none'}"
        )
    if images is not None:
        check_places([images])
        return DatasetConfig(source=images)
    if name not in project.datasets:
        known = sorted([*SPECS, *project.datasets])
        raise ConfigError(
            f"there is no data set {name!r}.{near_miss(name, known)} The data sets are: {', '.join(known)}. To train "
            "on a folder as it is: nightshift train --images FOLDER"
        )
    return project.datasets[name]


def check_source(config: DatasetConfig) -> None:
    """Find out soon whether images are where they should be, if that is on this machine.

    Raises:
        SourceError, NoImagesError: they are not.
    """
    if config.source.startswith("s3://"):
        return
    if not Path(config.source).expanduser().exists():
        raise SourceError(
            f"there is nothing at {config.source}: name a folder with one folder of images a class, or a table"
        )
    from nightshift.data.sources.places import open_source  # here, because it imports what reads tables and buckets

    next(open_source(config, None).list())


def named_or_placed(project: Project, text: str) -> tuple[str, DatasetConfig]:
    """The name of a data set and where its images are, of its name in the project or of a place of images.

    Raises:
        ConfigError: it is neither.
    """
    if text in project.datasets or not is_place(text):
        return text, dataset_config(project, text)
    return name_of_place(text), dataset_config(project, "", images=text)


def is_place(text: str) -> bool:
    """Whether this is where images are, and not the name of a data set."""
    return "/" in text or "." in text or Path(text).exists()


def name_of_place(place: str) -> str:
    """The name of the data set that is trained on from a place: its last part, and what tells it from other places."""
    return f"{short_name(place)}-{hashlib.sha256(_whole(place).encode()).hexdigest()[:6]}"


def short_name(place: str) -> str:
    """A name for a data set, after the last part of the place of its images."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", PurePosixPath(_whole(place)).stem).strip("-")[:40] or "images"
    return name if name not in SPECS else f"{name}-images"


def _whole(place: str) -> str:
    return place.rstrip("/") if place.startswith("s3://") else str(Path(place).expanduser().absolute())


def check_names(config: TrainConfig) -> None:
    """Raise ConfigError if network, loss or transform does not exist or fit, or if the data set's name is not valid.

    Also if one of them is code that the project file of this machine does not admit. The message lists the networks
    that exist, or that fit. A team's own data set is not looked at here: only its snapshot says what it is like.
    """
    name = config.data.dataset
    if name not in SPECS:
        parse_dataset_name(name)
    check_names_of_code(config)
    loss = config.loss
    if loss.name not in LOSSES and (loss.label_smoothing or loss.class_weights != "off"):
        raise ConfigError(
            f"loss.label_smoothing and loss.class_weights are not handed to a loss of your own, as {loss.name} is one: "
            "set label_smoothing=0 and class_weights=off, and let it do so itself"
        )
    libraries_only = {"data.normalization=network": config.data.normalization == "network"}
    libraries_only["start.weights=hub"] = (config.start.name, config.start.weights) == ("pretrained", "hub")
    for what, is_asked in libraries_only.items():
        if is_asked and not library_of(config.model.name):
            raise ConfigError(
                f"{what} is for networks of torchvision and timm, and model {config.model.name!r} is none"
            )
    if name in SPECS:
        check_fits(config, SPECS[name].image_size)
        check_loss(config, len(SPECS[name].classes))
        check_validation(config, 0)


def check_fits(config: TrainConfig, image_size: int) -> None:
    """Raise ConfigError unless a config can be trained on square images with a side of so many pixels."""
    if not SMALLEST_IMAGE <= image_size <= LARGEST_IMAGE:
        raise ConfigError(
            f"image_size={image_size} is not valid: images have a side of {SMALLEST_IMAGE} to {LARGEST_IMAGE} pixels"
        )
    if not is_own(config.model.name):
        try:
            check_image_size(config.model.name, image_size)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    if config.augment.translate >= image_size:
        raise ConfigError(
            f"augment.translate={config.augment.translate} shifts images of {image_size} by {image_size} pixels out of "
            f"sight: {image_size - 1} is the most here"
        )


def check_loss(config: TrainConfig, classes: int) -> None:
    """Raise ConfigError unless the loss of a config is one for so many classes."""
    if config.loss.name == "binary" and classes != 2:
        raise ConfigError(
            f"loss.name=binary is for two classes, and {config.data.dataset} has {classes:,}: set "
            "loss.name=cross_entropy"
        )


def check_validation(config: TrainConfig, images: int) -> None:
    """Raise ConfigError if a config asks for validation images, of which a data set has none."""
    if config.evaluation.validate_every and not images:
        name = config.data.dataset
        what = (
            "train on a data set of your own, or set evaluation.validate_every=none, keep=last and patience=none"
            if name in SPECS
            else f"give some to that split, such as split = {{test = 0.1, validation = 0.1}} in [datasets.{name}], and "
            "start a new run"
        )
        raise ConfigError(
            f"evaluation.validate_every={config.evaluation.validate_every} needs validation images, and {name} has "
            f"none: {what}. The test images are not looked at before the end"
        )


def check_classes(classes: Sequence[str]) -> None:
    """Raise ConfigError if a data set has too few classes, too many, or names that a card cannot hold."""
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise ConfigError(f"the data set has {len(classes):,} classes: it takes 2 to {MOST_CLASSES:,}")
    if len(set(classes)) < len(classes):
        raise ConfigError("two classes of the data set have the same name")
    if (longest := max(map(len, classes))) > LONGEST_CLASS_NAME:
        raise ConfigError(f"the name of a class has {longest:,} characters, and {LONGEST_CLASS_NAME:,} are the most")
    if broken := [name for name in classes if not is_utf8(name)]:
        raise ConfigError(f"the name of a class is no text in UTF-8: {broken[0]!r}")
    if len(json.dumps(classes)) > LONGEST_CLASS_NAMES:
        raise ConfigError(
            f"the names of the {len(classes):,} classes have more than {LONGEST_CLASS_NAMES:,} bytes together: "
            "give them shorter names"
        )


def check_extras(config: TrainConfig) -> None:
    """Raise ConfigError if the config asks for an optional package that this machine does not have."""
    if config.tracking.tensorboard and not find_spec("tensorboard"):
        raise ConfigError("tracking.tensorboard=true needs a package that is not here: install nightshift[tensorboard]")
    if config.publish.triton and not all(map(find_spec, ("onnx", "onnxruntime", "onnxscript"))):
        raise ConfigError("publish.triton=true needs packages that are not here: install nightshift[onnx]")


def check_places(places: Iterable[str]) -> None:
    """Raise ConfigError if a place of images has an empty name, which would be the folder this process runs in."""
    if "" in places:
        raise ConfigError("an empty name is no place of images: name a file, a folder or s3://BUCKET/PREFIX")
