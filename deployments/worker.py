"""A Prefect worker that lets its runs save before it goes.

Prefect's worker kills its flow runs without warning when it gets a SIGTERM. So this process gets it instead: it halts
the worker, sends SIGTERM to the flow runs, waits until they have saved and reported, and only then ends the worker.
"""

import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

_WORKER_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


class _Stop(BaseException):
    pass


def run(pool: str, limit: int | None, is_warm: bool, grace_seconds: float) -> int:
    """Run a worker of `pool` until a SIGTERM or SIGINT; a second one stops at once.

    Args:
        limit: how many flow runs at a time.
        is_warm: whether flow runs are forked from a process that has imported what they need.
        grace_seconds: how long the flow runs may take to save.

    Returns:
        0 after a signal, otherwise the worker's exit status.
    """
    name = "-gpu".join(filter(None, (socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES"))))
    command = [sys.executable, "-m", "deployments", *(["--warm"] if is_warm else []), "worker", "start"]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    # A session of its own: a Ctrl-C at the terminal must reach the runs only through us.
    worker = subprocess.Popen(
        [*command, "--pool", pool, "--name", name, *([] if limit is None else ["--limit", str(limit)])],
        start_new_session=True,
        preexec_fn=_die_with_parent,
    )
    try:
        try:
            return worker.wait()
        except _Stop:
            _stop(worker, grace_seconds)
    except _Stop:
        pass
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()
    return 0


def _on_signal(number: int, frame: FrameType | None) -> None:
    raise _Stop


def _die_with_parent() -> None:
    """Without us, a worker would start runs that nobody lets save. Its runs live on, and report by themselves."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _stop(worker: subprocess.Popen[bytes], grace_seconds: float) -> None:
    # A halted worker neither starts another run when one ends, nor kills any.
    worker.send_signal(signal.SIGSTOP)
    runs = list(_runs(worker.pid))
    if runs:
        print(f"stopping: {len(runs)} flow runs have {grace_seconds:.0f} s to save", file=sys.stderr)
    _end(runs, grace_seconds)
    worker.terminate()
    worker.send_signal(signal.SIGCONT)
    try:
        worker.wait(_WORKER_SECONDS)
    except subprocess.TimeoutExpired:
        print("the worker does not stop; it is killed", file=sys.stderr)


def _runs(worker: int) -> Iterator[int]:
    """The processes of a worker's flow runs: its children or, for a warm worker, the children of its fork server."""
    for child in _children(worker):
        is_of_multiprocessing = b"from multiprocessing" in Path(f"/proc/{child}/cmdline").read_bytes()
        yield from _children(child) if is_of_multiprocessing else [child]


def _children(pid: int) -> list[int]:
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for thread in threads for child in thread.read_text().split()]


def _end(pids: Sequence[int], grace_seconds: float) -> None:
    """Send SIGTERM and wait until all have ended. A halted parent cannot reap them, so each is watched by a pidfd."""
    deadline = time.monotonic() + grace_seconds
    living = [os.pidfd_open(pid) for pid in pids]
    for process in living:
        signal.pidfd_send_signal(process, signal.SIGTERM)
    while living and (left := deadline - time.monotonic()) > 0:
        ended, _, _ = select.select(living, [], [], left)
        living = [process for process in living if process not in ended]
