"""DOC."""

import os
import secrets
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from nightshift import errors, processes, progress
from nightshift.config.train import TrainConfig
from nightshift.errors import (
    Interrupted,
    NightshiftError,
    RankLostError,
)
from nightshift.ids import RunId
from nightshift.parallel.channel import _Line
from nightshift.parallel.ranks import JoinedRanks, joined
from nightshift.records.run import Origin
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.signals import StopSignals
from nightshift.training.loop import RankOrders
from nightshift.training.run import train_as_rank
from nightshift.workspace import Workspace

_ENDED = "ended"


class Job(BaseModel):
    """What the ranks are to train; those of a machine that has joined are told by the others."""

    run_id: RunId
    config: TrainConfig
    dataset: DatasetRef
    origin: Origin


class Ending(BaseModel):
    """How a training ended, for every rank and every machine alike: a checkpoint, or an error."""

    run_id: RunId
    checkpoint: CheckpointRef | None = None
    error: str = ""
    message: str = ""

    def result(self) -> CheckpointRef:
        if self.checkpoint:
            return self.checkpoint
        raise self._kind(self.message)

    @property
    def interrupted(self) -> bool:
        return bool(self.error) and issubclass(self._kind, Interrupted)

    @property
    def _kind(self) -> type[NightshiftError]:
        return getattr(errors, self.error)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Place:
    """What a rank is given to find its way."""

    workspace: Workspace
    address: str
    key: bytes
    host: str
    port: int
    threads: int


def _rank(place: _Place, job_text: str | None) -> str:
    """A rank's life, from its start by the agent to how the training ended, as JSON."""
    os.setsid()  # a Ctrl-C in the terminal is for the launcher, who passes it on
    os.dup2(2, 1)  # standard output is the command's own
    torch.set_num_threads(max(place.threads, 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # A rank 0 that waits for a lost one's lease is waited for.
    timeout = timedelta(seconds=max(300, 2 * place.workspace.lease_seconds))
    with (
        _Line(place.address, place.key, is_quiet=os.environ["RANK"] != "0") as line,
        progress.shown_by(line),
        joined(timeout) as ranks,
        StopSignals() as signals,
    ):
        job, board = _introduced(ranks, place, job_text)
        orders = RankOrders(
            lambda step: signals.received is not None or "stop" in line.orders,
            lambda: "restart" in line.orders,
            processes.identity(os.getppid()),
        )
        ending = None
        try:
            last = train_as_rank(ranks, place.workspace, job.run_id, job.config, job.dataset, orders, job.origin)
            if ranks.leads:
                ending = Ending(run_id=job.run_id, checkpoint=last)
        except RankLostError:
            if not _has_ended(board):
                raise
        except NightshiftError as error:
            ending = Ending(run_id=job.run_id, error=type(error).__name__, message=str(error))
        if ending:
            board.compare_set(_ENDED, "", ending.model_dump_json())  # of several, the first counts
        return board.get(_ENDED).decode()  # waits until there is one


def _introduced(ranks: JoinedRanks, place: _Place, job_text: str | None) -> tuple[Job, Store]:
    """What is to be trained, and where the ranks of this start leave word of how it ended."""
    ours = [job_text, secrets.token_hex(8)]
    theirs: list[Any] = [ours]
    if ranks.world_size > 1:
        theirs = [None] * ranks.world_size
        dist.all_gather_object(theirs, ours, ranks.control)
    jobs = [text for text, _ in theirs if text]
    if not jobs:
        raise RankLostError("none of the machines that have met knows what is to be trained")
    board = TCPStore(place.host, place.port, is_master=False, timeout=timedelta(days=1))
    return Job.model_validate_json(jobs[0]), PrefixStore(theirs[0][1], board)


def _has_ended(board: Store) -> bool:
    with suppress(RuntimeError):  # it went with the machine that hosts it
        return bool(board.check([_ENDED]))
    return False
