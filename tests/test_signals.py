"""A polite stop: the handler sets a flag and nothing else."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from nightshift import progress
from nightshift.progress import LogProgress
from nightshift.signals import StopSignals


class Locked(LogProgress):
    """Speaks only while it has its lock, as a logger and a channel do."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        with self.lock:
            self.messages.append(message)


@contextmanager
def seconds_at_most(limit: int) -> Iterator[None]:
    """A deadlock of this thread becomes a failure: the alarm's handler interrupts the wait for a lock."""

    def stop(number: int, frame: object) -> None:
        pytest.fail(f"still waiting after {limit} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_its_thread_holds_the_logs_lock_waits_for_nothing(number: signal.Signals) -> None:
    shown = Locked()
    with progress.shown_by(shown), StopSignals() as signals, seconds_at_most(5):
        with shown.lock:
            os.kill(os.getpid(), number)
            assert signals.received == number
        assert shown.messages == []
        assert signals.poll()
        assert signals.poll()
    assert [message.partition(":")[0] for message in shown.messages] == [number.name]


def test_a_second_signal_stops_at_once() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt, match="second SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)


def test_what_is_called_at_the_first_signal_may_raise() -> None:
    def interrupt() -> None:
        raise TimeoutError

    with StopSignals(interrupt) as signals, pytest.raises(TimeoutError):
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals.poll()
