"""The Prefect server's client, with errors a user can act on."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL

from nightshift.errors import PrefectServerError
from nightshift.local.prefect import login_is_missing


@contextmanager
def connected() -> Iterator[SyncPrefectClient]:
    """A client of the configured server.

    Raises:
        PrefectServerError: it does not answer, or refuses a request.
    """
    try:
        with get_client(sync_client=True) as client:
            yield client
    except PrefectHTTPStatusError as error:
        if error.response.status_code == 401:
            raise login_is_missing(PREFECT_API_URL.value()) from error
        raise PrefectServerError(f"{PREFECT_API_URL.value()} answers {error.response.text or error}") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise PrefectServerError(
            f"{PREFECT_API_URL.value()} does not answer ({error}): start the server, or correct PREFECT_API_URL"
        ) from error
