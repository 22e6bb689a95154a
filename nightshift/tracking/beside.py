"""Reports to a server of the team's, sent beside the training from a process of its own.

The server's client takes seconds to import, and may wait for a network. Neither may cost the training a step. And a
process can be ended, whatever it waits for. If a report cannot be sent, there is only a warning.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import TypeVar

from pebble import ProcessExpired, ProcessFuture, ProcessPool

from nightshift import processes, progress
from nightshift.errors import TrackingError
from nightshift.records.run import read_record
from nightshift.refs import ModelRef, Verdict
from nightshift.settings import MlflowSettings, Webhook
from nightshift.storage.store import Store
from nightshift.tracking import mlflow, webhook

T = TypeVar("T")
_EVERY, _PATIENCE, _MOMENT, _LOOK = 30.0, 60.0, 2.0, 0.1
"""Seconds: between two reports of a run; for a report at most; for which a training waits at its end; between two
checks whether a report is done."""


@contextmanager
def sending(store: Store, settings: MlflowSettings, run_id: str, every: float = _EVERY) -> Iterator[None]:
    """While this lasts, tell MLflow every so many seconds how a run stands. Nothing is told if no server is set.

    At the end, what is under way is given up: the end of the flow sends it.
    """
    if not settings.tracking_uri:
        yield
        return
    ended = threading.Event()

    def run() -> None:
        failed = False
        with _process() as pool:
            while not ended.wait(every):
                future = pool.schedule(mlflow.send, (store, settings, run_id), timeout=_PATIENCE)
                while not future.done() and not ended.wait(_LOOK):
                    pass
                if ended.is_set():
                    return
                try:
                    _result(future)
                    failed = False
                except Exception as error:  # as in `_warned`
                    if not failed:  # one warning per outage
                        progress.current().warn(f"MLflow is not told how run {run_id} stands: {error}")
                    failed = True

    thread = threading.Thread(target=copy_context().run, args=(run,), name="MLflow", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(_MOMENT)


def send_all(store: Store, settings: MlflowSettings, first: str | None = None) -> None:
    """Tell MLflow what it lacks, in a minute at most; the run `first` before all others. Failure is a warning."""
    if settings.tracking_uri:
        with _warned("MLflow is told the rest at the end of the next night"):
            for problem in told(mlflow.send_all, store, settings, first):
                progress.current().warn(f"MLflow is not told everything: {problem}")


def send_champion(store: Store, settings: MlflowSettings, name: str) -> None:
    """Tell MLflow which version of a model is live now. Failure is a warning."""
    if settings.tracking_uri:
        with _warned("MLflow is told what is live at the end of the next night"):
            told(mlflow.send_champion, store, settings, name)


def send_verdict(store: Store, hook: Webhook, model: ModelRef, verdict: Verdict, table: list[str]) -> None:
    """Tell the webhook of a verdict, which `table` shows in plain text. Failure is a warning."""
    with _warned("the verdict is not sent"):
        record, _ = read_record(store, model.run_id)
        told(webhook.deliver, hook, webhook.message(store, record, model, verdict, table))


@contextmanager
def _warned(beginning: str) -> Iterator[None]:
    """Make of whatever goes wrong a warning: a client or a server may do anything, and the night goes on."""
    try:
        yield
    except Exception as error:
        progress.current().warn(f"{beginning}: {error}")


def told(what: Callable[..., T], *arguments: object) -> T:
    """Call a function in a process of its own. Returns what it returns, and raises what it raises.

    Raises:
        TrackingError: it took more than a minute, or its process died.
    """
    with _process() as pool:
        return _result(pool.schedule(what, arguments, timeout=_PATIENCE))


def _result(future: ProcessFuture[T]) -> T:
    try:
        return future.result()
    except TimeoutError:
        raise TrackingError(f"not all could be sent in {_PATIENCE:.0f} s") from None
    except ProcessExpired as error:
        raise TrackingError(f"the process that sends has died (exit {error.exitcode})") from None


@contextmanager
def _process() -> Iterator[ProcessPool]:
    """What calls functions in one process, which is ended with this context."""
    pool = ProcessPool(1, initializer=_begin, context=multiprocessing.get_context("forkserver"))
    try:
        yield pool
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def _begin() -> None:
    """In the child, which gives way to the training, and says nothing by itself."""
    processes.end_with_parent()
    os.nice(10)
    logging.disable()
