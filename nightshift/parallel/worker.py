"""A rank's life in its own process: how it learns what to train, and how all ranks learn how the run ended."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from pydantic import BaseModel

from nightshift import errors, processes, progress
from nightshift.errors import (
    Interrupted,
    NightshiftError,
    RankLostError,
)
from nightshift.hardware import find_device
from nightshift.ids import RunId
from nightshift.parallel.channel import RankChannel
from nightshift.parallel.ranks import JoinedRanks, joined
from nightshift.parallel.rendezvous import Board, Place
from nightshift.refs import CheckpointRef
from nightshift.signals import StopSignals
from nightshift.training.loop import RankOrders
from nightshift.training.run import Job, train_as_rank
from nightshift.workspace import Workspace

_JOB, _ENDED = "job", "ended"
_NOTICE_SECONDS = 2
"""How long a launcher may take to see that a rank is dead. It looks ten times a second."""


class Ending(BaseModel):
    """How training ended, the same for every rank and every machine: with a checkpoint, or an error."""

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
class RankSetup:
    """What a rank's process needs to start: where its launcher and the other ranks are, how many threads it may use."""

    workspace: Workspace
    address: str
    key: bytes
    place: Place
    threads: int
    start: str = ""
    """The same for all ranks that start together, on whatever machine, and another each time."""


def run_rank(setup: RankSetup, job_text: str | None) -> str:
    """A rank's life, from its start by the agent to the `Ending` of the run, which it returns as JSON.

    Args:
        job_text: the `Job` as JSON; None on a machine that has joined.
    """
    os.setsid()  # a Ctrl-C in the terminal is for the launcher, which passes it on
    os.dup2(2, 1)  # standard output is the command's own
    torch.set_num_threads(max(setup.threads, 1))
    # The others wait for rank 0, which may wait until the lease of a lost rank 0 expires.
    timeout = timedelta(seconds=max(300, 2 * setup.workspace.lease_seconds))
    with (
        RankChannel(setup.address, setup.key, is_quiet=os.environ["RANK"] != "0") as channel,
        progress.shown_by(channel),
        joined(setup.place.store(setup.start, timeout), timeout) as ranks,
        StopSignals() as signals,
    ):
        board = setup.place.board(setup.start)
        job = _agree_on_job(ranks, board, job_text)
        orders = RankOrders(
            lambda step: signals.poll() or "stop" in channel.orders,
            lambda: "restart" in channel.orders,
            processes.identity(os.getppid()),
        )
        ending = None
        try:
            if find_device(job.config.hardware.device).type == "cuda":
                torch.cuda.set_device(ranks.local_rank)
            last = train_as_rank(ranks, setup.workspace, job, orders)
            if ranks.leads:
                ending = Ending(run_id=job.run_id, checkpoint=last)
        except RankLostError:
            if not _has_ended(board):
                _let_the_lost_rank_be_named(lambda: signals.received or "restart" in channel.orders)
                raise
        except NightshiftError as error:
            ending = Ending(run_id=job.run_id, error=type(error).__name__, message=str(error))
        if ending:
            board.compare_set(_ENDED, "", ending.model_dump_json())  # if several ranks report one, the first counts
        return board.get(_ENDED).decode()  # waits until there is one


def _agree_on_job(ranks: JoinedRanks, board: Board, job_text: str | None) -> Job:
    """The job, from a machine that knows it."""
    if job_text:
        board.compare_set(_JOB, "", job_text)
    if not ranks.any(job_text is not None)[0]:
        raise RankLostError("none of the machines that have met knows what to train")
    return Job.model_validate_json(board.get(_JOB))


def _let_the_lost_rank_be_named(is_told: Callable[[], object]) -> None:
    """Let the launcher see the lost rank first: it names the first rank to end, and this one's end is a consequence."""
    deadline = time.monotonic() + _NOTICE_SECONDS
    while not is_told() and time.monotonic() < deadline:
        time.sleep(0.02)


def _has_ended(board: Board) -> bool:
    with suppress(RuntimeError):  # the machine that hosted it is gone
        return bool(board.check([_ENDED]))
    return False
