"""Another user of the machine, who has neither our key pair nor our certificate, gets nothing from the embedded S3."""

import dataclasses
import json
import os
import socket
import ssl
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nightshift.errors import StorageDeniedError
from nightshift.local import s3, supervisor
from nightshift.local.s3 import embedded_credentials, embedded_s3
from nightshift.local.secrets import new_certificate
from nightshift.settings import S3Settings
from nightshift.storage.s3 import S3, Credentials
from tests.conftest import eventually
from tests.local.test_local_s3 import runs, server_pid, supervisor_pid
from tests.sockets import GRPC_PREFACE, listening, unix_sockets

Door = tuple[int, tuple[str, int] | str]
"""Where a process listens: a family of addresses and one of them."""

FILED = f"/buckets/{s3.BUCKET}/key"
"""How the filer calls the object `key`."""

STRANGER = Credentials("STRANGERSTRANGER", "stranger" * 5)
CONFIGURE = f"s3.configure -user stranger -access_key {STRANGER.access_key} -secret_key {STRANGER.secret_key}"


def inner_doors(home: Path, store: S3) -> list[Door]:
    """All that others can reach of the running server, except S3 itself."""
    pid = server_pid(home)
    ports = sorted(set(listening(pid)) - {int(store.endpoint.rpartition(":")[2])})
    doors: list[Door] = [(socket.AF_INET, ("127.0.0.1", port)) for port in ports]
    return [*doors, *((socket.AF_UNIX, str(path)) for path in unix_sockets(pid) if not path.is_relative_to(home))]


def ask(door: Door, message: bytes, tls: ssl.SSLContext | None) -> bytes:
    """The beginning of the answer; nothing if the server hangs up."""
    family, address = door
    try:
        with socket.socket(family) as plain:
            plain.settimeout(30)
            plain.connect(address)
            with tls.wrap_socket(plain) if tls else plain as connection:
                connection.sendall(message)
                return connection.recv(4096)
    except (ssl.SSLError, ConnectionError):
        return b""


def client(certificate: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate:
        context.load_cert_chain(certificate)
    return context


def place_of(body: bytes, volume: Path) -> str:
    """How the volume server calls the file with this body: the volume, and the file's number and cookie."""
    content = volume.read_bytes()
    cookie, number = struct.unpack_from(">IQ", content, content.index(body) - 20)
    return f"/{volume.stem.rpartition('_')[2]},{number:x}{cookie:08x}"


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, S3]]:
    """The home and the store of a server with one object: `key`, which holds b"treasure"."""
    home = tmp_path_factory.mktemp("strangers")
    with embedded_s3(home) as store:
        store.put("key", b"treasure")
        yield home, store


def test_no_inner_port_tells_or_takes_anything(one: tuple[Path, S3], tmp_path: Path) -> None:
    home, store = one
    (theirs := tmp_path / "theirs.pem").write_text(new_certificate())
    file = place_of(b"treasure", next((home / "s3" / "data").glob("nightshift_*.dat")))
    paths = ["/", "/status", "/healthz", "/metrics", "/ui/index.html", "/dir/assign", "/dir/status", "/vol/status"]
    paths += ["/vol/grow?count=1", "/col/delete?collection=nightshift", "/submit", "/cluster/status"]
    requests = [f"GET {path}" for path in paths]
    requests += [f"{verb} {path}" for verb in ("GET", "PUT", "POST", "DELETE") for path in (file, FILED)]
    messages = [f"{request} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n".encode() for request in requests]
    ways = {"in the clear": None, "TLS": client(), "TLS, a certificate of their own": client(theirs)}
    # An HTTP port of four parts, a gRPC port of these and S3, and a socket beside each of those; admin's come last.
    eventually(lambda: len(inner_doors(home, store)) == 14)
    doors = inner_doors(home, store)
    told = {
        (str(door[1]), way, message.partition(b"\r\n")[0]): answer
        for door in doors
        for way, tls in ways.items()
        for message in [*messages, GRPC_PREFACE]
        if (answer := ask(door, message, tls))
        and not answer.endswith(b"Client sent an HTTP request to an HTTPS server.\n")
    }
    assert told == {}
    assert store.get("key")[0] == b"treasure"


def test_the_certificate_opens_the_inner_ports(one: tuple[Path, S3]) -> None:
    home, _ = one
    ports = json.loads((home / "s3" / "ports.json").read_text())
    question = b"GET /cluster/status HTTP/1.1\r\nHost: x\r\n\r\n"
    door = (socket.AF_INET, ("127.0.0.1", ports["master"]))
    assert ask(door, question, client(home / "s3" / "server.pem")).startswith(b"HTTP/1.1 200")


