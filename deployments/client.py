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
    with errors_explained(), get_client(sync_client=True) as client:
        yield client


@contextmanager
def errors_explained() -> Iterator[None]:
    """Turn what Prefect raises about its server into PrefectServerError, which says what to do."""
    try:
        yield
    except PrefectHTTPStatusError as error:
        if error.response.status_code == 401:
            raise login_is_missing(PREFECT_API_URL.value()) from error
        said = f"{error.response.status_code} {error.response.text}".strip()
        raise PrefectServerError(f"{PREFECT_API_URL.value()} answers {said}: see its log and its disk") from error
    except RuntimeError as error:
        # So Prefect's client says that its first request has failed, for whatever reason, or that versions differ.
        if not str(error).startswith(("Failed to reach API at", "Found incompatible versions")):
            raise
        raise PrefectServerError(f"{error}: start the server, look at its log, or correct PREFECT_API_URL") from error
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise PrefectServerError(
            f"{PREFECT_API_URL.value()} does not answer ({error}): start the server, or correct PREFECT_API_URL"
        ) from error
