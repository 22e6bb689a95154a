"""Prefect tasks: thin wrappers around one core function each, returning small references.

They share two decisions. Errors that can pass are retried, mistakes never. And Prefect caches no task:
finished work is found in the store, under the digest of its content, where it cannot be stale
(docs/decisions/0003-the-store-is-the-cache.md).
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from uuid import UUID

from prefect import Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import TerminationSignal
from prefect.states import Crashed

from nightshift.errors import Interrupted, NightshiftError
from nightshift.progress import StepReport


def worth_another_try(task: Task[Any, Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Whether a task failed for a reason that can pass by itself."""
    error = state.data
    return isinstance(error, NightshiftError) and error.transient


@contextmanager
def interruptible() -> Iterator[None]:
    """Let an interruption end the flow run Crashed, to be resumed. A failure would count against the model."""
    try:
        yield
    except Interrupted as stopped:
        raise TerminationSignal(signal.SIGTERM) from stopped


def crashed_because(stop: TerminationSignal) -> State[Any]:
    """The last state of a flow run that was `interruptible`: Prefect's own message would not say why it stopped."""
    if not isinstance(stop.__cause__, Interrupted):
        raise stop
    return Crashed(message=str(stop.__cause__), data=stop.__cause__)


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
    retries=2,
    retry_delay_seconds=[2, 20],
    retry_condition_fn=worth_another_try,
    persist_result=True,
    result_serializer="json",
)
