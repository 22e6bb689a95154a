"""Published versions, loaded from their verified weights, and what they say of images of another night."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from nightshift import plugins, progress
from nightshift.checkpoints.weights import published_weights
from nightshift.data import batches
from nightshift.data.datasets import Images, in_parts
from nightshift.data.images import fit
from nightshift.hardware import device_of
from nightshift.judging import evaluation
from nightshift.judging.near import watched
from nightshift.records.versions import ModelCard
from nightshift.storage.store import Store

_MOST_FEATURES = 4096
"""Features per image. If a network's last layer sees more, they are averaged in this many groups."""


@dataclass(frozen=True)
class Seen:
    """What a version says of N images, on the CPU."""

    probabilities: Tensor
    """Of each of its own classes, float32 (N, classes)."""
    features: Tensor
    """What its last layer sees: vectors of length 1, float32 (N, features)."""


def load_version(store: Store, card: ModelCard, device: torch.device) -> nn.Module:
    """The network of a published version with its weights, whose sha256 was found right; ready to predict.

    A warning says so if the network's code is another than it was trained with.

    Raises:
        ConfigError: there is no such network here, it takes no images of this size, or its config cannot be read.
        CheckpointCorruptError: the weights are none of this network's.
        DocumentDamagedError: they are not what was published.
        StorageError: they cannot be read.
    """
    config = card.train_config()
    weights = published_weights(store, card)
    then, now = card.environment.get("network"), plugins.described(config.model.name)
    if then != now:
        progress.current().warn(f"{card.version} was trained with the network of {then}, and here is that of {now}")
    return evaluation.load_model(config, weights, len(card.classes), device, card.image_size)


def predicted_by(model: nn.Module, card: ModelCard, images: Images) -> Tensor:
    """What a version predicts of images that were stored for another: the numbers of its own classes, int64 (N,).

    Args:
        model: the version's, from `load_version`.
        images: uint8 (N, side, side, 3). Those of another size than the version's are made to have it.
    """
    scale, shift = batches.scale_and_shift(card.mean, card.std)
    size = batches.images_at_a_time(card.image_size, len(card.classes), device_of(model))
    tta = card.train_config().evaluation.tta
    predicted = torch.empty(len(images), dtype=torch.int64)
    for numbers, part in in_parts(images, size):
        inputs = batches.to_input(_fitted(part, card), scale, shift)
        predicted[numbers] = evaluation.predict(model, inputs, tta).argmax(1)
    return predicted


def seen_by(model: nn.Module, card: ModelCard, images: Iterable[Tensor]) -> Seen:
    """What a version says of images that were stored for another, and what it sees of them.

    Args:
        model: the version's, from `load_version`.
        images: one at least, uint8 (side, side, 3) each. A batch of them is in memory at a time.
    """
    config, classes = card.train_config(), len(card.classes)
    scale, shift = batches.scale_and_shift(card.mean, card.std)
    look = watched(model, config.model.name, classes, card.image_size)
    parts = [
        look(
            batches.to_input(_fitted(part, card), scale, shift),
            lambda inputs: evaluation.predict(model, inputs, config.evaluation.tta),
        )
        for part in _stacked(images, batches.images_at_a_time(card.image_size, classes, device_of(model)))
    ]
    return Seen(torch.cat([logits.softmax(1) for logits, _ in parts]), torch.cat([_few(seen) for _, seen in parts]))


def _stacked(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    left = iter(images)
    while some := list(islice(left, size)):
        yield torch.stack(some)


def _few(features: Tensor) -> Tensor:
    if features.shape[1] <= _MOST_FEATURES:
        return features
    return F.normalize(F.adaptive_avg_pool1d(features, _MOST_FEATURES), dim=1)


def _fitted(images: Tensor, card: ModelCard) -> Tensor:
    if images.shape[1] == card.image_size:
        return images
    squares = [np.asarray(fit(Image.fromarray(image), card.image_size, card.resize)) for image in images.numpy()]
    return torch.from_numpy(np.stack(squares))
