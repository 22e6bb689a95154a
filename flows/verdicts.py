"""What becomes of the gate's verdict: a message for the flow run's last state, and an event for a rejection."""

from prefect.events import emit_event

from nightshift.errors import NotPromotedError
from nightshift.judging.table import guards_table
from nightshift.refs import Verdict
from nightshift.text import plain

_SHOWN = 4
"""How many guards a message shows beside the whole."""


def verdict_message(run_id: str, verdict: Verdict, clock: str = "") -> str:
    """The verdict in a line, and a short table if something was compared.

    Args:
        clock: why the clock has ended the training, if it did.
    """
    ended = [plain(f"The clock has ended the training {clock}")] if clock else []
    return "\n".join([_sentence(run_id, verdict), *ended, *guards_table(verdict, _SHOWN)])


def handle_rejection(run_id: str, verdict: Verdict, fail_when_rejected: bool) -> None:
    """Emit the event that a notification waits for, if the verdict is a rejection.

    Raises:
        NotPromotedError: it is a rejection, and the settings make that a failure.
    """
    if verdict.promoted:
        return
    resource = {"prefect.resource.id": f"nightshift.run.{run_id}", "prefect.resource.name": run_id}
    payload = {"reason": plain(verdict.reason), "table": "\n".join(guards_table(verdict, _SHOWN))}
    emit_event("nightshift.rejected", resource, payload=payload)
    if fail_when_rejected:
        raise NotPromotedError(_sentence(run_id, verdict))


def _sentence(run_id: str, verdict: Verdict) -> str:
    return plain(f"{run_id} {'is promoted' if verdict.promoted else 'is not promoted'}: {verdict.reason}")
