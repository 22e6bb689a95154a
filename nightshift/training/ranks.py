"""What the training loop needs of the ranks of a run. Alone, which is the usual case, nearly nothing has to be done."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nightshift.checkpoints.payload import Payload
from nightshift.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """A process that trains alone. `parallel.ranks.JoinedRanks` is one of several.

    Every rank calls the same methods in the same order; a method that exchanges something returns on no rank before
    all have called it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    nodes: int = 1

    @property
    def leads(self) -> bool:
        """Rank 0 is the only one that talks to the store, and the one that reports on the training."""
        return self.rank == 0

    def share_of(self, batch: int) -> slice:
        """Which images of a batch are this rank's; shares differ by one at most."""
        return slice(self.rank * batch // self.world_size, (self.rank + 1) * batch // self.world_size)

    def check_batches(self, smallest: int) -> None:
        """Raise ConfigError if the smallest batch of an epoch has no image for some rank."""
        if smallest < self.world_size:
            raise ConfigError(
                f"the last batch of an epoch has {smallest} images, too few for {self.world_size} processes: set "
                "drop_last=true, another batch_size, or a smaller nproc_per_node"
            )

    def any(self, *asked: bool) -> list[bool]:
        """For each question, whether some rank says yes: the same answer on every rank, so all do the same."""
        return list(asked)

    def total(self, *values: Tensor) -> Tensor:
        """Each scalar's sum over all ranks, float64 (values,); on a GPU this waits for the step."""
        return torch.stack([value.detach().double().cpu() for value in values])

    def gather(self, part: Payload) -> list[Payload]:
        """Every rank's part, in order, on rank 0; an empty list elsewhere."""
        return [part]

    def share(self, payload: Payload | None) -> Payload:
        """Rank 0's payload, on every rank; the others pass None."""
        assert payload is not None
        return payload

    @contextmanager
    def first_on_each_machine(self) -> Iterator[None]:
        """Run a block first in one process a machine, then in the others, which find what it has left there."""
        yield

    def synchronized(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch norm over the whole batch instead of each rank's share; its state_dict is the same."""
        return model

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The module to call forward on, so that backward averages the gradients over all ranks."""
        return model

    @contextmanager
    def loss_explained(self) -> Iterator[None]:
        """Turn the failure of an exchange with a rank that is gone into a RankLostError."""
        yield


ALONE = Ranks()
