"""Local servers that live as long as somebody uses them.

A server (the embedded S3, a Prefect server) is the child of a small supervisor process, which starts it
again if it dies and stops it when its last user is gone. The kernel knows who uses it: every user holds a
shared lock on one file, and the lock ends with its process, however that ends. A server that is kept stays
even without users, until it is released. Nobody else can enter its directory.

A server that dies again and again is started again all the same, after pauses of up to ten seconds: whatever it
misses, such as room on the disk, may come back.

    DIR/users.lock        held shared by each process that uses the server
    DIR/start.lock        held exclusively by a process that is starting it
    DIR/supervisor.lock   held exclusively by the supervisor, as long as it lives
    DIR/kept              exists while the server stays without users
    DIR/server.json       what a user needs to know to connect
    DIR/server.pid        which process the server is, as `processes.identity` names it
    DIR/failing           exists while the server dies as soon as it is started
    DIR/server.log        what the server prints; what is older is in server.log.1
    DIR/supervisor.log    when the server was started, and how it ended
"""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from nightshift import processes, progress
from nightshift.disk import Room, disk_is_full, explains_failure, room
from nightshift.errors import DISK_IS_FULL, DiskError, LocalServiceError
from nightshift.local.child import FAILING, Child
from nightshift.local.logs import SERVER_LOG, SUPERVISOR_LOG, keep_short, tail
from nightshift.local.secrets import close_to_others, written

LINGER_SECONDS = 10.0
_STOPPED_SECONDS, _STALLED_SECONDS = 1.5, 15.0
"""How long to wait before blaming a full disk: for a server that does not run, so cannot start; for one that does."""
_START_SECONDS = 180.0
"""How long a server that runs is waited for. A first start of Prefect's took 20 s on two busy cores."""


@dataclass(frozen=True)
class Server:
    """How to start a server: its command line, its environment besides ours, and the facts that its users need."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(repr=False)
    facts: Mapping[str, Any]
    stop_seconds: float = 10.0
    """How long it may take to end after a SIGTERM."""
    umask: int = -1
    """What others may not do with the files it makes; -1 leaves that to the user's own."""
    litter: Sequence[Path] = ()
    """What it leaves outside of its directory when it is killed."""
    mended_by_room: bool = True
    """Whether it goes on by itself when a full disk has room again; otherwise it is started again then."""


@contextmanager
def using(directory: Path, plan: Callable[[], Server], generation: int = 0) -> Iterator[Mapping[str, Any]]:
    """Use the server in `directory`, and start it if it is not running. Yields its facts without waiting for it.

    Args:
        plan: called only if a server has to be started.
        generation: a server of an older one is replaced, even if it is kept or used: whoever uses it sees it die and
            come back.

    Raises:
        LocalServiceError: the directory is not ours to close to others, or an older server not ours to kill.
        DiskError: it does not run, and there is no room to start it.
    """
    with _room_to_start(directory):
        close_to_others(directory)
        users = open(directory / "users.lock", "a")  # noqa: SIM115
    with users:
        fcntl.flock(users, fcntl.LOCK_SH)
        with _room_to_start(directory), _lock(directory / "start.lock", fcntl.LOCK_EX):
            if _supervised(directory) and _facts(directory).get("generation", 0) < generation:
                _kill_supervisor(directory)
            if not _supervised(directory):
                if room(directory) == Room.NONE:
                    raise DiskError(f"the local {directory.name} server cannot be started: {disk_is_full(directory)}")
                _kill_leftover(directory)  # before the plan, which looks for free ports
                _start(directory, plan(), generation)
            facts = _facts(directory)
        yield facts


