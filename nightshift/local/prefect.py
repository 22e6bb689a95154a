"""A Prefect server of our own for those who have none: started by a command, shared, stopped after use.

It runs in a process of its own. Nothing here imports Prefect.
"""

import os
import re
import secrets
import sys
import tomllib
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nightshift.disk import Room, disk_is_full, room
from nightshift.errors import DiskError, LocalServiceError, PrefectServerError, SettingsError
from nightshift.local import supervisor
from nightshift.local.ports import any_port, is_free
from nightshift.local.secrets import made_once, written
from nightshift.local.supervisor import Server, using, wait_until

_RETENTION_DAYS = 30
"""How long flow runs that have ended stay in the server's database. What a run is stands in the bucket."""

POOL = "gpu-process"
"""The work pool whose workers train."""

WAITING_POOL = "cpu-process"
"""The work pool of the flows that train nothing and wait for those that do. Its workers run any number of flows."""


@dataclass(frozen=True)
class PrefectServer:
    """A Prefect server, and what its API asks of whoever uses it: a login, a key (Prefect Cloud), or nothing."""

    api_url: str
    login: str | None = field(default=None, repr=False)
    key: str | None = field(default=None, repr=False)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process and its children clients of this server. Prefect reads it when it is imported."""
        return {"PREFECT_API_URL": self.api_url} | ({"PREFECT_API_AUTH_STRING": self.login} if self.login else {})


def configured_server() -> PrefectServer | None:
    """The Prefect server the user has chosen, by environment or by the active profile.

    Raises:
        SettingsError: what the user has chosen is no URL.
    """
    url = _configured("PREFECT_API_URL")
    if not url:
        return None
    if not _is_url(url):
        raise SettingsError(
            "PREFECT_API_URL is no URL such as http://127.0.0.1:4200/api: correct it, in the environment or in the "
            "profile of Prefect's"
        )
    return PrefectServer(url, _configured("PREFECT_API_AUTH_STRING"), _configured("PREFECT_API_KEY"))


def _is_url(text: object) -> bool:
    try:
        found = urlsplit(str(text))
        return bool(found.hostname and found.port != 0) and re.fullmatch(r"https?://\S+", str(text)) is not None
    except ValueError:  # its port is no port, or its host is half an IPv6 address
        return False


def chosen_server(home: Path) -> PrefectServer | None:
    """The server the user has chosen, or else the one that `nightshift up` keeps running here.

    A user who has chosen our own by its URL, as another shell knows it, need not set a login: it is stored here.

    Raises:
        LocalServiceError: it is our own, and an older nightshift has started it without a login.
    """
    directory, chosen = home.resolve() / "prefect", configured_server()
    ours = supervisor.running_facts(directory)
    if ours and (chosen.api_url.rstrip("/") == ours["api_url"] if chosen else supervisor.is_kept(directory)):
        return _with_login(directory, ours)
    return chosen


@contextmanager
def local_prefect(home: Path) -> Iterator[tuple[PrefectServer, Callable[[], None]]]:
    """The server whose files are under `home`. It is started if it is not running, and not waited for.

    Yields:
        The server, and a function to call before the first use: it waits until the server answers, and raises
        LocalServiceError if it does not.

    Raises:
        LocalServiceError: it runs already, and an older nightshift has started it without a login.
    """
    directory = home / "prefect"
    with using(directory, lambda: _plan(directory)) as facts:
        server = _with_login(directory, facts)
        yield server, lambda: wait_until(lambda: _answers(server.api_url), directory)


def login_file(home: Path) -> Path:
    """Where the login of our own server is."""
    return home.resolve() / "prefect" / "login"


def _plan(directory: Path) -> Server:
    port = _port(directory)
    ui_url = f"http://127.0.0.1:{port}"
    api_url = f"{ui_url}/api"
    return Server(
        # With its background services: without them the states of tasks are not recorded.
        command=[
            *(sys.executable, "-m", "deployments.server", "server", "start", "--host", "127.0.0.1"),
            *("--port", str(port)),
        ],
        environment={
            "PREFECT_HOME": str(directory),
            "PREFECT_API_URL": api_url,
            # Whoever may use the API may have workers run commands. Without a login that is every user of the machine;
            # and by default every web page may ask, and read the answer.
            "PREFECT_SERVER_API_AUTH_STRING": made_once(directory / "login", _new_login),
            "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": ui_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # By default leases are in memory. A restart would lose them, and a run would die when it renews its own.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            # By default only events are deleted, and `recover` alone runs 288 times a day.
            "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
            "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(_RETENTION_DAYS * 86_400),
            "DO_NOT_TRACK": "1",
        },
        facts={"api_url": api_url, "asks_for_login": True},
    )


def _new_login() -> str:
    return f"nightshift:{secrets.token_urlsafe(32)}"


def _with_login(directory: Path, facts: Mapping[str, Any]) -> PrefectServer:
    login = directory / "login"
    if not facts.get("asks_for_login"):
        trouble = "was started by an older nightshift and lets anyone run commands here"
    elif not login.exists():
        trouble = f"asks for the login that was in {login}"
    else:
        return PrefectServer(facts["api_url"], login.read_text())
    raise LocalServiceError(
        f"the Prefect server at {facts['api_url']} {trouble}: stop it with `nightshift down`, or wait until the "
        "command that uses it has ended, then try again"
    )


def _configured(name: str) -> str | None:
    """A setting of Prefect's, by environment or by the active profile."""
    if os.environ.get(name):
        return os.environ[name]
    try:
        home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
        profiles = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser()
        known = tomllib.loads(profiles.read_text())
        active = os.environ.get("PREFECT_PROFILE") or known["active"]
        return known["profiles"][active].get(name)  # type: ignore[no-any-return]
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
        # There is none, or none that Prefect could read. A home that is ~nobody's is a RuntimeError.
        return None


