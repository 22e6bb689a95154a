"""A signal that reaches a rank at a step, however busy the machine is: the rank sends it to itself."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, update_wrapper
from unittest import mock

from nightshift.parallel import agent, worker
from nightshift.parallel.worker import RankSetup
from nightshift.training.loop import RankOrders


@dataclass(frozen=True)
class Blow:
    """What reaches rank `rank` after step `step`: the first `times` times that the ranks are started."""

    rank: int
    step: int
    sent: signal.Signals
    times: int = 1

    def orders(self, orders: RankOrders) -> RankOrders:
        """The orders of a rank, which is struck when it looks for them."""

        def should_stop(step: int) -> bool:
            starts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
            if (os.environ["RANK"], step) == (str(self.rank), self.step) and starts < self.times:
                os.kill(os.getpid(), self.sent)
            return orders.should_stop(step)

        return RankOrders(should_stop, orders.should_restart, orders.process)


def _run_rank(blow: Blow, setup: RankSetup, job_text: str | None) -> str:
    with mock.patch.object(worker, "RankOrders", lambda *orders: blow.orders(RankOrders(*orders))):
        return worker.run_rank(setup, job_text)


@contextmanager
def struck_by(blow: Blow) -> Iterator[None]:
    """The ranks that are started meanwhile are struck."""
    struck = update_wrapper(partial(_run_rank, blow), worker.run_rank)
    with mock.patch.object(agent, "run_rank", struck):
        yield
