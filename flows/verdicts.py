"""What becomes of the gate's verdict: a line for the final state, and word to whoever wants to be told."""

from prefect.events import emit_event

from nightshift.errors import NotPromotedError
from nightshift.refs import Verdict


def told(run_id: str, verdict: Verdict, fail_when_rejected: bool) -> str:
    """The verdict as a sentence; a rejection is also an event, which a notification waits for.

    Raises:
        NotPromotedError: it is a rejection, and that is to be a failure.
    """
    sentence = f"{run_id} {'is promoted' if verdict.promoted else 'is not promoted'}: {verdict.reason}"
    if not verdict.promoted:
        resource = {"prefect.resource.id": f"nightshift.run.{run_id}", "prefect.resource.name": run_id}
        emit_event("nightshift.rejected", resource, payload={"reason": verdict.reason})
    if fail_when_rejected and not verdict.promoted:
        raise NotPromotedError(sentence)
    return sentence
