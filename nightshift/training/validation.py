"""How good a network is on the validation images in the middle of a training, which goes on as if nobody had looked."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nightshift.data import batches
from nightshift.data.datasets import Dataset, in_parts
from nightshift.training.ranks import Ranks


@torch.no_grad()  # in inference mode, a tensor that a network keeps of its forward pass could not be trained with later
def validate(network: nn.Module, dataset: Dataset, normalizer: tuple[Tensor, Tensor], ranks: Ranks) -> Tensor:
    """Mean cross-entropy in nats and accuracy from 0 to 1 over all validation images, float64 (2,).

    Every rank calls it, and gets the same. Each predicts some of the parts into which one alone would divide the
    images, so the number of ranks changes no logit. Images are as they are stored, without `evaluation.tta`.

    Args:
        normalizer: scale and shift, on the network's device.
    """
    images, labels = dataset.validation_images, dataset.validation_labels
    assert images is not None
    assert labels is not None
    device, mode = normalizer[0].device, network.training
    size = batches.images_at_a_time(dataset.image_size, len(dataset.classes), device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    network.eval()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # whatever somebody's network draws
        for numbers, pixels in in_parts(images, size, ranks.rank, ranks.world_size):
            targets = labels[numbers].to(device).long()
            logits = network(batches.to_input(pixels.to(device), *normalizer)).float()
            loss += F.cross_entropy(logits, targets, reduction="sum").double()
            correct += (logits.argmax(1) == targets).sum()
    network.train(mode)
    return ranks.total(loss, correct) / len(labels)
