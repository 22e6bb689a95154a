"""A polite stop: SIGTERM and SIGINT set a flag that the training loop reads at each step boundary."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from nightshift import progress

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """While entered, the first SIGTERM or SIGINT sets `received`; a second one stops at once.

    The handler does nothing else. It interrupts its own thread anywhere, perhaps while that thread holds the lock of
    the log or of a channel. If the handler then logged or sent anything, it could deadlock.

    Python delivers signals to the main thread only. In another thread this does nothing, and whoever runs
    the loop there must pass the request on by other means.
    """

    def __init__(self, interrupt: Callable[[], object] = lambda: None) -> None:
        """`interrupt`: called in the handler at the first signal; it may raise, and must take no lock."""
        self.received: signal.Signals | None = None
        self._interrupt = interrupt
        self._is_announced = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self) -> bool:
        """Whether a signal has come; the first call that finds one says so. For the loop, at step boundaries."""
        if self.received and not self._is_announced:
            self._is_announced = True
            progress.current().say(f"{self.received.name}: saving this step; once more stops at once")
        return self.received is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self.received = signal.Signals(number)
        self._interrupt()
