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

    Python delivers signals to the main thread only. In another thread this does nothing, and whoever runs
    the loop there must pass the request on by other means.
    """

    def __init__(self, pass_on: Callable[[], object] = lambda: None) -> None:
        """`pass_on`: called at the first signal, to stop others too."""
        self.received: signal.Signals | None = None
        self._pass_on = pass_on
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise KeyboardInterrupt(f"second {signal.Signals(number).name}")
        self.received = signal.Signals(number)
        progress.current().say(f"{self.received.name}: finishing this step and saving; once more stops at once")
        self._pass_on()