def online_workers(server: PrefectServer, pool: str = POOL) -> list[str]:
    """The names of a pool's workers that have reported lately.

    Raises:
        PrefectServerError: the server does not answer as one does, or asks for a login, and this is not it.
    """
    import httpx  # here, because it takes half a second, and a mistake is reported before

    try:
        workers = ask(server, f"work_pools/{pool}/workers/filter", {})
        return [worker["name"] for worker in workers if worker["status"] == "ONLINE"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == httpx.codes.NOT_FOUND:
            return []  # no such pool yet
        chosen = ": start it, or correct PREFECT_API_URL" if configured_server() else ""
        raise PrefectServerError(
            f"{server.api_url} does not answer as a Prefect server does ({error}){chosen}"
        ) from error


def check_login(server: PrefectServer) -> None:
    """Check that the server accepts our login. A server that does not answer is not an error here.

    Raises:
        PrefectServerError: the server asks for a login, and this is not it.
    """
    import httpx

    with suppress(httpx.HTTPError, httpx.InvalidURL, ValueError):
        ask(server, "admin/version")


def is_ours(home: Path, api_url: str) -> bool:
    """Whether the server at this URL is the one whose files are under `home`, and runs."""
    return supervisor.running_facts(home.resolve() / "prefect").get("api_url") == api_url


def check_room(home: Path, api_url: str) -> None:
    """Raise DiskError if this server is our own and its disk is full: it would answer 500 to what it has to write."""
    directory = home.resolve() / "prefect"
    if is_ours(home, api_url) and room(directory) is Room.NONE:
        raise DiskError(f"the Prefect server of this machine cannot write: {disk_is_full(directory)}")


def ask(server: PrefectServer, path: str, body: Mapping[str, Any] | None = None, timeout: float = 10) -> Any:
    """The API's answer to a GET of the path or, if there is a body, to a POST of it.

    Raises:
        PrefectServerError: the server asks for a login, and this is not it.
        httpx.HTTPError, httpx.InvalidURL: it does not answer within `timeout` seconds, or refuses the request.
        ValueError: the answer is no JSON.
    """
    import httpx

    headers = {}
    if server.login:
        headers["Authorization"] = f"Basic {b64encode(server.login.encode()).decode()}"
    elif server.key:
        headers["Authorization"] = f"Bearer {server.key}"
    method = "GET" if body is None else "POST"
    # With the login in the URL, if there is one.
    response = httpx.request(
        method, f"{server.api_url.rstrip('/')}/{path}", json=body, headers=headers, timeout=timeout
    )
    if response.status_code == httpx.codes.UNAUTHORIZED:
        raise login_is_missing(server.api_url)
    return response.raise_for_status().json()


def login_is_missing(api_url: str) -> PrefectServerError:
    """The error to raise when a server answers 401."""
    return PrefectServerError(
        f"{api_url} asks for a login: set PREFECT_API_AUTH_STRING to it (for Prefect Cloud, PREFECT_API_KEY). "
        "`nightshift up` prints where the login of its own server is"
    )


def _port(directory: Path) -> int:
    """Last time's port if it is still free, so that a URL that people have noted stays right."""
    path = directory / "port"
    port = int(path.read_text()) if path.exists() else any_port()
    while not is_free(port):
        port = any_port()
    written(path, str(port))
    return port


def _answers(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
