"""Nobody but the machines of a run can make them run a command, or speak for a rank."""

import base64
import os
import pickle
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousStateError
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler

from nightshift.errors import RankLostError, TrainingInterrupted
from nightshift.parallel.rendezvous import SignedStore, rendezvous
from nightshift.refs import DatasetRef
from nightshift.settings import NodesSettings
from nightshift.workspace import Workspace
from tests.conftest import eventually
from tests.parallel.test_launch import TWO, At, train
from tests.sockets import listening, tree

KEY = "torch.rendezvous.nightshift"
PARAMETERS = RendezvousParameters("c10d", "", "nightshift", 2, 2)


class Command:
    """What makes a folder when it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)

    def __bytes__(self) -> bytes:
        """The state of a rendezvous, as torch would write it."""
        return base64.b64encode(pickle.dumps(self))


def send(port: int, value: bytes) -> None:
    """As a stranger on this machine: leave a value where torch looks for the rendezvous, if that is at `port`.

    In the words of TCPStore, whose client would wait for an answer where there is none.
    """
    hello, put = struct.pack("<BI", 0, 0x3C85F7CE), b"\1"
    texts = b"".join(struct.pack("<Q", len(text)) + text for text in (f"/{KEY}".encode(), value))
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(hello + put + texts)


def all_ports() -> dict[int, dict[int, str]]:
    """Those of this process, which is the launcher, and of each below it that has any; addresses as in `listening`."""
    return {pid: ports for pid in tree(os.getpid()) if (ports := listening(pid))}


def interrupted_at_step_5(
    workspace: Workspace, cifar10: DatasetRef, action: Callable[[dict[int, dict[int, str]]], object]
) -> None:
    """Train with two ranks, hand the ports that are new to `action`, then stop: until then nothing has stopped them."""
    before = all_ports()

    def act_and_stop() -> None:
        action({pid: ports for pid, ports in all_ports().items() if before.get(pid) != ports})
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted, match="which is saved"):
        train(workspace, cifar10, "run", TWO.override({"epochs": 1000}), At(5, act_and_stop))


def test_two_ranks_on_one_machine_listen_to_each_other_on_loopback_and_their_launcher_to_nobody(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    seen: dict[int, dict[int, str]] = {}
    interrupted_at_step_5(workspace, cifar10, seen.update)
    # gloo's, one for each group: that of torch, and that in which the ranks agree
    assert os.getpid() not in seen
    assert [list(ports.values()) for ports in seen.values()] == 2 * [["0100007F", "0100007F"]]


def test_on_one_machine_no_port_takes_a_command(workspace: Workspace, cifar10: DatasetRef, tmp_path: Path) -> None:
    def attack(found: dict[int, dict[int, str]]) -> None:
        for ports in found.values():
            for port in ports:
                send(port, bytes(Command(tmp_path / "made")))

    interrupted_at_step_5(workspace, cifar10, attack)
    assert not (tmp_path / "made").exists()


@pytest.fixture
def nodes() -> NodesSettings:
    """Two machines, of which this one can be either."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    return NodesSettings(count="2", rendezvous=address, secret=SecretStr("5" * 32), wait_seconds=5)


def port_of(nodes: NodesSettings) -> int:
    return int(str(nodes.rendezvous).rpartition(":")[2])


def test_the_host_of_several_machines_listens_on_their_network_only(nodes: NodesSettings) -> None:
    with rendezvous(nodes, is_host=True):
        assert listening(os.getpid())[port_of(nodes)] == "0100007F"


def test_a_command_that_a_stranger_leaves_at_the_rendezvous_is_refused_before_it_is_unpickled(
    nodes: NodesSettings, tmp_path: Path
) -> None:
    def host() -> None:
        with rendezvous(nodes, is_host=True) as (handler, _):
            send(port_of(nodes), bytes(Command(tmp_path / "made")))
            eventually(lambda: handler.num_nodes_waiting() > 0)

    with pytest.raises(RankLostError, match="not signed"):
        host()
    assert not (tmp_path / "made").exists()


def test_torch_alone_would_have_run_the_command(nodes: NodesSettings, tmp_path: Path) -> None:
    """So the tests above send what they say."""
    store = TCPStore("127.0.0.1", port_of(nodes), is_master=True, wait_for_workers=False)
    handler = create_handler(store, C10dRendezvousBackend(store, "nightshift"), PARAMETERS)
    send(port_of(nodes), bytes(Command(tmp_path / "made")))
    with pytest.raises(AttributeError):  # what is left instead of a state has no heartbeats
        eventually(lambda: handler.num_nodes_waiting() > 0)
    assert (tmp_path / "made").exists()


def test_a_machine_joins_no_rendezvous_of_a_stranger(nodes: NodesSettings, tmp_path: Path) -> None:
    strangers = TCPStore("127.0.0.1", port_of(nodes), is_master=True, wait_for_workers=False)
    strangers.set(KEY, bytes(Command(tmp_path / "made")).decode())
    with (
        pytest.raises(RankLostError, match="not signed with the NIGHTSHIFT_NODES__SECRET of this machine"),
        rendezvous(nodes, is_host=False),
    ):
        pass
    assert not (tmp_path / "made").exists()


def test_a_signed_value_counts_under_its_own_key_only() -> None:
    store = HashStore()
    ours, others = (SignedStore(store, SecretStr(secret)) for secret in ("ours", "another"))
    assert ours.compare_set("key", "", "first") == b"first"
    assert ours.compare_set("key", "", "second") == b"first"
    assert ours.compare_set("key", "first", "second") == ours.get("key") == b"second"
    store.set("copy", store.get("key"))  # type: ignore[arg-type]
    store.set("short", "second")
    for reader, key in ((others, "key"), (ours, "copy"), (ours, "short")):
        with pytest.raises(RendezvousStateError, match="not signed"):
            reader.get(key)
