"""What the training loop needs from the ranks of a run. A process that trains alone, the usual case, needs little."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nightshift.checkpoints.payload import Payload
from nightshift.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """A process that trains alone. `parallel.ranks.JoinedRanks` is one of several.

    Every rank calls the same methods in the same order. A method that exchanges data returns on no rank before all
    have called it.
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
        """Which images of a batch are this rank's. Shares differ by at most one image."""
        return slice(self.rank * batch // self.world_size, (self.rank + 1) * batch // self.world_size)

    def parts_of(self, batch: int, most: int) -> int:
        """Into how many parts each rank divides its share of a batch: as many on every rank, and none of them empty."""
        return min(most, batch // self.world_size)

    def check_batches(self, smallest: int) -> None:
        """Raise ConfigError if the smallest batch of an epoch has no image for some rank."""
        if smallest < self.world_size:
            raise ConfigError(
                f"the last batch of an epoch has {smallest} images, too few for {self.world_size} processes: set "
                "drop_last=true, another batch_size, or a smaller nproc_per_node"
            )

    def any(self, *asked: bool) -> list[bool]:
        """For each question, whether any rank says yes. The answer is the same on every rank, so all do the same."""
        return list(asked)

    def total(self, *values: Tensor) -> Tensor:
        """Each scalar's sum over all ranks, float64 (values,). On a GPU this waits until the step is done."""
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
        """Run a block first in one process per machine, then in the others, which find what the first has left."""
        yield

    def synchronized(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model with batch norm over the whole batch instead of each rank's share; its state_dict is the same."""
        return model

    def parallel(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The module to call for the forward pass, so that the backward pass averages gradients over all ranks."""
        return model

    def unaveraged(self, module: nn.Module) -> AbstractContextManager[None]:
        """In this context, a backward pass through what `parallel` returned keeps its gradients to the rank. The next
        backward pass outside averages them too."""
        return nullcontext()

    @contextmanager
    def loss_explained(self) -> Iterator[None]:
        """Raise RankLostError when an exchange fails because a rank is gone."""
        yield


ALONE = Ranks()
