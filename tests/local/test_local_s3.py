"""The embedded S3 server: one for all its users, for nobody else, and there again whatever dies."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nightshift.errors import LocalServiceError, ObjectNotFoundError, StorageError
from nightshift.local import s3, supervisor
from nightshift.local.logs import keep_short
from nightshift.local.s3 import embedded_s3
from nightshift.progress import shown_by
from nightshift.storage.s3 import S3
from tests.conftest import eventually
from tests.data.conftest import Told
from tests.sockets import listening

USER = """
import sys
from pathlib import Path
from nightshift.local.logs import keep_short
from nightshift.local.s3 import embedded_s3

with embedded_s3(Path(sys.argv[1])) as store:
    print(store.endpoint, flush=True)
    sys.stdin.read()
"""

LONGEST = supervisor.LINGER_SECONDS + supervisor.Server.stop_seconds


@contextmanager
def user(home: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses the server of `home`; it prints the endpoint and ends with its standard input."""
    command = [sys.executable, "-c", USER, str(home)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def endpoint_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def server_pid(home: Path) -> int:
    return int((home / "s3" / "server.pid").read_text().split()[2])


def supervisor_pid(home: Path) -> int:
    return int(Path(f"/proc/{server_pid(home)}/stat").read_text().rpartition(")")[2].split()[1])


def runs(pid: int) -> bool:
    """Whether a process lives; a dead one whose parent has not asked for it (state Z) does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill(pid: int) -> None:
    """Kill a process and wait for the end of its last thread, with which its ports become free."""
    process = os.pidfd_open(pid)
    signal.pidfd_send_signal(process, signal.SIGKILL)
    ended, _, _ = select.select([process], [], [], 5)
    os.close(process)
    assert ended


def can_be_read(store: S3, key: str) -> bool:
    """Whether the server answers; an answer that an acknowledged object is not there is never right."""
    try:
        store.get(key)
    except ObjectNotFoundError:
        raise
    except StorageError:
        return False
    return True


@pytest.fixture(scope="module", autouse=True)
def seconds_outlived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[float]]:
    """How long a server outlives its last user, who is killed; it takes long, so it is watched beside the tests."""
    home = tmp_path_factory.mktemp("abandoned")
    with ThreadPoolExecutor(1) as watcher:
        with user(home) as process:
            assert endpoint_of(process).startswith("http://127.0.0.1:")
            both = supervisor_pid(home), server_pid(home)
            assert all(map(runs, both))
            process.kill()

        def watch() -> float:
            killed = time.monotonic()
            eventually(lambda: not any(map(runs, both)))
            return time.monotonic() - killed

        yield watcher.submit(watch)


def test_a_second_user_shares_the_running_server(home: Path, server: S3) -> None:
    before = supervisor_pid(home), server_pid(home)
    with user(home) as process:
        assert endpoint_of(process) == server.endpoint
        assert (supervisor_pid(home), server_pid(home)) == before


def test_users_who_come_at_the_same_moment_start_one_server(tmp_path: Path) -> None:
    with user(tmp_path) as one, user(tmp_path) as two:
        endpoints = {endpoint_of(process) for process in (one, two)}
        assert len(endpoints) == 1
        assert endpoints != {""}
        supervisors = [
            path.parent.name
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if b"nightshift.local.supervisor\0" + os.fsencode(tmp_path) in read_or_nothing(path)
        ]
    assert len(supervisors) == 1


def read_or_nothing(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_only_the_owner_can_read_the_credentials(home: Path, server: S3) -> None:
    assert (home / "s3").stat().st_mode & 0o777 == 0o700
    assert (home / "s3" / "credentials.json").stat().st_mode & 0o777 == 0o600


def test_the_secret_is_on_no_command_line(home: Path, server: S3) -> None:
    secret = json.loads((home / "s3" / "credentials.json").read_text())["secret_key"]
    for pid in (server_pid(home), supervisor_pid(home)):
        assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_the_server_listens_on_loopback_only(home: Path, server: S3) -> None:
    ports = set(json.loads((home / "s3" / "ports.json").read_text()).values())
    found = listening(server_pid(home))
    assert ports <= set(found)
    assert set(found.values()) == {"0100007F"}, f"127.0.0.1 is 0100007F, but: {found}"


def test_a_key_pair_that_was_made_anew_below_a_running_server_is_told_at_once_and_what_runs_goes_on(
    tmp_path: Path,
) -> None:
    with embedded_s3(tmp_path) as store:
        store.put("key", b"body")
        (tmp_path / "s3" / "credentials.json").unlink()
        began = time.monotonic()
        with pytest.raises(LocalServiceError, match=r"another key pair.* `nightshift down`"), embedded_s3(tmp_path):
            pass
        assert time.monotonic() - began < 15, "it is not waited for"
        assert store.get("key")[0] == b"body"


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_who_has_no_credentials_is_refused(server: S3, prefix: str, method: str) -> None:
    server.put(f"{prefix}/key", b"body")
    request = urllib.request.Request(f"{server.endpoint}/{server.bucket}/{prefix}/key", method=method, data=None)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    refused.value.close()
    assert refused.value.code == 403
    assert server.get(f"{prefix}/key")[0] == b"body"


def test_a_killed_server_is_started_again_where_it_was_with_all_it_had_acknowledged(tmp_path: Path) -> None:
    with embedded_s3(tmp_path) as store:
        written = {f"key/{number}": store.put(f"key/{number}", b"body") for number in range(50)}
        killed, supervised_by = server_pid(tmp_path), supervisor_pid(tmp_path)
        kill(killed)
        eventually(lambda: server_pid(tmp_path) != killed)
        eventually(lambda: can_be_read(store, "key/0"))
        assert supervisor_pid(tmp_path) == supervised_by
        assert {found.key: found.etag for found in store.list("")} == written
        assert {store.get(key)[0] for key in written} == {b"body"}


@pytest.mark.parametrize("victims", [["supervisor", "server"], ["supervisor"]], ids="-and-".join)
def test_after_its_supervisor_is_killed_the_next_user_starts_the_server_again_for_all_who_use_it(
    tmp_path: Path, victims: list[str]
) -> None:
    with embedded_s3(tmp_path) as first:
        first.put("old", b"body")
        old = {"supervisor": supervisor_pid(tmp_path), "server": server_pid(tmp_path)}
        for victim in victims:
            kill(old[victim])
        with embedded_s3(tmp_path) as second:
            assert second.get("old")[0] == b"body"
            second.put("new", b"body")
            assert not runs(old["server"])
            assert second.endpoint == first.endpoint
            assert first.get("new")[0] == b"body"


def test_a_home_with_a_very_long_path_works(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 20) / ("path" * 20)
    assert len(str(home)) > 160
    with embedded_s3(home) as store:
        store.put("key", b"body")
        assert store.get("key")[0] == b"body"


def test_a_home_whose_ports_are_taken_meanwhile_gets_others_and_keeps_its_data(tmp_path: Path) -> None:
    with embedded_s3(tmp_path) as store:
        first = store.endpoint
        store.put("key", b"body")
        kill(supervisor_pid(tmp_path))
        kill(server_pid(tmp_path))
    ports = json.loads((tmp_path / "s3" / "ports.json").read_text())
    with socket.create_server(("127.0.0.1", ports["s3"])), embedded_s3(tmp_path) as store:
        assert store.endpoint != first
        assert store.get("key")[0] == b"body"


def test_a_server_that_cannot_start_is_told_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "weed"
    broken.write_text("#!/bin/sh\necho 'no space for the volume'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(s3, "_weed", lambda: str(broken))
    with pytest.raises(LocalServiceError, match="no space for the volume"), embedded_s3(tmp_path / "home"):
        pass


def test_without_the_weed_program_the_way_to_get_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LocalServiceError, match="make setup"), embedded_s3(tmp_path / "home"):
        pass


def test_the_server_goes_away_by_itself_when_its_last_user_is_killed(seconds_outlived: Future[float]) -> None:
    # Not at once, because the next user often comes soon.
    assert supervisor.LINGER_SECONDS - 1 < seconds_outlived.result() < LONGEST


def test_what_a_server_printed_is_still_there_after_its_next_start_and_its_ends_are_noted(tmp_path: Path) -> None:
    directory = tmp_path / "s3"
    with embedded_s3(tmp_path):
        killed = server_pid(tmp_path)
        before = (directory / "server.log").read_text()
        kill(killed)
        eventually(lambda: server_pid(tmp_path) != killed)
    assert (directory / "server.log").read_text().startswith(before[:1000])
    noted = (directory / "supervisor.log").read_text()
    assert f"started as process {killed}" in noted
    assert "it has ended with exit status -9" in noted


def test_a_log_that_is_long_is_cut_and_its_lines_are_kept_beside_it(tmp_path: Path) -> None:
    log = tmp_path / "server.log"
    with open(log, "a") as writer:
        writer.write("old\n" * 3_000_000)
        writer.flush()
        keep_short(log)
        writer.write("new\n")
    assert log.read_text() == "new\n"
    assert (tmp_path / "server.log.1").stat().st_size == 12_000_000
    keep_short(log)
    assert log.read_text() == "new\n"


def test_a_kept_server_that_cannot_start_is_told_and_tried_again_until_it_can(tmp_path: Path) -> None:
    directory, mended, lives = tmp_path / "broken", tmp_path / "mended", tmp_path / "lives"
    (program := tmp_path / "program").write_text(f"#!/bin/sh\ntest -e {mended} && touch {lives} && exec sleep 600\n")
    program.chmod(0o755)
    with supervisor.using(directory, lambda: supervisor.Server([str(program)], {}, {})):
        supervisor.keep(directory)
        with pytest.raises(LocalServiceError, match="does not start"):
            supervisor.wait_until(lambda: False, directory, timeout=60)
        mended.touch()
        eventually(lives.exists)
    assert supervisor.release(directory)


def test_a_server_that_runs_and_is_silent_is_waited_for_aloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_STALLED_SECONDS", 0.1)
    directory = tmp_path / "silent"
    server = supervisor.Server(["sleep", "600"], {}, {})
    with (
        shown_by(told := Told()),
        supervisor.using(directory, lambda: server),
        pytest.raises(LocalServiceError, match=r"the local silent server does not answer\. The end of"),
    ):
        supervisor.wait_until(lambda: False, directory, timeout=1)
    assert told.warnings == [f"the local silent server is waited for; its log is {directory / 'server.log'}"]
