"""How much memory a save and a restore take beside the state.

The model is torchvision's ViT-B/16 with AdamW: 1.0 GB of state. It is saved by `Saver` into an embedded S3 server, and
restored from there by a fresh process. Linux counts:

    save       the most that the process had while it saved, less what it had before: with the snapshot, which is a
               copy of the state by design, but without anything else of the save
    restore    the most that the process had while it restored, less what it has once the state lives in it

"anonymous" is memory that the kernel cannot take back. "with files" counts pages of files as well, which it can.
One save that is not counted allocates the snapshot.

    python benchmarks/checkpoint_memory.py [--quick] [--json FILE]
"""

import gc
import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import torch
import torchvision
import typer
from checkpoint_stall import opened_run, tensors
from common import Summary, machine, show, tell, temporary_home, write_json

from nightshift.checkpoints.payload import read_payload
from nightshift.records.run import Checkpoint
from nightshift.storage.store import Store
from nightshift.training.saver import Saver
from nightshift.training.state import TrainState

_CPU = torch.device("cpu")
_PARTS = {"anonymous": "RssAnon", "with files": "VmRSS"}


class Watched:
    """The memory of this process, looked at every 2 ms in a thread while entered."""

    def __enter__(self) -> Self:
        self.before = self.most = self.after = memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        gc.collect()
        self.after = memory()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.most = {part: max(size, self.most[part]) for part, size in memory().items()}


@dataclass(frozen=True)
class Taken:
    """Bytes beside the state by how they are counted, and how long it took."""

    bytes: dict[str, int]
    seconds: float


def memory() -> dict[str, int]:
    """What this process has, in bytes."""
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {part: int(said[field].split()[0]) * 1024 for part, field in _PARTS.items()}


def state_of(model: str) -> TrainState:
    torch.manual_seed(0)
    module = torchvision.models.get_model(model, num_classes=10)
    return TrainState(module, torch.optim.AdamW(module.parameters(), lr=1e-3), _CPU)


def step(state: TrainState) -> None:
    """A step without images: the optimizer has a state after it, and each save something new."""
    for parameter in state.model.parameters():
        parameter.grad = torch.full_like(parameter, 0.1)
    state.advance()
    state.optimizer.zero_grad()


def measured(work: Callable[[], object], beside: str) -> Taken:
    """What `work` took beside the memory before it, or after it."""
    started = time.perf_counter()
    with Watched() as watched:
        work()
        seconds = time.perf_counter() - started
    least = getattr(watched, beside)
    return Taken({part: watched.most[part] - least[part] for part in _PARTS}, seconds)


def restored(model: str, store: Store, checkpoint: Checkpoint, answer: Any) -> None:
    state = state_of(model)
    state.model.zero_grad()
    gc.collect()
    answer.put(measured(lambda: state.restore(read_payload(store, checkpoint, state.check)), "after"))


def main(
    model: Annotated[str, typer.Option(help="A classifier of torchvision.")] = "vit_b_16",
    rounds: Annotated[int, typer.Option(help="Saves, and as many restores.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="One of each.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """What a save and a restore take beside the state."""
    rounds = 1 if quick else rounds
    facts, processes = machine(), multiprocessing.get_context("spawn")
    state = state_of(model)
    step(state)
    state_bytes = sum(tensor.nbytes for tensor in tensors(state.capture()))
    saves, restores = list[Taken](), list[Taken]()
    with temporary_home() as home, opened_run(home) as run:
        saver = Saver(run, run.record.train_config().saving, _CPU, retry_seconds=60)
        saver.save_and_wait(state, [state.part()], 0, 0)
        for number in range(rounds):
            tell(f"round {number + 1} of {rounds}")
            step(state)
            gc.collect()
            saves.append(measured(lambda: saver.save_and_wait(state, [state.part()], 0, 0), "before"))
            answer = processes.Queue()
            child = processes.Process(target=restored, args=(model, run.store, run.record.checkpoints[-1], answer))
            child.start()
            restores.append(answer.get(timeout=600))
            child.join()
    shares = {
        (what, part): Summary.of([one.bytes[part] / state_bytes for one in taken])
        for what, taken in {"save": saves, "restore": restores}.items()
        for part in _PARTS
    }
    seconds = {
        what: Summary.of([one.seconds for one in taken]) for what, taken in (("save", saves), ("restore", restores))
    }
    show(
        f"Memory beside a state of {state_bytes / 1e6:,.0f} MB",
        {"model": model, "rounds": rounds, **facts},
        ["share of the state", "n", "median", "min", "max", "seconds"],
        [
            [
                f"{what}, {part}",
                str(share.n),
                *(f"{value:.1%}" for value in (share.median, share.min, share.max)),
                f"{seconds[what].median:.1f}",
            ]
            for (what, part), share in shares.items()
        ],
    )
    write_json(
        json_file,
        {
            "benchmark": "checkpoint_memory",
            "machine": facts,
            "state_bytes": state_bytes,
            "share_of_state": {f"{what}, {part}": share for (what, part), share in shares.items()},
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    typer.run(main)
