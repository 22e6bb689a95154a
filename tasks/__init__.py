"""Prefect tasks: thin wrappers around one core function each, returning small references.

They share two decisions. Errors that can pass are retried, mistakes never; a store that does not answer, or whose disk
is full, is waited for. And Prefect caches no task: finished work is found in the store, under the digest of its
content, where it cannot be stale (docs/decisions/0003-the-store-is-the-cache.md).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, cast
from uuid import UUID

import httpx
from prefect import Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, StateType, TaskRun
from prefect.context import FlowRunContext
from prefect.exceptions import PrefectException, TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.states import Crashed

from nightshift import progress
from nightshift.errors import Interrupted, LeaseExpiredError, NightshiftError, StorageUnreachableError
from nightshift.progress import StepReport
from nightshift.records.run import Origin

_TRIES = 2
_STORE_TRIES, _STORE_PAUSE = 45, 20
"""A quarter of an hour at least; then the run is left to `recover`."""
_LOOK_SECONDS = 30.0
"""How often a training asks whether its flow run is Cancelled."""


def worth_another_try(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a task failed for a reason that can pass by itself."""
    error = state.data
    if isinstance(error, StorageUnreachableError | LeaseExpiredError):
        if task_run.run_count == 1:
            minutes = _STORE_TRIES * _STORE_PAUSE // 60
            progress.current().warn(f"{error}. The store is waited for, {minutes} minutes at most")
        return True
    return isinstance(error, NightshiftError) and error.transient and task_run.run_count <= _TRIES


@contextmanager
def interruptible() -> Iterator[None]:
    """Let an interruption end the flow run Crashed, to be resumed. A failure would count against the model.

    One that passes with the store's outage is retried instead, like any other task.
    """
    try:
        yield
    except LeaseExpiredError:
        raise
    except Interrupted as stopped:
        raise TerminationSignal(signal.SIGTERM) from stopped


def state_type(flow_run_id: UUID) -> StateType | None:
    """That of a flow run's state; None if the server does not say."""
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(flow_run_id).state_type
    except (httpx.HTTPError, PrefectException):
        return None


@contextmanager
def ended_when_cancelled() -> Iterator[None]:
    """Stop this process if its flow run is Cancelled, as a signal of the worker's would.

    The worker signals the process that it started last. A full disk may keep a flow run's heartbeats from Prefect's
    server, which then starts a second process of it. Nobody else would tell the first one.
    """
    flow_run_id, is_left = UUID(flow_run.get_id()), threading.Event()

    def look() -> None:
        while not is_left.wait(_LOOK_SECONDS):
            if state_type(flow_run_id) is StateType.CANCELLED:
                os.kill(os.getpid(), signal.SIGTERM)
                break

    # In the context of this thread, which names the server.
    threading.Thread(target=copy_context().run, args=(look,), name="cancelled?", daemon=True).start()
    try:
        yield
    finally:
        is_left.set()


def crashed_because(stop: TerminationSignal) -> State[Any]:
    """The last state of a flow run that was `interruptible`: Prefect's own message would not say why it stopped."""
    if not isinstance(stop.__cause__, Interrupted):
        raise stop
    return Crashed(message=str(stop.__cause__), data=stop.__cause__)


def origin_of_this_run(promote: bool) -> Origin:
    """What the record of a run says of the flow run that trains it."""
    name, context = deployment.get_name(), FlowRunContext.get()
    return Origin(
        flow_run_id=flow_run.get_id(),
        deployment=f"{flow_run.get_flow_name()}/{name}" if name else None,
        promote=promote,
        scheduled_at=flow_run.get_scheduled_start_time(),
        began_at=context.start_time if context else None,
    )


def progress_artifact(run_id: str) -> Callable[[StepReport], object]:
    """A function that shows a step report as the progress artifact of the task run."""
    artifact: UUID | None = None

    def show(report: StepReport) -> None:
        nonlocal artifact
        share = 100 * report.step / report.total_steps
        text = (
            f"{run_id}: step {report.step:,} of {report.total_steps:,}, epoch {report.epoch} of {report.epochs}, loss "
            f"{report.loss:.3f}, accuracy {report.accuracy:.1%}, {report.images_per_second:,.0f} images/s"
        )
        if artifact:
            update_progress_artifact(artifact, share, text)
        else:
            artifact = cast(UUID, create_progress_artifact(share, key="training", description=text))

    return show


step = task(
    cache_policy=NO_CACHE,
    retries=_STORE_TRIES,
    retry_delay_seconds=[2, *[_STORE_PAUSE] * (_STORE_TRIES - 1)],
    retry_condition_fn=worth_another_try,
    persist_result=True,
    result_serializer="json",
)
