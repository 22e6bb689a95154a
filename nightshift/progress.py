"""What a run reports while it runs.

The core reports to `current()`: the log by default, a live display in a terminal.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Protocol, TypeVar

from nightshift.text import plain

Item = TypeVar("Item")
Result = TypeVar("Result")
_log = logging.getLogger("nightshift")


@dataclass(frozen=True)
class StepReport:
    """How far a run is. `loss` and `accuracy` are means over the epoch up to this step."""

    step: int
    total_steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    images_per_second: float
    validation_accuracy: float | None = None
    """Set only in the report at the end of an epoch that was validated."""

    @property
    def validation(self) -> str:
        """A piece of a line; empty if there is nothing to say."""
        return "" if self.validation_accuracy is None else f", validation {self.validation_accuracy:.1%}"


class Progress(Protocol):
    def transfer(self, what: str, size: int | None) -> AbstractContextManager[Callable[[int], object]]:
        """Show a transfer of `size` bytes (None: unknown). Yields a function to call with each count of bytes moved."""

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        """Some steps are done. Called a few times a second, and at the end of each epoch."""

    def say(self, message: str) -> None:
        """Something worth knowing happened."""

    def warn(self, message: str) -> None:
        """Something went wrong and was handled."""


class LogProgress:
    """Progress as lines of the logger `nightshift`: what a worker without a terminal shows."""

    @contextmanager
    def transfer(self, what: str, size: int | None) -> Iterator[Callable[[int], object]]:
        _log.info("%s%s", plain(what), f" ({size / 1e6:.0f} MB)" if size else "")
        yield lambda count: None

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        if epoch_ended:
            _log.info(
                "epoch %d/%d: loss %.4f, training accuracy %.2f %%%s, %.0f images/s",
                report.epoch,
                report.epochs,
                report.loss,
                100 * report.accuracy,
                report.validation,
                report.images_per_second,
            )

    def say(self, message: str) -> None:
        _log.info(plain(message))

    def warn(self, message: str) -> None:
        _log.warning(plain(message))


class _Watched:
    """Passes everything on, and keeps the newest step report."""

    def __init__(self, inner: Progress) -> None:
        self.newest: StepReport | None = None
        self.transfer, self.say, self.warn, self._trained = inner.transfer, inner.say, inner.warn, inner.trained

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        self.newest = report
        self._trained(report, epoch_ended)


@contextmanager
def watched(show: Callable[[StepReport], object], seconds: float) -> Iterator[None]:
    """Also call `show` with the newest step report every `seconds` seconds, and with the last one at the end.

    `show` runs in a thread of its own: training goes on however slow it is and whatever it raises.
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
                    if not failed:  # one warning per outage
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


def in_threads(call: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """What `call` returns of each item, in order. Several threads call it, and report to this context's progress."""
    with ThreadPoolExecutor(threads) as pool:
        called = [pool.submit(copy_context().run, call, item) for item in items]
        return [one.result() for one in called]


@contextmanager
def shown_by(progress: Progress) -> Iterator[None]:
    """Report to `progress` in this context."""
    token = _current.set(progress)
    try:
        yield
    finally:
        _current.reset(token)
