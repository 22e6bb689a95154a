"""Processes of their own, which is what a resume needs; they are forked from one that has imported torch."""

import io
import multiprocessing
import multiprocessing.process
import signal
import traceback
import warnings
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any


@cache
def _forks() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    # As in tests/forked.py: several threads start processes here.
    multiprocessing.process._cleanup = lambda: None  # type: ignore[attr-defined]
    # Nothing that it imports may touch a GPU, or a forked process could not use it.
    context.set_forkserver_preload(["torch._dynamo", "tests.gpu.stage", "tests.gpu.networks", __name__])
    return context


class Child:
    """A function in a process of its own."""

    def __init__(self, work: Callable[..., Any], *arguments: Any) -> None:
        context = _forks()
        self._ours, theirs = context.Pipe(duplex=False)
        self._name = work.__name__
        self.process: BaseProcess = context.Process(target=_be, args=(theirs, work, arguments))
        self.process.start()
        theirs.close()

    def result(self, seconds: float) -> Any:
        """What the function returns.

        Raises:
            AssertionError: it has failed, or is not done after so many seconds.
        """
        assert self._ours.poll(seconds), self._stopped(f"{self._name} is not done after {seconds:.0f} s")
        try:
            result, error = self._ours.recv()
        except EOFError:
            self.process.join(seconds)
            raise AssertionError(f"{self._name} died with exit code {self.process.exitcode}") from None
        self.process.join(seconds)
        assert not error, f"{self._name} failed: {error}"
        assert self.process.exitcode == 0, self._stopped(f"{self._name} does not end: {self.process.exitcode}")
        return result

    def is_killed(self, seconds: float) -> bool:
        """Whether a SIGKILL has ended it."""
        self.process.join(seconds)
        return self.process.exitcode == -signal.SIGKILL

    def _stopped(self, why: str) -> str:
        self.process.kill()
        return why


def in_child(work: Callable[..., Any], *arguments: Any, seconds: float = 300) -> Any:
    """What a function returns in a process of its own; raises as `Child.result`."""
    return Child(work, *arguments).result(seconds)


def _be(answer: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("ignore")
    try:
        answer.send((work(*arguments), ""))
    except BaseException:
        text = io.StringIO()
        traceback.print_exc(file=text)
        answer.send((None, text.getvalue()[-2000:]))
