"""A Prefect server of our own for those who have none: started by a command, shared, stopped after use.

It runs in a process of its own. Nothing here imports Prefect.
"""

import json
import os
import socket
import sys
import tomllib
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from nightshift.local import supervisor
from nightshift.local.supervisor import Server, using, wait_until

# A first start creates the database, which takes about 20 s on two busy cores.
_START_SECONDS = 180

POOL = "gpu-process"
"""The work pool whose workers train."""

WAITING_POOL = "cpu-process"
"""The work pool of the flows that train nothing and wait for those that do. Its workers run any number of flows."""


def configured_api_url() -> str | None:
    """The Prefect server the user has chosen, by environment or by the active profile."""
    if os.environ.get("PREFECT_API_URL"):
        return os.environ["PREFECT_API_URL"]
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    profiles = Path(os.environ.get("PREFECT_PROFILES_PATH", home / "profiles.toml")).expanduser()
    try:
        known = tomllib.loads(profiles.read_text())
        active = os.environ.get("PREFECT_PROFILE") or known["active"]
        return known["profiles"][active].get("PREFECT_API_URL")  # type: ignore[no-any-return]
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return None


def server_url(home: Path) -> str | None:
    """The server the user has chosen, or else the one that `nightshift up` keeps running here."""
    return configured_api_url() or supervisor.kept_facts(home.resolve() / "prefect").get("api_url")


@contextmanager
def local_prefect(home: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The server whose files are under `home`. It is started if it is not running, and not waited for.

    Yields:
        Its API's URL, and a function to call before the first use: it waits until the server answers, and raises
        LocalServiceError if it does not.
    """
    directory = home / "prefect"
    with using(directory, lambda: _plan(directory)) as facts:
        api_url = facts["api_url"]
        yield api_url, lambda: wait_until(lambda: _answers(api_url), directory, _START_SECONDS)


def _plan(directory: Path) -> Server:
    port = _port(directory)
    api_url = f"http://127.0.0.1:{port}/api"
    return Server(
        # With its background services: without them the states of tasks are not recorded.
        command=[sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        environment={
            "PREFECT_HOME": str(directory),
            "PREFECT_API_URL": api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # By default leases are in memory. A restart would lose them, and a run would die when it renews its own.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "DO_NOT_TRACK": "1",
        },
        facts={"api_url": api_url},
    )


def online_workers(api_url: str, pool: str = POOL) -> list[str]:
    """The names of a pool's workers that have reported lately.

    Raises:
        OSError: the server does not answer, or refuses the credentials.
    """
    headers = {"Content-Type": "application/json"}
    if login := os.environ.get("PREFECT_API_AUTH_STRING"):
        headers["Authorization"] = f"Basic {b64encode(login.encode()).decode()}"
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = f"{api_url.rstrip('/')}/work_pools/{pool}/workers/filter"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, b"{}", headers), timeout=10) as response:
            return [worker["name"] for worker in json.load(response) if worker["status"] == "ONLINE"]
    except urllib.error.HTTPError as error:
        if error.code == 404:  # no such pool yet
            return []
        raise


def _port(directory: Path) -> int:
    """Last time's port if it is still free, so that a URL that people have noted stays right."""
    path = directory / "port"
    for wanted in (int(path.read_text()) if path.exists() else 0, 0):
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", wanted))
            path.write_text(str(probe.getsockname()[1]))
            break
    return int(path.read_text())


def _answers(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
