"""A save and a restore take little memory beside the state, however large that is."""

import gc
import threading
from pathlib import Path
from typing import Self

import pytest
import torch
from torch import nn

from nightshift.checkpoints.payload import read_payload, weights_sha256
from nightshift.checkpoints.upload import upload_payload
from nightshift.refs import CheckpointRef
from nightshift.training.state import TrainState
from nightshift.workspace import Workspace

MIB = 1024 * 1024


def own_memory() -> int:
    """The bytes of this process that the kernel cannot take back."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon")
    )


class Peak:
    """The most memory that this process has while entered."""

    def __enter__(self) -> Self:
        gc.collect()
        self.before = self.most = own_memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        gc.collect()
        self.after = own_memory()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.most = max(self.most, own_memory())


def state_of(seed: int) -> TrainState:
    torch.manual_seed(seed)
    network = nn.Linear(5000, 5000)
    return TrainState(network, torch.optim.AdamW(network.parameters()), torch.device("cpu"))


@pytest.mark.slow
def test_of_300_megabytes_a_save_takes_a_third_beside_them_and_a_restore_a_fifth(workspace: Workspace) -> None:
    state = state_of(0)
    state.model.weight.grad, state.model.bias.grad = torch.ones(5000, 5000), torch.ones(5000)
    state.advance()
    state.optimizer.zero_grad()
    payload, state_bytes = state.capture(), 3 * 4 * (5000 * 5000 + 5000)

    with Peak() as save:
        written = upload_payload(workspace.store, "checkpoints/run/1-0.pt", payload)
    assert written.bytes > state_bytes
    assert save.most - save.before < 96 * MIB

    checkpoint = CheckpointRef(
        run_id="run", step=1, epoch=0, token=0, key="checkpoints/run/1-0.pt", bytes=written.bytes, sha256=written.sha256
    )
    other = state_of(1)
    with Peak() as restore:
        other.restore(read_payload(workspace.store, checkpoint, other.check))
    assert restore.most - restore.after < 60 * MIB
    assert weights_sha256(other.model.state_dict()) == weights_sha256(state.model.state_dict())
