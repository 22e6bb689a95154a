"""Published versions, loaded from their verified weights, and what they predict of images of another night."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from nightshift import plugins, progress
from nightshift.checkpoints.weights import published_weights
from nightshift.data import batches
from nightshift.data.images import fit
from nightshift.judging import evaluation
from nightshift.records.versions import ModelCard
from nightshift.storage.store import Store


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


def predicted_by(model: nn.Module, card: ModelCard, images: Tensor) -> Tensor:
    """What a version predicts of images that were stored for another: the numbers of its own classes, int64 (N,).

    Args:
        model: the version's, from `load_version`.
        images: uint8 (N, side, side, 3). Those of another size than the version's are made to have it.
    """
    scale, shift = batches.scale_and_shift(card.mean, card.std)
    size, tta = batches.images_at_a_time(card.image_size, len(card.classes)), card.train_config().evaluation.tta
    parts = (batches.to_input(_fitted(part, card), scale, shift) for part in torch.split(images, size))
    return torch.cat([evaluation.predict(model, part, tta).argmax(1) for part in parts])


def _fitted(images: Tensor, card: ModelCard) -> Tensor:
    if images.shape[1] == card.image_size:
        return images
    squares = [fit(Image.fromarray(image), card.image_size, card.resize) for image in images.numpy()]
    return torch.from_numpy(np.stack(squares))
