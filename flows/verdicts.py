"""What becomes of the gate's verdict: a message for the flow run's last state, and an event for a rejection."""

from prefect.events import emit_event

from nightshift.errors import NotPromotedError
from nightshift.refs import Verdict
from nightshift.text import plain


def verdict_message(run_id: str, verdict: Verdict) -> str:
    return plain(f"{run_id} {'is promoted' if verdict.promoted else 'is not promoted'}: {verdict.reason}")


def handle_rejection(run_id: str, verdict: Verdict, fail_when_rejected: bool) -> None:
    """Emit the event that a notification waits for, if the verdict is a rejection.

    Raises:
        NotPromotedError: it is a rejection, and the settings make that a failure.
    """
    if verdict.promoted:
        return
    resource = {"prefect.resource.id": f"nightshift.run.{run_id}", "prefect.resource.name": run_id}
    emit_event("nightshift.rejected", resource, payload={"reason": plain(verdict.reason)})
    if fail_when_rejected:
        raise NotPromotedError(verdict_message(run_id, verdict))
