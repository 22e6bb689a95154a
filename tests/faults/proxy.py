"""An S3 server with faults: a proxy on loopback that a test tells what to do with which request.

Requests pass unchanged, host header and signature included, until one matches a fault that was planned.
"""

import http.client
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.process import BaseProcess
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal[
    "record get",
    "record put",
    "payload get",
    "payload put",
    "payload delete",
    "multipart begin",
    "part put",
    "multipart end",
    "list",
    "other",
]
KINDS: tuple[Kind, ...] = Kind.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Request:
    """What a client asked for, as its bytes came in."""

    kind: Kind
    method: str
    target: str
    headers: Message
    body: bytes


@dataclass
class Answer:
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


class Reset(Exception):
    """Close the connection with RST instead of an answer."""


Forward = Callable[[Request], Answer]
Fault = Callable[[Request, Forward], Answer]


def refuse(status: int, code: str) -> Fault:
    """Answer with an error and never tell the server."""
    body = f"<Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    return lambda request, forward: Answer(status, code, [("Content-Type", "application/xml")], body)


def reset_before(request: Request, forward: Forward) -> Answer:
    """The connection breaks before the server has the request."""
    raise Reset


def lose_response(request: Request, forward: Forward) -> Answer:
    """The server does what it was asked to, and the connection breaks before it can say so."""
    forward(request)
    raise Reset


def truncate(request: Request, forward: Forward) -> Answer:
    """The connection breaks in the middle of the body: of the request if it has one, else of the answer."""
    if request.body:
        return forward(_with_body(request, request.body[: len(request.body) // 2]))
    answer = forward(request)
    return Answer(answer.status, answer.reason, answer.headers, answer.body[: len(answer.body) // 2])


def flip_bit(request: Request, forward: Forward) -> Answer:
    """One bit changes on the way: of the request's body if it has one, else of the answer's."""
    if request.body:
        return forward(_with_body(request, _flipped(request.body)))
    answer = forward(request)
    return Answer(answer.status, answer.reason, answer.headers, _flipped(answer.body))


def hold_until(released: threading.Event, timeout: float = 60) -> Fault:
    """Let the request wait: a slow server, or if nobody releases it in time one that hangs and then breaks off."""

    def fault(request: Request, forward: Forward) -> Answer:
        if released.wait(timeout):
            return forward(request)
        raise Reset

    return fault


def delay(request: Request, forward: Forward) -> Answer:
    """Answer later than a healthy server would, but in time."""
    threading.Event().wait(0.5)
    return forward(request)


def hang(request: Request, forward: Forward) -> Answer:
    """Say nothing until the client has given up."""
    return hold_until(threading.Event(), timeout=10)(request, forward)


def kill(process: BaseProcess, when: Literal["before", "after"]) -> Fault:
    """SIGKILL a process before the server has its request, or after the server has done it."""

    def fault(request: Request, forward: Forward) -> Answer:
        if when == "after":
            forward(request)
        process.kill()
        raise Reset

    return fault


@dataclass
class _Plan:
    kind: Kind
    fault: Fault
    skip: int
    times: int
    done: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """A running proxy. `requests` counts what came in, by kind."""

    def __init__(self, upstream: str) -> None:
        self.host, self.port = urlsplit(upstream).hostname or "", urlsplit(upstream).port or 80
        self.requests: dict[Kind, int] = dict.fromkeys(KINDS, 0)
        self._plans: list[_Plan] = []
        self._lock = threading.Lock()
        self.endpoint_url = ""

    def plan(self, kind: Kind, fault: Fault, *, skip: int = 0, times: int = 1) -> threading.Event:
        """Let `fault` happen to the next `times` requests of a kind, after `skip` of them; set when all did."""
        plan = _Plan(kind, fault, skip, times)
        with self._lock:
            self._plans.append(plan)
        return plan.done

    def answer(self, request: Request) -> Answer:
        return self._take(request.kind)(request, self.forward)

    def _take(self, kind: Kind) -> Fault:
        with self._lock:
            self.requests[kind] += 1
            for plan in self._plans:
                if plan.kind != kind or plan.done.is_set():
                    continue
                if plan.skip:
                    plan.skip -= 1
                    break
                plan.times -= 1
                if not plan.times:
                    plan.done.set()
                return plan.fault
        return lambda request, forward: forward(request)

    def forward(self, request: Request) -> Answer:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=120)
        try:
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in ("expect", "connection"):
                    connection.putheader(name, value)
            connection.endheaders(request.body or None)
            response = connection.getresponse()
            return Answer(response.status, response.reason, response.getheaders(), response.read())
        finally:
            connection.close()


@contextmanager
def running(upstream: str, address: str = "127.0.0.1") -> Iterator[Proxy]:
    """A proxy in front of the server at `upstream`, at an address of this machine."""
    proxy = Proxy(upstream)

    class Handler(_Handler):
        pass

    Handler.proxy = proxy
    server = ThreadingHTTPServer((address, 0), Handler)
    server.daemon_threads = True
    proxy.endpoint_url = f"http://{address}:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: Proxy

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client that was killed
            super().handle()

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(_kind(self.command, self.path), self.command, self.path, self.headers, body)
        try:
            answer = self.proxy.answer(request)
            self._send(answer)
        except (Reset, OSError, http.client.HTTPException):
            self._reset()

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle  # noqa: N815

    def _send(self, answer: Answer) -> None:
        self.send_response_only(answer.status, answer.reason)
        length = len(answer.body)
        for name, value in answer.headers:
            if name.lower() == "content-length":
                length = int(value)  # the server's own: more than a truncated body has, and right for HEAD
            elif name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)
            if len(answer.body) < length:
                raise Reset

    def _reset(self) -> None:
        # Lingering for zero seconds makes close() send RST.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


def _kind(method: str, target: str) -> Kind:
    parts = urlsplit(target)
    if method == "GET" and "list-type=" in parts.query:
        return "list"
    if "/runs/" in parts.path:
        return "record put" if method == "PUT" else "record get"
    if "/checkpoints/" not in parts.path:
        return "other"
    if method == "POST":
        return "multipart begin" if "uploads" in parts.query.split("&") else "multipart end"
    if method == "PUT":
        return "part put" if "partNumber=" in parts.query else "payload put"
    return "payload delete" if method == "DELETE" else "payload get"


def _with_body(request: Request, body: bytes) -> Request:
    headers = Message()
    for name, value in request.headers.items():
        headers[name] = str(len(body)) if name.lower() == "content-length" else value
    return Request(request.kind, request.method, request.target, headers, body)


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body
