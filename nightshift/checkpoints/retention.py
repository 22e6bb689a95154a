"""DOC."""

from nightshift.config.train import TrainConfig
from nightshift.records.run import Checkpoint


def retained(checkpoints: list[Checkpoint], config: TrainConfig) -> list[Checkpoint]:
    """Those that are kept, of all of a run's in the order they were written; the newest always is.

    They are the last `keep_last`, the best by the training loss of its last whole epoch, and the first after
    every `keep_every_epochs`-th epoch.
    """
    keys = {checkpoint.key for checkpoint in checkpoints[-config.keep_last :]}
    scored = [checkpoint for checkpoint in checkpoints if "epoch_loss" in checkpoint.metrics]
    if config.keep_best and scored:
        keys.add(min(scored, key=lambda checkpoint: checkpoint.metrics["epoch_loss"]).key)
    if config.keep_every_epochs:
        reached = 0
        for checkpoint in checkpoints:
            if checkpoint.epoch // config.keep_every_epochs > reached:
                reached = checkpoint.epoch // config.keep_every_epochs
                keys.add(checkpoint.key)
    return [checkpoint for checkpoint in checkpoints if checkpoint.key in keys]
