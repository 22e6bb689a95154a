"""How long-lived work waits for a store that does not answer."""

from collections.abc import Callable
from threading import Event

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_when_event_set,
    wait_exponential_jitter,
)

from nightshift.errors import StorageError


def patient(
    seconds: float,
    longest_pause: float = 15,
    given_up: Event | None = None,
    warn: Callable[[BaseException], object] = lambda error: None,
    also: tuple[type[Exception], ...] = (),
) -> Retrying:
    """Attempts for so many seconds, as long as the store may answer yet. The last error is raised as it is.

    Args:
        longest_pause: between two attempts, in seconds.
        given_up: set it to stop. A pause ends at once, and no further attempt is made.
        warn: called with the error before each pause.
        also: what else may pass, besides the transient errors of a store.
    """

    given_up = given_up or Event()

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception()
        assert error is not None
        warn(error)

    def may_pass(error: BaseException) -> bool:
        return isinstance(error, also) or (isinstance(error, StorageError) and error.transient)

    return Retrying(
        retry=retry_if_exception(may_pass),
        wait=wait_exponential_jitter(multiplier=0.5, max=longest_pause),
        stop=stop_after_delay(seconds) | stop_when_event_set(given_up),
        sleep=sleep_using_event(given_up),
        before_sleep=tell,
        reraise=True,
    )