def shell(home: Path, commands: str, here: Path) -> str:
    """What weed's own shell prints. It takes certificates from the directory it runs in, and waits if it is refused."""
    ports = json.loads((home / "s3" / "ports.json").read_text())
    where = [f"-{part}=127.0.0.1:{ports[part]}" for part in ("master", "filer")]
    command = [s3._weed(), "-logtostderr=true", "shell", *where]
    environment = {**os.environ, "HOME": str(here)}
    with subprocess.Popen(command, cwd=here, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            return process.communicate(commands.encode(), timeout=5)[0].decode()
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0].decode()


def test_nobody_makes_himself_an_administrator(one: tuple[Path, S3], tmp_path: Path) -> None:
    home, store = one
    listing = "fs.ls /buckets/nightshift\n"
    assert shell(home, f"{CONFIGURE} -actions Admin -apply\n{listing}", tmp_path) == ""
    assert "key" in shell(home, listing, home / "s3")
    settings = S3Settings(endpoint_url=store.endpoint, bucket=store.bucket)
    for credentials in (STRANGER, dataclasses.replace(embedded_credentials(home / "s3"), secret_key="guessed")):
        with pytest.raises(StorageDeniedError):
            S3(settings, credentials).get("key")


def test_all_it_opens_lies_where_nobody_else_can_look(one: tuple[Path, S3]) -> None:
    home, _ = one
    directory, pid = home / "s3", server_pid(home)
    assert directory.stat().st_mode & 0o777 == 0o700
    names = {fd.readlink() for fd in Path(f"/proc/{pid}/fd").iterdir()}
    files = {name for name in names if name.is_absolute() and name.parts[1] not in ("dev", "sys", "proc")}
    assert files
    assert {name for name in files if not name.is_relative_to(directory)} == set()
    outside = [path for path in unix_sockets(pid) if not path.is_relative_to(directory)]
    assert {path.stat().st_mode & 0o077 for path in outside} == {0}
    for secret in ("credentials.json", "server.pem"):
        assert (directory / secret).stat().st_mode & 0o777 == 0o600


def test_a_server_that_stops_leaves_nothing_in_tmp(tmp_path: Path) -> None:
    with embedded_s3(tmp_path):
        pid = server_pid(tmp_path)
        eventually(lambda: len(unix_sockets(pid)) == 7)
        sockets = unix_sockets(pid)
        supervisor.keep(tmp_path / "s3")
    supervisor.release(tmp_path / "s3")
    assert not runs(pid)
    assert [path for path in sockets if path.exists() and not path.is_relative_to(tmp_path)] == []
    assert list(Path("/tmp").glob(f"weed.*.{pid}")) == []


def unprotected(directory: Path) -> supervisor.Server:
    """The server as it was started before it asked for certificates."""
    server = s3._plan(directory, embedded_credentials(directory))
    for name in ("security.toml", "server.pem"):
        (directory / name).unlink()
    command = [word for word in server.command if not word.startswith(("-log", "-disableHttp", "-s3.iam"))]
    return dataclasses.replace(server, command=command, umask=-1, litter=())


def test_a_server_of_yesterday_is_replaced_for_all_who_use_it_and_its_store_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "s3"
    with supervisor.using(directory, lambda: unprotected(directory)) as facts:
        supervisor.keep(directory)
        user = S3(S3Settings(endpoint_url=facts["endpoint_url"], bucket=s3.BUCKET), embedded_credentials(directory))
        eventually(lambda: s3._answers(user, directory))
        user.put("small", b"body")
        user.put("large", large := os.urandom(9_000_000))
        old = supervisor_pid(tmp_path), server_pid(tmp_path)
        with embedded_s3(tmp_path) as store:
            assert not any(map(runs, old))
            assert store.get("small")[0] == b"body"
            assert store.get("large")[0] == large
            store.put("new", b"body")
            assert user.get("new")[0] == b"body"
            assert ask(inner_doors(tmp_path, store)[0], GRPC_PREFACE, client()) == b""
            new = server_pid(tmp_path)
        with embedded_s3(tmp_path):
            assert server_pid(tmp_path) == new
    assert supervisor.release(directory), "it is kept as before"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user's")
def test_a_place_that_another_user_has_taken_is_not_waited_for(tmp_path: Path) -> None:
    (directory := tmp_path / "s3").mkdir()
    ports = s3._ports(directory)
    taken = s3._grpc_socket("master", ports["master"])
    with socket.socket(socket.AF_UNIX) as theirs:
        theirs.bind(str(taken))
        try:
            os.chown(taken, 65534, 65534)
            assert s3._ports(directory)["master"] != ports["master"]
        finally:
            taken.unlink()
