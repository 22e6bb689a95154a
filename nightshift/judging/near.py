"""Images to judge by that are nearly the same as ones to train on, by their pixels or in the eyes of a trained network.

Candidates are pairs with similar hashes. Pixels settle those that differ only in brightness or compression
(`data.near`). A crop or a shift changes many pixels, but little of what a network sees. So a candidate also counts if
the last layer sees the two images as more alike than two of one class are by chance.
"""

from collections.abc import Callable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from nightshift.data.datasets import Dataset, Judged
from nightshift.data.near import LEAST_ALIKE
from nightshift.hardware import device_of
from nightshift.networks import head_of
from nightshift.values import Count, Number

MOST_NEAR = 1000
"""How many candidates are looked at, those with the most similar pixels first."""
_BY_CHANCE = 1e-4
"""The share of pairs of one class that are as alike by chance."""
_SAMPLE = 1000


class Near(BaseModel):
    """An image to judge by and one to train on, by their numbers in their splits."""

    model_config = ConfigDict(frozen=True)

    split: Judged
    """Of the first."""
    image: Count
    train: Count
    pixels: Number
    """The correlation of their pixels."""
    network: Number
    """The cosine between what the network's last layer sees of each."""


def near_images(dataset: Dataset, embed: Callable[[Tensor], Tensor]) -> list[Near]:
    """The candidates of a data set that are nearly the same, the most alike first.

    Args:
        embed: makes vectors of length 1, float32 (N, features), of images, uint8 (N, side, side, 3).
    """
    pairs = dataset.near[:MOST_NEAR]
    if not pairs:
        return []
    judged = torch.stack([dataset.images_of(pair.split)[pair.image] for pair in pairs])
    trained_on = dataset.train_images[[pair.train for pair in pairs]]
    in_network = (embed(judged) * embed(trained_on)).sum(1).nan_to_num().tolist()  # a network may have diverged
    bound = _alike_by_chance(dataset, embed)
    found = [
        Near(split=pair.split, image=pair.image, train=pair.train, pixels=pair.alike, network=alike)
        for pair, alike in zip(pairs, in_network, strict=True)
        if pair.alike >= LEAST_ALIKE or alike > bound
    ]
    return sorted(found, key=lambda near: max(near.pixels, near.network), reverse=True)


def _alike_by_chance(dataset: Dataset, embed: Callable[[Tensor], Tensor]) -> float:
    """How alike a test and a training image of one class must be to be in the top `_BY_CHANCE` share of such pairs.

    Candidates are left out.
    """
    ours, theirs = _spread(len(dataset.test_labels)), _spread(len(dataset.train_labels))
    alike = embed(dataset.test_images[ours]) @ embed(dataset.train_images[theirs]).T
    same = dataset.test_labels[ours, None] == dataset.train_labels[theirs]
    rows, columns = ({number: at for at, number in enumerate(of.tolist())} for of in (ours, theirs))
    for pair in dataset.near:
        if pair.split == "test" and pair.image in rows and pair.train in columns:
            same[rows[pair.image], columns[pair.train]] = False
    of_one_class = alike[same].sort(descending=True).values
    return float(of_one_class[int(_BY_CHANCE * len(of_one_class))]) if len(of_one_class) else 1.0


def _spread(count: int) -> Tensor:
    """The numbers of some images out of so many, from the first to the last."""
    return torch.linspace(0, count - 1, min(count, _SAMPLE)).long()


def embedding_of(model: nn.Module, name: str, classes: int, image_size: int) -> Callable[[Tensor], Tensor]:
    """What the last layer of a network sees of normalized images (batch, 3, side, side), as `watched` has it.

    Args:
        name: of the network, as the config has it.
    """
    look = watched(model, name, classes, image_size)
    device = device_of(model)
    return lambda inputs: look(inputs, lambda images: model(images.to(device, memory_format=torch.channels_last)))[1]


def watched(
    model: nn.Module, name: str, classes: int, image_size: int
) -> Callable[[Tensor, Callable[[Tensor], Tensor]], tuple[Tensor, Tensor]]:
    """Watch the last layer of a network while it is asked.

    The function takes normalized images (batch, 3, side, side), and a function that calls the network with them and
    makes logits (batch, classes). It returns these, and what the last layer saw of the images in the first call:
    vectors of length 1, float32 (batch, features), on the CPU. If the last layer cannot be found, or its
    input is not a single tensor with a part for each image, the vectors are made from the logits.

    Args:
        name: of the network, as the config has it.
    """
    layers = {tensor.rpartition(".")[0] for tensor in head_of(name, classes, image_size)}
    head = model.get_submodule(layers.pop()) if len(layers) == 1 else None

    @torch.inference_mode()
    def look(inputs: Tensor, answer: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []

        def note(layer: nn.Module, arguments: tuple[object, ...]) -> None:
            if not seen and arguments and isinstance(arguments[0], Tensor) and len(arguments[0]) == len(inputs):
                seen.append(arguments[0])

        model.eval()
        hook = head.register_forward_pre_hook(note) if head else None
        try:
            logits = answer(inputs)
        finally:
            if hook:
                hook.remove()
        return logits, F.normalize((seen[0] if seen else logits).flatten(1).float(), dim=1).cpu()

    return look