@contextmanager
def _room_to_start(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        where = directory if directory.exists() else directory.parent
        raise DiskError(f"the local {directory.name} server cannot be started: {disk_is_full(where)}") from error


def keep(directory: Path) -> None:
    """Keep the server that we are using, even after its last user is gone."""
    (directory / "kept").touch()


def release(directory: Path) -> bool:
    """Undo `keep`, and wait until the server has stopped, unless somebody uses it. Returns whether it was kept.

    One that is in use goes on, as `running_facts` tells, and stops after its last user.
    """
    if not is_kept(directory):
        return False
    (directory / "kept").unlink()
    while _supervised(directory) and not _is_used(directory):
        time.sleep(0.05)
    return True


def is_kept(directory: Path) -> bool:
    """Whether the server stays without users."""
    return (directory / "kept").exists()


def running_facts(directory: Path) -> Mapping[str, Any]:
    """The facts of the server, if it runs; otherwise an empty mapping."""
    if not directory.exists() or not _supervised(directory):
        return {}
    return _facts(directory)


def wait_until(ready: Callable[[], bool], directory: Path, timeout: float = _START_SECONDS) -> None:
    """Wait until the server in `directory` answers, for `timeout` seconds at most.

    Raises:
        LocalServiceError: it does not answer. The message has the end of its log.
        DiskError: it does not, and the disk is full.
    """
    began, name = time.monotonic(), f"the local {directory.name} server"
    log = directory / SERVER_LOG
    # Asking a server that is silent takes long, so this is said meanwhile.
    still = threading.Timer(_STALLED_SECONDS, progress.current().warn, [f"{name} is waited for; its log is {log}"])
    still.daemon = True
    still.start()
    try:
        while not ready():
            waited, runs = time.monotonic() - began, _is_running(directory)
            if waited > (_STALLED_SECONDS if runs else _STOPPED_SECONDS) and explains_failure(directory):
                raise DiskError(f"{name} does not answer: {disk_is_full(directory)}")
            fails = (directory / FAILING).exists()
            if waited > timeout or not _supervised(directory) or fails:
                does_not = "does not answer" if runs and not fails else "does not start"
                raise LocalServiceError(f"{name} {does_not}. The end of {log}:\n{tail(log)}")
            time.sleep(0.05)
    finally:
        still.cancel()


def wait_until_started_anew(directory: Path, before: str, timeout: float) -> None:
    """Wait until the process of the server is another one than `before`, as its file `server.pid` names it.

    Args:
        timeout: for so many seconds at most; it is no error if they pass.
    """
    deadline = time.monotonic() + timeout
    while _supervised(directory) and time.monotonic() < deadline:
        if (directory / "server.pid").read_text() != before:
            return
        time.sleep(0.05)


def _facts(directory: Path) -> Mapping[str, Any]:
    facts: Mapping[str, Any] = json.loads((directory / "server.json").read_text())
    return facts


def _supervised(directory: Path) -> bool:
    """Whether a supervisor is alive, that is, whether its lock is held."""
    with open(directory / "supervisor.lock", "a") as file:
        return not _try_lock(file, fcntl.LOCK_SH)  # shared, so that two processes that ask do not see each other


def _is_running(directory: Path) -> bool:
    """Whether the server's process is alive, which its supervisor may be about to start."""
    pid_file = directory / "server.pid"
    return pid_file.exists() and processes.state_of(pid_file.read_text()) == "alive"


def _is_used(directory: Path) -> bool:
    """Whether shared locks are held on the users' file; an exclusive one is held by a supervisor that is stopping."""
    with open(directory / "users.lock", "a") as users:
        return not _try_lock(users, fcntl.LOCK_EX) and _try_lock(users, fcntl.LOCK_SH)


def _start(directory: Path, server: Server, generation: int) -> None:
    written(directory / "server.json", json.dumps({**server.facts, "generation": generation}))
    (directory / FAILING).unlink(missing_ok=True)
    # The lock is taken here and inherited, so that the supervisor never runs without it.
    with open(directory / "supervisor.lock", "a") as lock, open(directory / SUPERVISOR_LOG, "a") as log:
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(
            [
                *(sys.executable, "-m", "nightshift.local.supervisor"),
                *(str(directory), str(lock.fileno()), str(server.stop_seconds), str(int(server.mended_by_room))),
                *(json.dumps([str(path) for path in server.litter]), *server.command),
            ],
            env={**os.environ, **server.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[lock.fileno()],
            start_new_session=True,
            umask=server.umask,
            check=True,
        )


def _kill_supervisor(directory: Path) -> None:
    """Kill the supervisor, which is the parent of its server: those who use the server wait, and are soon served again.

    Raises:
        LocalServiceError: it is not ours to kill.
    """
    deadline = time.monotonic() + 30
    while _supervised(directory):
        if time.monotonic() > deadline:
            raise LocalServiceError(
                f"an older nightshift has started the server in {directory}, and it cannot be replaced from here: "
                "stop it where it was started, with `nightshift down`"
            )
        with suppress(OSError, IndexError):  # the server has just died, and is about to be started again
            name = (directory / "server.pid").read_text()
            stat = Path(f"/proc/{name.split()[2]}/stat").read_text()
            with _process(int(stat.rpartition(")")[2].split()[1])) as parent:
                # While both live, that is its parent. An orphan would have another.
                if processes.state_of(name) == "alive" and _supervised(directory):
                    _kill(parent)
        time.sleep(0.02)


def _kill_leftover(directory: Path) -> None:
    """Kill a server whose supervisor was killed: nobody would ever stop it, and it holds the data directory."""
    if _is_running(directory):
        with _process(int((directory / "server.pid").read_text().split()[2])) as server:
            _kill(server)


@contextmanager
def _process(pid: int) -> Iterator[int]:
    """A file descriptor that stays this process', even when another gets its number."""
    descriptor = os.pidfd_open(pid)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _kill(process: int) -> None:
    signal.pidfd_send_signal(process, signal.SIGKILL)
    select.select([process], [], [])


@contextmanager
def _lock(path: Path, kind: int) -> Iterator[None]:
    with open(path, "a") as file:
        fcntl.flock(file, kind)
        yield


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _supervise(
    directory: Path,
    own_lock: int,
    stop_seconds: float,
    mended_by_room: bool,
    litter: Sequence[str],
    command: Sequence[str],
) -> None:
    """Keep `command` running until it is released, or nobody has used it for LINGER_SECONDS."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    child, idle_since, was_kept = Child(directory, command, mended_by_room), None, False
    with open(directory / "users.lock", "a") as users:
        try:
            while True:
                child.tend()
                for log in (SERVER_LOG, SUPERVISOR_LOG):
                    keep_short(directory / log)
                time.sleep(0.2)
                if child.is_hopeless and not is_kept(directory):
                    sys.exit(f"{command[0]} does not start; giving up")
                if is_kept(directory):
                    was_kept, idle_since = True, None
                    continue
                if not _try_lock(users, fcntl.LOCK_EX):
                    idle_since = None
                    continue
                idle_since = idle_since or time.monotonic()
                if was_kept or time.monotonic() - idle_since > LINGER_SECONDS:
                    return
                fcntl.flock(users, fcntl.LOCK_UN)
        finally:
            child.stop(stop_seconds)
            for path in litter:
                with suppress(OSError):  # a socket of another user's under that name
                    Path(path).unlink(missing_ok=True)
            # The users' lock is still held: a new user waits for it, then finds no supervisor and starts one.
            os.close(own_lock)


if __name__ == "__main__":
    if os.fork():
        os._exit(0)  # so that the supervisor is nobody's child, and nobody has to wait for it
    where, lock, seconds, mended, rubbish, *words = sys.argv[1:]
    _supervise(Path(where), int(lock), float(seconds), bool(int(mended)), json.loads(rubbish), words)
