"""Which checkpoints of a run are kept."""

from nightshift.config.sections import SavingConfig
from nightshift.records.run import Checkpoint


def retained(checkpoints: list[Checkpoint], config: SavingConfig, chosen: Checkpoint | None = None) -> list[Checkpoint]:
    """The checkpoints to keep, from all of a run's in the order they were written. The newest is always kept.

    These are the last `keep_last`, the best by the training loss of its last whole epoch, and the first after
    every `keep_every_epochs`-th epoch; and `chosen`, whose weights would be published now.
    """
    keys = {checkpoint.key for checkpoint in checkpoints[-config.keep_last :]}
    if chosen:
        keys.add(chosen.key)
    scored = [
        (loss, checkpoint.key) for checkpoint in checkpoints if (loss := checkpoint.metrics.epoch_loss) is not None
    ]
    if config.keep_best and scored:
        keys.add(min(scored, key=lambda pair: pair[0])[1])
    if config.keep_every_epochs:
        reached = 0
        for checkpoint in checkpoints:
            if checkpoint.epoch // config.keep_every_epochs > reached:
                reached = checkpoint.epoch // config.keep_every_epochs
                keys.add(checkpoint.key)
    return [checkpoint for checkpoint in checkpoints if checkpoint.key in keys]
