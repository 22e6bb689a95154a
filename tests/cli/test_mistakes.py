"""A mistake that only the store can see is a sentence that says what to do, and an exit code; never a traceback."""

import json
import os
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nightshift.local.prefect import PrefectServer
from nightshift.local.s3 import embedded_s3
from nightshift.storage.s3 import S3
from tests.commands import Command, Finished

MISTAKES = {
    ("resume", "nobody"): "nightshift runs",
    ("show", "nobody"): "nightshift runs",
    ("export", "nobody", "--out", "model"): "nightshift runs",
    ("promote", "nobody"): "no version 'nobody' of cifar10 is published",
    ("champion",): "cifar10 has no champion yet",
    ("predict", "picture.png", "--out", "found.txt"): "written as .csv or .jsonl",
}
ALL_OF_THEM = """
import contextlib, io, json, sys
from nightshift.cli import main

for arguments in json.loads(sys.argv[1]):
    sys.argv, printed = ["nightshift", *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            main()
    except SystemExit as ended:
        print(json.dumps([ended.code, printed.getvalue()]))
"""


@pytest.fixture(scope="module")
def ends(home: Path, server: S3) -> dict[tuple[str, ...], tuple[int, str]]:
    """Exit code and standard error of each mistake. One process makes them all: its imports are most of the time."""
    environment = {"NIGHTSHIFT_HOME": str(home), "NIGHTSHIFT_S3__PREFIX": "mistakes"}
    command = [sys.executable, "-c", ALL_OF_THEM, json.dumps(list(MISTAKES))]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600)
    return dict(zip(MISTAKES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("arguments", MISTAKES)
def test_a_users_mistake_ends_with_exit_code_2_and_says_what_is_allowed(
    ends: dict[tuple[str, ...], tuple[int, str]], arguments: tuple[str, ...]
) -> None:
    exit_code, printed = ends[arguments]
    assert exit_code == 2
    assert MISTAKES[arguments] in " ".join(printed.split())


def test_no_mistake_leaves_a_run(ends: dict[tuple[str, ...], tuple[int, str]], home: Path) -> None:
    with embedded_s3(home, "mistakes") as store:
        assert not list(store.list("runs/"))


def test_a_setting_that_does_not_parse_is_named(nightshift: Callable[..., Finished]) -> None:
    done = nightshift("runs", NIGHTSHIFT_LEASE_SECONDS="soon")
    assert done.exit_code == 2
    assert "NIGHTSHIFT_LEASE_SECONDS" in done.err


def elsewhere(endpoint: str, bucket: str = "nightshift") -> dict[str, str]:
    return {
        "NIGHTSHIFT_S3__ENDPOINT_URL": endpoint,
        "NIGHTSHIFT_S3__BUCKET": bucket,
        "AWS_ACCESS_KEY_ID": "wrong",
        "AWS_SECRET_ACCESS_KEY": "wrong",
    }


def test_a_store_that_does_not_answer_is_told_with_its_endpoint(nightshift: Callable[..., Finished]) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = nightshift("runs", **elsewhere(endpoint))
    assert done.exit_code == 1
    assert endpoint in done.err
    assert "does not answer" in done.err
    assert "Traceback" not in done.err


def test_wrong_credentials_are_told_with_the_variables_to_set(nightshift: Callable[..., Finished], server: S3) -> None:
    done = nightshift("runs", **elsewhere(server.endpoint))
    assert done.exit_code == 1
    assert "AWS_ACCESS_KEY_ID" in done.err


def credentials(home: Path) -> dict[str, str]:
    pair = json.loads((home / "s3" / "credentials.json").read_text())
    return {"AWS_ACCESS_KEY_ID": pair["access_key"], "AWS_SECRET_ACCESS_KEY": pair["secret_key"]}


def test_a_missing_bucket_is_named(nightshift: Callable[..., Finished], server: S3, home: Path) -> None:
    done = nightshift("runs", **{**elsewhere(server.endpoint, "no-such-bucket"), **credentials(home)})
    assert done.exit_code == 1
    assert "no-such-bucket" in done.err


def test_a_home_that_cannot_be_written_is_told_with_the_variable_to_set(
    nightshift: Callable[..., Finished], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = nightshift("runs", NIGHTSHIFT_HOME=str(tmp_path / "file" / "home"))
    assert done.exit_code == 1
    assert "NIGHTSHIFT_HOME" in done.err
    assert "Traceback" not in done.err


class Broken(BaseHTTPRequestHandler):
    """A Prefect server whose database has no room: it knows its version, and no more."""

    version = b'"3.8.8"'

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_well = self.version and self.path.endswith("/version")
        body = self.version if is_well else b'{"exception_message": "Internal Server Error"}'
        self.send_response(200 if is_well else 500)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.do_POST()

    def log_message(self, *_: object) -> None:
        pass


class Speechless(Broken):
    version = b""


@pytest.mark.parametrize(("kind", "said"), [(Broken, "/api answers 500"), (Speechless, "Failed to reach API at")])
def test_a_prefect_server_that_fails_in_mid_flow_is_one_sentence(
    nightshift: Callable[..., Finished], kind: type[Broken], said: str
) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api"
        done = nightshift("train", "--recipe=tutorial", "--run-id=unlucky", PREFECT_API_URL=url)
        server.shutdown()
    assert done.exit_code == 1
    assert said in done.err
    assert url in done.err
    assert "Traceback" not in done.err


def test_a_full_disk_is_told_and_leaves_no_half_data_set(
    start: Callable[..., Command], server: S3, home: Path, prefect_server: PrefectServer, tmp_path: Path
) -> None:
    command = start(
        *("train", "--recipe", "tutorial"),
        NIGHTSHIFT_HOME=str(tmp_path / "home"),
        NIGHTSHIFT_S3__ENDPOINT_URL=server.endpoint,
        NIGHTSHIFT_S3__BUCKET=server.bucket,
        **prefect_server.environment,
        **credentials(home),
    )
    # A limit on the size of its files stands in for a full disk: the package fits under it, the data set does not.
    resource.prlimit(command.pid, resource.RLIMIT_FSIZE, (160_000_000, 160_000_000))
    done = command.finish()
    assert done.exit_code == 1
    assert "File too large" in done.err
    assert "NIGHTSHIFT_HOME" in done.err
    assert "Traceback" not in done.err
    assert not list((tmp_path / "home" / "datasets").iterdir())
