"""The Prefect server of `train` and `up`: whoever has no login gets nothing of it, and whoever has it notices nothing.

Whoever may use its API may have a worker run commands as its user.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import ConnectionClosedError, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from nightshift.errors import LocalServiceError, PrefectServerError
from nightshift.local import supervisor
from nightshift.local.prefect import PrefectServer, ask, check_login, chosen_server, local_prefect, online_workers
from nightshift.local.secrets import made_once
from nightshift.local.supervisor import Server, using
from tests.commands import Finished

THEIRS = "https://prefect.example.org/api"
SOCKETS = (
    *("events/in", "events/out", "logs/out", "task_runs/subscriptions/scheduled"),
    "work_pools/gpu-process/workers/connect",
)
WRONG = {"Authorization": "Basic bmlnaHRzaGlmdDp3cm9uZw=="}


@pytest.fixture
def stranger(prefect_server: PrefectServer) -> Iterator[httpx.Client]:
    """A client that knows the server's address and nothing else."""
    with httpx.Client(base_url=prefect_server.api_url, timeout=60) as client:
        yield client


def test_every_route_refuses_who_has_no_login_or_a_wrong_one(
    prefect_server: PrefectServer, stranger: httpx.Client
) -> None:
    routes = [
        (method.upper(), re.sub(r"{[^}]+}", "00000000-0000-4000-8000-000000000000", path.removeprefix("/api")))
        for path, methods in ask(prefect_server, "openapi.json", timeout=60)["paths"].items()
        for method in methods
    ]
    assert len(routes) > 150
    assert ("POST", "/flow_runs/") in routes
    answers = {
        (method, path): {
            stranger.request(method, path, json={}, headers=headers).status_code for headers in ({}, WRONG)
        }
        for method, path in routes
    }
    opened = {route: answer for route, answer in answers.items() if answer != {401}}
    assert opened == {("GET", "/health"): {200}, ("GET", "/ready"): {200}}, "these two say that the server is up"


def test_nobody_without_the_login_makes_a_worker_run_a_command(stranger: httpx.Client) -> None:
    """This is what a web page or another user of the machine did, within five seconds."""
    evil = {"job_variables": {"command": "sh -c 'id > /tmp/evil'"}, "state": {"type": "SCHEDULED"}}
    assert stranger.get("/deployments/name/recover/every-5-minutes").status_code == 401
    assert stranger.post("/flow_runs/", json=evil).status_code == 401
    assert stranger.post("/work_pools/", json={"name": "evil", "type": "process"}).status_code == 401


@pytest.mark.parametrize("path", SOCKETS)
def test_no_websocket_lets_anybody_in_without_the_login(prefect_server: PrefectServer, path: str) -> None:
    url = f"{prefect_server.api_url.replace('http', 'ws', 1)}/{path}"
    with pytest.raises(InvalidStatus), connect(url):
        pass
    with connect(url, subprotocols=[Subprotocol("prefect")]) as socket:
        socket.send(json.dumps({"type": "auth", "token": "nightshift:wrong"}))
        with pytest.raises(ConnectionClosedError) as closed:
            socket.recv(timeout=60)
    assert closed.value.rcvd
    assert closed.value.rcvd.code == 1008  # a violation of the policy


@pytest.mark.parametrize("origin", ["https://example.org", "http://localhost:4200", "null"])
def test_a_web_page_of_others_may_neither_ask_nor_read(stranger: httpx.Client, origin: str) -> None:
    for path in ("/health", "/admin/version"):
        assert "access-control-allow-origin" not in stranger.get(path, headers={"Origin": origin}).headers
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    answer = stranger.options("/flow_runs/", headers={"Origin": origin, **asked})
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_the_ui_may_ask_and_asks_the_user_for_the_login(prefect_server: PrefectServer, stranger: httpx.Client) -> None:
    origin = prefect_server.api_url.removesuffix("/api")
    answer = stranger.get("/health", headers={"Origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin
    settings = httpx.get(f"{origin}/ui-settings").json()
    assert (settings["auth"], settings["api_url"]) == ("BASIC", prefect_server.api_url)


def test_the_login_is_in_one_file_that_only_the_user_can_read(home: Path, prefect_server: PrefectServer) -> None:
    assert prefect_server.login
    secret = prefect_server.login.partition(":")[2].encode()
    assert len(secret) > 40
    directory = home / "prefect"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "login").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in directory.rglob("*") if path.is_file() and secret in path.read_bytes()] == ["login"]


