"""A verdict as a message to an address of the team's: JSON, signed after the Standard Webhooks specification.

`beside` calls `deliver` in a process of its own, where nothing is logged: the address itself is a secret.
"""

import base64
import hashlib
import hmac
import time
from typing import Any

import httpx
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from nightshift.errors import TrackingError
from nightshift.records.keys import report_key
from nightshift.records.run import RunRecord
from nightshift.refs import ModelRef, Verdict
from nightshift.settings import Webhook
from nightshift.storage.store import Store
from nightshift.text import as_json, plain

FORMAT = 1
"""The message's version; docs/tools.md has the fields. It rises when one changes meaning or goes, not if one comes."""
_ANSWER_SECONDS, _TRY_SECONDS = 5, 30


class _NotNow(TrackingError):
    """The server may take it a little later."""


def message(store: Store, record: RunRecord, model: ModelRef, verdict: Verdict, table: list[str]) -> str:
    """The message about a verdict, as JSON.

    Args:
        table: the verdict as a table in plain text, a line each.
    """
    body: dict[str, Any] = {
        "format": FORMAT,
        "event": "verdict",
        "run_id": model.run_id,
        "model": model.name,
        "version": model.version,
        "snapshot": record.dataset.digest,
        "weights_sha256": model.weights_sha256,
        "test_accuracy": model.test_accuracy,
        "promoted": verdict.promoted,
        "reason": plain(verdict.reason),
        "champion": verdict.champion and verdict.champion.version,
        "comparison": verdict.comparison and verdict.comparison.model_dump(mode="json"),
        "guards": [{**guard.model_dump(mode="json"), "name": plain(guard.name)} for guard in verdict.guards],
        "guarded": verdict.guarded,
        "table": "\n".join(table),
        "report": store.url(report_key(model.run_id, "report.html")),
    }
    return as_json(body)


def deliver(hook: Webhook, body: str) -> None:
    """POST a message. It is tried for half a minute, under one id: who gets it twice can tell.

    Raises:
        TrackingError: it was not taken. The error does not say the address, but for its host.
    """
    try:
        url = httpx.URL(hook.url.get_secret_value())
    except httpx.InvalidURL:
        raise TrackingError("NIGHTSHIFT_WEBHOOK is no address: set it to another") from None
    identity = hashlib.sha256(body.encode()).hexdigest()[:32]
    again = Retrying(
        retry=retry_if_exception_type(_NotNow),
        stop=stop_after_delay(_TRY_SECONDS),
        wait=wait_exponential_jitter(initial=1, max=10),
        reraise=True,
    )
    with httpx.Client(timeout=_ANSWER_SECONDS, follow_redirects=False) as client:
        again(_post, client, url, hook, identity, body)


def signature(key: bytes, identity: str, seconds: int, body: str) -> str:
    """What the header webhook-signature says of a message with this id, sent at this time."""
    found = hmac.digest(key, f"{identity}.{seconds}.{body}".encode(), "sha256")
    return f"v1,{base64.b64encode(found).decode()}"


def _post(client: httpx.Client, url: httpx.URL, hook: Webhook, identity: str, body: str) -> None:
    seconds = int(time.time())
    headers = {"content-type": "application/json", "webhook-id": identity, "webhook-timestamp": str(seconds)}
    if hook.key:
        headers["webhook-signature"] = signature(hook.key.get_secret_value(), identity, seconds, body)
    try:
        with client.stream("POST", url, content=body, headers=headers) as response:  # its body says nothing to us
            status = response.status_code
    except httpx.HTTPError as error:
        raise _NotNow(f"the webhook at {url.host} does not answer ({type(error).__name__})") from None
    if status >= 500 or status in (408, 425, 429):
        raise _NotNow(f"the webhook at {url.host} answers {status}")
    if 300 <= status < 400:
        raise TrackingError(
            f"the webhook at {url.host} answers {status}, a redirect, which is not followed: set NIGHTSHIFT_WEBHOOK to "
            "where it leads"
        )
    if status >= 400:
        raise TrackingError(f"the webhook at {url.host} refuses the message ({status}): look at NIGHTSHIFT_WEBHOOK")
