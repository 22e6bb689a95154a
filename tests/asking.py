"""Asking a Prefect server's API, as patiently as Prefect's own client does."""

from collections.abc import Mapping
from typing import Any

import httpx
from tenacity import retry, retry_if_exception, stop_after_delay, wait_fixed

from nightshift.local import prefect
from nightshift.local.prefect import PrefectServer


def _passes(error: BaseException) -> bool:
    """SQLite is locked now and then, and the server answers 503, or not within half a minute."""
    return isinstance(error, httpx.TimeoutException) or (
        isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.SERVICE_UNAVAILABLE
    )


@retry(retry=retry_if_exception(_passes), stop=stop_after_delay(120), wait=wait_fixed(0.5), reraise=True)
def ask(server: PrefectServer, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """What the API has at a path, or says to a body."""
    return prefect.ask(server, path, body, timeout=30)
