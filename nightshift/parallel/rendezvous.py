"""Where the launchers of a run meet, and where its ranks leave word for each other.

At a rendezvous torch unpickles what it finds. So whoever can write there runs commands as this user.

- A run on one machine has no port for it. The launcher meets itself, in memory. Its ranks share a file in a folder that
  nobody else may enter.
- Several machines meet at a port. They share a secret, which signs all that is unpickled there, the job and the ending.
  It signs neither what torch itself leaves there for gloo and NCCL, nor what those send.
"""

import hmac
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from pydantic import SecretStr
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed
from torch.distributed import FileStore, HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
    RendezvousStateError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from nightshift import progress
from nightshift.errors import RankLostError, SettingsError
from nightshift.settings import NodesSettings

_NAME = "nightshift"
_UNTIL_THE_END = timedelta(days=1)
"""How long a rank waits on the board for the ending of the run."""


class SignedStore:
    """The values in a store that were signed with a secret, and nothing else that lies there.

    A signature covers the key too. So no value can be moved to another key.
    """

    def __init__(self, store: Store, secret: SecretStr, prefix: str = "") -> None:
        """`prefix` is put before every key."""
        self._store, self._secret, self._prefix = store, secret.get_secret_value().encode(), prefix

    def get(self, key: str) -> bytes:
        """Wait for a value, and return it.

        Raises:
            RendezvousStateError: the value was signed with another secret, or not at all.
        """
        return self._verified(key, self._store.get(self._prefix + key))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Set a value if the present one is `expected`, or if there is none and `expected` is empty.

        Returns:
            The value afterwards.

        Raises:
            RendezvousStateError: the present value was signed with another secret, or not at all.
        """
        before = self._signed(key, expected.encode()) if expected else b""
        now = self._store.compare_set(self._prefix + key, before, self._signed(key, desired.encode()))  # type: ignore[arg-type]
        return self._verified(key, now)

    def check(self, keys: list[str]) -> bool:
        """Whether all have a value, signed or not."""
        return self._store.check([self._prefix + key for key in keys])

    def _signature(self, key: str, value: bytes) -> bytes:
        return hmac.digest(self._secret, f"{self._prefix}{key}\0".encode() + value, "sha256").hex().encode()

    def _signed(self, key: str, value: bytes) -> bytes:
        return self._signature(key, value) + value

    def _verified(self, key: str, found: bytes) -> bytes:
        value = found[64:]
        if not hmac.compare_digest(found[:64], self._signature(key, value)):
            raise RendezvousStateError(
                "what lies there is not signed with the NIGHTSHIFT_NODES__SECRET of this machine. Set the same one on "
                "all machines, and let no others reach that port"
            )
        return value


@dataclass(frozen=True)
class OnThisMachine:
    """A folder for the ranks of a run on one machine. Only this user may enter it."""

    folder: Path

    def store(self, start: str, timeout: timedelta) -> Store:
        """What torch needs to connect the ranks that are started together.

        Each start has a file of its own: a rank that is killed while it writes leaves half an entry, on which all who
        read the file would hang.
        """
        store = FileStore(str(self.folder / start))
        store.set_timeout(timeout)
        return store

    def board(self, start: str) -> Store:
        """Where the ranks that are started together leave the job and the ending."""
        return self.store(start, _UNTIL_THE_END)


@dataclass(frozen=True)
class AtTheHost:
    """The port of the machine that runs the flow, for ranks on several machines. Methods as above."""

    host: str
    port: int
    secret: SecretStr

    def store(self, start: str, timeout: timedelta) -> Store:
        return PrefixStore(start, TCPStore(self.host, self.port, is_master=False, timeout=timeout))

    def board(self, start: str) -> SignedStore:
        store = TCPStore(self.host, self.port, is_master=False, timeout=_UNTIL_THE_END)
        return SignedStore(store, self.secret, f"{start}/")


Place = OnThisMachine | AtTheHost
Board = Store | SignedStore


@contextmanager
def rendezvous(nodes: NodesSettings, is_host: bool) -> Iterator[tuple[RendezvousHandler, Place]]:
    """The rendezvous at which the launchers meet, and the place for their ranks.

    Args:
        is_host: whether this machine runs the flow, at which the others meet it.

    Raises:
        RankLostError: nobody is there, too few machines come in time, or they have another secret.
        SettingsError: the host's name cannot be resolved here.
    """
    with _alone() if nodes.alone else _with_others(nodes, is_host) as (store, backend, address, place):
        meeting = RendezvousParameters(
            backend.name,
            nodes.rendezvous or "",
            _NAME,
            nodes.fewest,
            nodes.most,
            local_addr=address,
            join_timeout=nodes.wait_seconds,
            last_call_timeout=5,
        )
        handler = create_handler(store, backend, meeting)
        yield handler, place
        handler.shutdown()


_Parts = tuple[Store, C10dRendezvousBackend, str, Place]
"""What a rendezvous is made of: its store, what torch unpickles from it, this machine's address, the ranks' place."""


@contextmanager
def _alone() -> Iterator[_Parts]:
    with tempfile.TemporaryDirectory(prefix="nightshift-ranks-") as folder:  # with mode 0700
        store = HashStore()
        yield store, C10dRendezvousBackend(store, _NAME), "localhost", OnThisMachine(Path(folder))


@contextmanager
def _with_others(nodes: NodesSettings, is_host: bool) -> Iterator[_Parts]:
    assert nodes.rendezvous
    assert nodes.secret
    host, _, port = nodes.rendezvous.rpartition(":")
    address = _address_towards(host)
    try:
        if not is_host:
            _wait_for_host(host, int(port), nodes.wait_seconds)
        store = _tcp_store(host, int(port), address if is_host else None, timedelta(seconds=nodes.wait_seconds))
        backend = C10dRendezvousBackend(SignedStore(store, nodes.secret), _NAME)  # type: ignore[arg-type]
        yield store, backend, address, AtTheHost(host, int(port), nodes.secret)
    except (RendezvousError, dist.DistError, ConnectionError, TimeoutError) as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise RankLostError(f"the machines do not meet at {nodes.rendezvous}: {why}") from error


def _tcp_store(host: str, port: int, listens_at: str | None, patience: timedelta) -> TCPStore:
    """The store of the rendezvous; with `listens_at`, an address of this machine, others find it here.

    By itself torch would listen on all networks of the machine.
    """
    if not listens_at:
        return TCPStore(host, port, is_master=False, timeout=patience)
    try:
        listener = socket.create_server((listens_at, port))
    except OSError as error:
        raise ConnectionError(f"cannot listen at {listens_at}:{port}: {error.strerror}") from error
    return TCPStore(
        host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=patience,
        master_listen_fd=listener.detach(),
    )


def _wait_for_host(host: str, port: int, seconds: float) -> None:
    """Wait until somebody listens there. A signal would not interrupt torch's own waiting."""
    progress.current().say(f"waiting for the run at {host}:{port}")
    for attempt in Retrying(
        retry=retry_if_exception_type(OSError), stop=stop_after_delay(seconds), wait=wait_fixed(1), reraise=True
    ):
        with attempt:
            socket.create_connection((host, port), timeout=10).close()


def _address_towards(host: str) -> str:
    """This machine's address on the network of `host`. No packet is sent.

    Raises:
        SettingsError: `host` cannot be resolved here.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError as error:
            raise SettingsError(
                f"NIGHTSHIFT_NODES__RENDEZVOUS: {host!r} cannot be reached from here: {error}"
            ) from error
        return str(probe.getsockname()[0])
