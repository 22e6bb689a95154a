"""Another user of the machine tries everything that `up` and a training of two ranks have opened."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from nightshift.local.prefect import login_file
from nightshift.local.s3 import embedded_credentials
from tests.conftest import eventually
from tests.deployments.server.conftest import CONFIG, Prefect, Training
from tests.forked import forked
from tests.sockets import GRPC_PREFACE, listening, tree, unix_sockets

NOBODY = 65_534
REQUESTS = {
    f"{verb} {path}": f"{verb} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
    f"Content-Type: application/json\r\nConnection: close\r\n\r\n{body}".encode()
    for verb, path, body in (
        ("GET", "/api/admin/settings", ""),
        ("POST", "/api/deployments/filter", "{}"),
        (
            "POST",
            "/api/flow_runs/",
            '{"flow_id": "5a3c3c9e-5f0a-4d0c-8f53-0d6e6b1f9d11", "state": {"type": "RUNNING"}}',
        ),
        ("GET", "/nightshift?list-type=2", ""),
        ("GET", "/buckets/nightshift/", ""),
        ("PUT", "/nightshift/key", "theirs"),
        ("DELETE", "/nightshift/key", ""),
        ("GET", "/dir/assign", ""),
        ("GET", "/status", ""),
        ("GET", "/metrics", ""),
    )
}
REQUESTS["gRPC"] = GRPC_PREFACE
REQUESTS["a pickle"] = b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR."
REFUSALS = tuple(f"HTTP/1.{minor} {code} ".encode() for minor in (0, 1) for code in (400, 401, 403, 404, 405))
TLS_ALERT = b"\x15\x03"
"""What a port that asks for a certificate says to whoever speaks something else."""


@pytest.fixture
def two_ranks(train: Callable[..., Training], ask: Callable[..., Any], prefect: Prefect) -> Iterator[Training]:
    """A run of two ranks in the middle of its training."""
    training = train("neighboured", overrides={**CONFIG, "nproc_per_node": 2, "epochs": 300})
    yield training
    assert prefect("flow-run", "cancel", training.flow_run_id).returncode == 0
    eventually(training.has_ended)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
@pytest.mark.soak
def test_a_neighbour_on_the_machine_gets_nothing_but_refusals(two_ranks: Training, laptop: Path) -> None:
    pids = sorted(processes_of(laptop))
    assert two_ranks.pid in pids
    ports = {port: address for pid in pids for port, address in listening(pid).items()}
    assert set(ports.values()) == {"0100007F"}, "somebody listens elsewhere than at 127.0.0.1"
    sockets = sorted({str(path) for pid in pids for path in unix_sockets(pid)})
    found = as_nobody(look_around, sorted(ports), pids, sockets, str(laptop))
    assert found["ports"], "nothing was tried"
    assert {what: answer for what, answer in found["ports"].items() if not says_nothing(answer)} == {}
    assert found["others"] == []
    secrets = (login_file(laptop).read_text(), embedded_credentials(laptop / "s3").secret_key)
    assert [line for line in found["command lines"] if any(secret in line for secret in secrets)] == []


def says_nothing(answer: bytes) -> bool:
    """A refusal, no answer at all, or what is the same for everybody: an empty page, or that of Prefect's UI."""
    head = answer.partition(b"\r\n\r\n")[0].lower()
    is_public = head.startswith(b"http/1.1 200") and (b"content-length: 0" in head or b"text/html" in head)
    return not answer or answer.startswith((*REFUSALS, TLS_ALERT)) or is_public


def look_around(ports: list[int], pids: list[int], sockets: list[str], home: str) -> dict[str, Any]:
    """What somebody who is nobody finds: each answer by port and request, what is open besides, and command lines."""
    answers = {(port, name): _answer(port, request) for port in ports for name, request in REQUESTS.items()}
    others = []
    for path in sockets:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as door:
            door.connect(path)
            others.append(path)
    for pid in pids:
        with suppress(OSError):
            others.append(Path(f"/proc/{pid}/environ").read_text())
    with suppress(OSError):
        others += map(str, Path(home).iterdir())
    lines = []
    for pid in pids:
        with suppress(OSError):  # it has ended
            lines.append(Path(f"/proc/{pid}/cmdline").read_text())
    return {"ports": answers, "others": others, "command lines": lines}


def _answer(port: int, request: bytes) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(request)
            return connection.recv(400)
    except OSError:
        return b""


def as_nobody(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What a function returns to a user who is nobody."""
    here, there = forked().Pipe(duplex=False)
    process = forked().Process(target=_become_nobody, args=(there, function, arguments))
    process.start()
    there.close()
    found: dict[str, Any] = here.recv()
    process.join()
    return found


def _become_nobody(answer: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    "".encode("idna")  # to connect; it would be loaded from where nobody may read
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    answer.send(function(*arguments))


def processes_of(home: Path) -> set[int]:
    """Every process that works for this NIGHTSHIFT_HOME, and all that it has started."""
    found: set[int] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            said = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if str(home).encode() in said and int(process.name) != os.getpid():
                found.update(tree(int(process.name)))
    return found
