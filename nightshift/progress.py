"""What a run tells of itself while it runs.

The core reports to `current()`, whoever that is: by default the log, in a terminal a live display.
"""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Protocol

_log = logging.getLogger("nightshift")


@dataclass(frozen=True)
class StepReport:
    """The training so far: `loss` and `accuracy` are means over the epoch up to this step."""

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    images_per_second: float


class Progress(Protocol):
    def transfer(self, what: str, size: int | None) -> AbstractContextManager[Callable[[int], object]]:
        """Bytes are moved; yields what is to be called with the number just moved. `size` None: not known."""

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        """Some steps are done; called a few times a second and at each end of an epoch."""

    def say(self, message: str) -> None:
        """Something worth knowing happened."""

    def warn(self, message: str) -> None:
        """Something went wrong and was dealt with."""


class LogProgress:
    """Progress as lines of the logger `nightshift`: what a worker without a terminal shows."""

    @contextmanager
    def transfer(self, what: str, size: int | None) -> Iterator[Callable[[int], object]]:
        _log.info("%s%s", what, f" ({size / 1e6:.0f} MB)" if size else "")
        yield lambda count: None

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        if epoch_ended:
            _log.info(
                "epoch %d/%d: loss %.4f, training accuracy %.2f %%, %.0f images/s",
                report.epoch,
                report.epochs,
                report.loss,
                100 * report.accuracy,
                report.images_per_second,
            )

    def say(self, message: str) -> None:
        _log.info(message)

    def warn(self, message: str) -> None:
        _log.warning(message)


class _Watched:
    """Hands everything on, and keeps the newest report of the training."""

    def __init__(self, inner: Progress) -> None:
        self.newest: StepReport | None = None
        self.transfer, self.say, self.warn, self._trained = inner.transfer, inner.say, inner.warn, inner.trained

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        self.newest = report
        self._trained(report, epoch_ended)


@contextmanager
def watched(show: Callable[[StepReport], object], seconds: float) -> Iterator[None]:
    """Also show the newest report of the training every so many seconds, and the last one at the end.

    `show` is called in a thread of its own: however slow it is, and whatever it raises, the training goes on.
    """
    progress, ended = _Watched(current()), threading.Event()

    def run() -> None:
        shown, last, failed = None, False, False
        while not last:
            last = ended.wait(seconds)
            if progress.newest and progress.newest is not shown:
                shown = progress.newest
                try:
                    show(shown)
                    failed = False
                except Exception as error:
                    if not failed:  # once an outage
                        progress.warn(f"the live view could not be updated: {error}")
                    failed = True

    thread = threading.Thread(target=copy_context().run, args=(run,), name="live view", daemon=True)
    thread.start()
    try:
        with shown_by(progress):
            yield
    finally:
        ended.set()
        thread.join(_LAST_SHOW_SECONDS)


_LAST_SHOW_SECONDS = 5
_LOG = LogProgress()
_current: ContextVar[Progress] = ContextVar("nightshift_progress")


def current() -> Progress:
    return _current.get(_LOG)


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Report to `progress` in this context."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)
