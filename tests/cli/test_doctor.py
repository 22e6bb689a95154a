"""What `doctor` looks for where it matters, and only there."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from nightshift.cli import doctor
from nightshift.errors import PrefectServerError, SettingsError
from nightshift.local.prefect import PrefectServer, configured_server, online_workers
from nightshift.storage.s3 import S3
from tests.cli.test_mistakes import credentials
from tests.commands import Finished


def checks(gpus: int) -> dict[str, tuple[bool, str]]:
    return {check.name: (check.ok, check.detail) for check in doctor._needs_of_gpus(gpus)}


def test_a_machine_without_gpus_needs_neither_a_compiler_nor_shared_memory() -> None:
    assert checks(0) == {}
    assert set(checks(1)) == {"compiler"}


def test_a_missing_compiler_and_a_containers_default_of_shared_memory_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(doctor, "_SHARED_MEMORY_BYTES", float("inf"))
    found = checks(8)
    assert not found["compiler"][0]
    assert "Install gcc, or set compile=off" in found["compiler"][1]
    assert not found["shared memory"][0]
    assert "too little for the ranks of 8 GPUs" in found["shared memory"][1]


class Unlike(BaseHTTPRequestHandler):
    """A server that is nobody's Prefect server; it keeps what it was told to know the caller by."""

    told: str | None = None

    def do_POST(self) -> None:
        type(self).told = self.headers["Authorization"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'["a worker?"]')

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[str]:
    """HOST:PORT of such a server."""
    with HTTPServer(("127.0.0.1", 0), Unlike) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_login_in_prefects_url_is_used_and_its_password_not_shown(stranger: str) -> None:
    with pytest.raises(
        PrefectServerError, match=r"http://user:\*\*\*@127\.0\.0\.1:\d+/api does not answer as"
    ) as refusal:
        online_workers(PrefectServer(f"http://user:secret@{stranger}/api"))
    assert Unlike.told == "Basic dXNlcjpzZWNyZXQ="
    assert "secret" not in str(refusal.value)


def test_doctor_shows_no_password(nightshift: Callable[..., Finished], home: Path, server: S3, stranger: str) -> None:
    environment = {
        "NIGHTSHIFT_S3__BUCKET": server.bucket,
        "NIGHTSHIFT_S3__ENDPOINT_URL": server.endpoint.replace("//", "//user:secret@"),
        "PREFECT_API_URL": f"http://user:secret@{stranger}/api",
        **credentials(home),
    }
    for arguments in ([], ["--json"]):
        done = nightshift("doctor", *arguments, **environment)
        assert "secret" not in done.out + done.err
    found = {check["name"]: check for check in json.loads(done.out)["checks"]}
    assert found["storage"]["ok"]
    assert f"http://user:***@{stranger}/api" in found["Prefect"]["detail"]


def test_the_end_of_a_servers_log_is_shown_line_by_line(nightshift: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "s3").mkdir(mode=0o700)
    (tmp_path / "s3" / "server.pem").write_text("no certificate")
    done = nightshift("doctor", NIGHTSHIFT_HOME=str(tmp_path))
    assert done.exit_code == 1
    told, line, *_ = done.out.splitlines()
    assert told.endswith("The end of " + str(tmp_path / "s3" / "server.log:"))
    assert line.startswith("    ")
    assert line.endswith("error processing certificate in server.pem")


@pytest.mark.parametrize("url", ["nonsense", "http://", "http://[", "http://user:sec ret@host", "http://host:secret"])
def test_a_prefect_server_that_is_no_url_is_refused(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(SettingsError, match="PREFECT_API_URL is no URL such as") as refusal:
        configured_server()
    assert "ret" not in str(refusal.value)


@pytest.mark.parametrize(
    "profiles", [b"\xff", b"active = 1", b"active = 'x'\nprofiles = 3", b"active = 'x'\n[profiles]\nx = 3"]
)
def test_profiles_that_prefect_could_not_read_name_no_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, profiles: bytes
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    (tmp_path / "profiles.toml").write_bytes(profiles)
    for home in (str(tmp_path), "~nosuchuser"):
        monkeypatch.setenv("PREFECT_HOME", home)
        assert configured_server() is None
