"""Prefect tasks: thin wrappers around one core function each, returning small references.

They share two decisions. Retries are for what can pass, never for a mistake. And none is cached by Prefect:
what was done is found again in the store, under the digest of its content, where it cannot be stale
(docs/decisions/0003-the-store-is-the-cache.md).
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import TerminationSignal

from nightshift.errors import Interrupted, NightshiftError


def worth_another_try(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a task failed for a reason that can pass by itself."""
    error = state.data
    return isinstance(error, NightshiftError) and error.transient


@contextmanager
def interruptible() -> Iterator[None]:
    """End the flow run Crashed, to be resumed: as a failure, an interruption would count against the model."""
    try:
        yield
    except Interrupted as stopped:
        raise TerminationSignal(signal.SIGTERM) from stopped


step = task(
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[2, 20],
    retry_condition_fn=worth_another_try,
    persist_result=True,
    result_serializer="json",
)
