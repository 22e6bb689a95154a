"""Two machines: network namespaces with a cable between them that can be cut, and the commands a user types."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from nightshift.checkpoints.payload import read_weights, weights_sha256
from nightshift.local.s3 import embedded_s3
from nightshift.parallel.launch import train_run
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace
from tests.conftest import PATIENCE_SECONDS, eventually, small_config
from tests.faults.proxy import running
from tests.forked import ranks_are_forked

CUT_SECONDS = float(os.environ.get("CUT_SECONDS", "5"))
CONFIG = small_config(epochs=30, checkpoint_every_steps=10, nproc_per_node=1)
SETTINGS = ("epochs", "max_train_images", "batch_size", "checkpoint_every_steps")
RENDEZVOUS = "10.177.0.2:29400"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def may_make_networks() -> bool:
    if os.geteuid() or not shutil.which("ip"):
        return False
    probe = f"ns-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode == 0
    if made:
        ip("netns", "del", probe)
    return made


pytestmark = [
    pytest.mark.soak,  # each takes two minutes, for many processes start
    pytest.mark.skipif(not may_make_networks(), reason="needs root and `ip netns`"),
]


@dataclass
class Machine:
    """A namespace with a network card and a disk of its own."""

    name: str
    number: int
    home: Path
    environment: dict[str, str]
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        program = str(Path(sys.executable).with_name("nightshift"))
        own = {"NIGHTSHIFT_HOME": str(self.home), "GLOO_SOCKET_IFNAME": "eth0"}
        with (self.home / "out.log").open("w") as out, (self.home / "err.log").open("a") as err:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, program, *arguments],
                env={**os.environ, **self.environment, **own},
                cwd=self.home,
                stdout=out,
                stderr=err,
                text=True,
            )
        self.processes.append(process)
        return process

    def finish(self) -> str:
        """Wait for what was started last to succeed, and return what it has printed."""
        assert self.processes[-1].wait(timeout=600) == 0, self.told
        return (self.home / "out.log").read_text()

    @property
    def told(self) -> str:
        """What all its commands have printed for people."""
        return (self.home / "err.log").read_text()

    def lose_power(self) -> None:
        """All its processes are gone at once."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        for pid in listed.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait()

    def cable(self, what: str) -> None:
        ip("link", "set", f"{self.name}-port", what)


@pytest.fixture
def machines(
    server: S3, prefix: str, home: Path, cifar10: DatasetRef, tmp_path: Path
) -> Iterator[tuple[Machine, Machine]]:
    """Two machines and a switch, at which the store can be reached."""
    made: list[Machine] = []
    ip("link", "add", "ns-switch", "type", "bridge")
    try:
        ip("addr", "add", "10.177.0.1/24", "dev", "ns-switch")
        ip("link", "set", "ns-switch", "up")
        credentials = json.loads((home / "s3" / "credentials.json").read_text())
        with running(server.endpoint, "10.177.0.1") as proxy:
            environment = {
                "NIGHTSHIFT_S3__ENDPOINT_URL": proxy.endpoint_url,
                "NIGHTSHIFT_S3__BUCKET": server.bucket,
                "NIGHTSHIFT_S3__PREFIX": prefix,
                "AWS_ACCESS_KEY_ID": credentials["access_key"],
                "AWS_SECRET_ACCESS_KEY": credentials["secret_key"],
                "NIGHTSHIFT_NODES__COUNT": "2",
                "NIGHTSHIFT_NODES__RENDEZVOUS": RENDEZVOUS,
                "NIGHTSHIFT_NODES__SECRET": "5" * 32,
            }
            for number in (2, 3):
                name, own = f"ns-{number}", tmp_path / f"machine-{number}"
                shutil.copytree(home / "datasets", own / "datasets")
                ip("netns", "add", name)
                made.append(Machine(name, number, own, environment))
                ip("link", "add", f"{name}-port", "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", f"{name}-port", "master", "ns-switch", "up")
                for command in (
                    ("addr", "add", f"10.177.0.{number}/24", "dev", "eth0"),
                    ("link", "set", "eth0", "up"),
                    ("link", "set", "lo", "up"),
                ):
                    ip("-n", name, *command)
            yield made[0], made[1]
    finally:
        for machine in made:
            machine.lose_power()
            ip("netns", "del", machine.name)
        ip("link", "del", "ns-switch")


@pytest.fixture(scope="module")
def bits(home: Path, server: S3, cifar10: DatasetRef) -> str:
    """weights_sha256 of the same run on one machine with two ranks."""
    with embedded_s3(home, "one-machine") as store, ranks_are_forked():
        last = train_run(Workspace(store, home, 60, 5), "run", CONFIG.override({"nproc_per_node": 2}), cifar10)
        return weights_sha256(read_weights(store, last))


def begin(flow: Machine, other: Machine, workspace: Workspace) -> None:
    """Start a run on both, and wait until it has checkpoints."""
    settings = [part for name in SETTINGS for part in ("--set", f"{name}={CONFIG.value_of(name)}")]
    other.start("join")
    trained = flow.start("train", "--recipe", "tutorial", "--run-id", "run", "--json", *settings)
    eventually(lambda: has_checkpoints(workspace) or trained.poll() is not None)
    assert trained.poll() is None, flow.told


def has_checkpoints(workspace: Workspace) -> bool:
    return bool(list(workspace.store.list("runs/"))) and bool(read_record(workspace.store, "run")[0].checkpoints)


def tokens(workspace: Workspace) -> list[int]:
    """Under which fencing token each checkpoint was written."""
    keys = [checkpoint.key for checkpoint in read_record(workspace.store, "run")[0].checkpoints]
    return [int(key.removesuffix(".pt").rpartition("-")[2]) for key in keys]


def test_a_machine_that_is_lost_and_comes_back_costs_no_bit(
    machines: tuple[Machine, Machine], workspace: Workspace, bits: str
) -> None:
    flow, other = machines
    begin(flow, other, workspace)
    other.lose_power()
    other.start("join")
    done = json.loads(flow.finish())
    assert done["weights_sha256"] == bits
    assert done["resumed_from_step"]
    assert "run run: trained" in other.finish()


def test_a_cut_cable_is_waited_for_and_there_is_one_leader_all_the_time(
    machines: tuple[Machine, Machine], workspace: Workspace, bits: str
) -> None:
    flow, other = machines
    begin(flow, other, workspace)
    for machine in machines:
        machine.cable("down")
        threading.Event().wait(CUT_SECONDS)
        machine.cable("up")
        eventually(partial(has_passed, workspace, newest_step(workspace)))
    assert json.loads(flow.finish())["weights_sha256"] == bits
    assert "run run: trained" in other.finish()
    assert tokens(workspace) == sorted(tokens(workspace))


def test_a_machine_that_has_lost_the_other_stops_when_it_is_told_to(
    machines: tuple[Machine, Machine], workspace: Workspace, bits: str
) -> None:
    flow, other = machines
    begin(flow, other, workspace)
    other.lose_power()
    eventually(lambda: "failed" in flow.told)
    flow.processes[-1].terminate()
    assert flow.processes[-1].wait(timeout=PATIENCE_SECONDS) == 3, flow.told
    other.start("join")
    flow.start("resume", "run", "--json")
    assert json.loads(flow.finish())["weights_sha256"] == bits


def newest_step(workspace: Workspace) -> int:
    return read_record(workspace.store, "run")[0].step


def has_passed(workspace: Workspace, step: int) -> bool:
    return newest_step(workspace) > step
