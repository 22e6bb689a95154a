"""A Prefect server of our own for those who have none: started by a command, shared, stopped after use.

It is a process of its own; nothing here imports Prefect.
"""

import os
import socket
import sys
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from nightshift.supervisor import Server, using, wait_until

# A first start creates the database, which takes about 20 s on two busy cores.
_START_SECONDS = 180


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


@contextmanager
def local_prefect(home: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The server that lives under `home`, started if need be and not yet waited for.

    Yields:
        Its API's URL, and what is to be called before the first use; that raises LocalServiceError.
    """
    directory = home / "prefect"
    with using(directory, lambda: _plan(directory)) as facts:
        api_url = facts["api_url"]
        yield api_url, lambda: wait_until(lambda: _answers(api_url), directory, _START_SECONDS)


def _plan(directory: Path) -> Server:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    api_url = f"http://127.0.0.1:{port}/api"
    return Server(
        # With its background services: without them the states of tasks are not recorded.
        command=[sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        environment={
            "PREFECT_HOME": str(directory),
            "PREFECT_API_URL": api_url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        },
        facts={"api_url": api_url},
    )


def _answers(api_url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url}/health", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