def test_the_login_is_on_no_command_line(prefect_server: PrefectServer) -> None:
    assert prefect_server.login
    commands = [read_or_nothing(path) for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert any(b"deployments.server\0server\0start" in command for command in commands)
    assert not any(prefect_server.login.encode() in command for command in commands)
    assert prefect_server.login not in repr(prefect_server)


def read_or_nothing(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.parametrize(
    "command",
    [
        ("submit", "recover"),
        ("sweep", "--over=lr=0.1"),
        ("deploy",),
        ("worker",),
        ("recover",),
        ("train", "--recipe=tutorial"),
        ("doctor",),
    ],
    ids=lambda command: command[0],
)
def test_a_command_without_the_login_says_so(
    nightshift: Callable[..., Finished], prefect_server: PrefectServer, command: tuple[str, ...]
) -> None:
    """By another name than its own, the server is none that a command knows the login of."""
    unknown = prefect_server.api_url.replace("127.0.0.1", "localhost")
    done = nightshift(*command, PREFECT_API_URL=unknown)
    assert done.exit_code == 1
    said = done.out + done.err
    assert f"{unknown} asks for a login: set PREFECT_API_AUTH_STRING" in said
    assert "Traceback" not in said
    if command[0] == "submit":
        done = nightshift(*command, **{**prefect_server.environment, "PREFECT_API_URL": unknown})
        assert done.exit_code == 0 or "there is no deployment" in done.err


def test_who_names_our_server_by_its_url_needs_no_login(
    home: Path, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "theirs:of-another-server")
    for url in (prefect_server.api_url, f"{prefect_server.api_url}/"):
        monkeypatch.setenv("PREFECT_API_URL", url)
        found = chosen_server(home)
        assert found == prefect_server
        assert found.environment["PREFECT_API_AUTH_STRING"] == prefect_server.login
        assert online_workers(found, "no-such-pool") == []


def test_a_server_of_the_users_gets_their_own_login_or_key_and_never_ours(
    home: Path, prefect_server: PrefectServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    monkeypatch.setenv("PREFECT_API_URL", THEIRS)
    assert chosen_server(home) == PrefectServer(THEIRS)
    assert PrefectServer(THEIRS).environment == {"PREFECT_API_URL": THEIRS}
    monkeypatch.setenv("PREFECT_API_AUTH_STRING", "their:own")
    assert chosen_server(home) == PrefectServer(THEIRS, "their:own")
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    monkeypatch.delenv("PREFECT_API_URL")
    profile = f'active = "work"\n[profiles.work]\nPREFECT_API_URL = "{THEIRS}"\nPREFECT_API_KEY = "their-key"\n'
    (tmp_path / "profiles.toml").write_text(profile)
    assert chosen_server(home) == PrefectServer(THEIRS, key="their-key")


def test_a_wrong_login_is_told_and_a_server_that_is_away_is_not_asked_about_it(prefect_server: PrefectServer) -> None:
    check_login(prefect_server)
    check_login(PrefectServer("http://127.0.0.1:9/api", "nightshift:any"))
    with pytest.raises(PrefectServerError, match="PREFECT_API_AUTH_STRING") as refused:
        check_login(PrefectServer(prefect_server.api_url, "nightshift:wrong"))
    assert "nightshift:wrong" not in str(refused.value)


@pytest.mark.parametrize(
    ("facts", "trouble"),
    [({}, "started by an older nightshift"), ({"asks_for_login": True}, "asks for the login that was in")],
    ids=["of an older nightshift", "its login was deleted"],
)
def test_a_running_server_that_nobody_can_log_in_to_is_not_used_but_stopped(
    nightshift: Callable[..., Finished], tmp_path: Path, facts: dict[str, bool], trouble: str
) -> None:
    """Yesterday's asks for no login. To be used it must be started again, and its user decides when."""
    home = tmp_path / "home"
    left = Server(command=["sleep", "600"], environment={}, facts={"api_url": "http://127.0.0.1:9/api", **facts})
    with using(home / "prefect", lambda: left):
        supervisor.keep(home / "prefect")
    with pytest.raises(LocalServiceError, match="nightshift down"), local_prefect(home):
        pass
    environment = {"NIGHTSHIFT_HOME": str(home), "PREFECT_PROFILES_PATH": str(tmp_path / "none")}
    refused = nightshift("submit", "recover", **environment)
    assert refused.exit_code == 1
    assert trouble in refused.err
    assert nightshift("down", "--json", **environment).json == {"stopped": ["prefect"], "in_use": []}
    assert "no Prefect server" in nightshift("submit", "recover", **environment).err


def test_a_secret_is_made_once_however_many_come_at_the_same_moment(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with ThreadPoolExecutor(16) as people:
            texts = list(
                people.map(lambda number: made_once(tmp_path / "own" / "secret", lambda: str(number)), range(64))
            )
    finally:
        os.umask(before)
    assert len(set(texts)) == 1
    assert [path.name for path in (tmp_path / "own").iterdir()] == ["secret"]
    assert (tmp_path / "own" / "secret").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "own").stat().st_mode & 0o777 == 0o700
