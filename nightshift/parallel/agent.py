"""The ranks of a run, which torch's elastic agent starts, watches and restarts.

    flow ── train_run ───── agent ─┬─ rank 0 ── train_as_rank
                                   └─ rank 1 ── train_as_rank
    nightshift join ─────── agent ─┬─ rank 2 ── …
                                   └─ rank 3 ── …

On each machine an agent starts `nproc_per_node` ranks. The agents meet at a rendezvous, which renumbers the ranks
whenever one is lost or a machine comes; each time all ranks restart from the last checkpoint. The machine that runs the
flow hosts the rendezvous and knows what to train; the others join it.
"""

import logging
import os
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from nightshift import progress
from nightshift.errors import (
    RankFailedError,
    RankLostError,
    TrainingInterrupted,
)
from nightshift.parallel.channel import LauncherChannel
from nightshift.parallel.rendezvous import rendezvous
from nightshift.parallel.worker import Ending, RankSetup, run_rank
from nightshift.signals import StopSignals
from nightshift.training.run import Job
from nightshift.workspace import Workspace

_EXIT_SECONDS = 30
"""How long an agent waits for the other agents after its ranks have ended."""

# They report a lost rank in twenty lines; _Agent needs one.
for _name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def run_ranks(workspace: Workspace, count: int, job: Job | None) -> Ending:
    """Start `count` ranks here, and restart them until the run ends one way or another.

    Args:
        job: what to train; None to join a machine that knows.

    Raises:
        RankFailedError: a rank failed, and again after every restart.
        RankLostError: the machines do not meet, or the others have ended without this one.
        TrainingInterrupted: stopped while no rank was training that could have saved.
    """
    logs, channel = workspace.home / "ranks" / secrets.token_hex(4), LauncherChannel()
    again = f"nightshift resume {job.run_id}" if job else "nightshift join"

    def check_somebody_trains() -> None:
        if signals.received and not channel.has_ranks:
            raise TrainingInterrupted(f"stopped while no rank was training. What was last saved stands: {again}")

    def pass_stop_on() -> None:
        if signals.poll():
            channel.order("stop")

    with (
        _environment(workspace.nodes.alone),
        channel,
        StopSignals(check_somebody_trains) as signals,
        rendezvous(workspace.nodes, is_host=job is not None) as (handler, place),
    ):
        setup = RankSetup(workspace, channel.address, channel.key, place, torch.get_num_threads() // count)
        spec = WorkerSpec(
            role="rank",
            local_world_size=count,
            entrypoint=run_rank,
            args=(setup, job.model_dump_json() if job else None),
            rdzv_handler=handler,
            max_restarts=workspace.nodes.max_restarts,
            monitor_interval=0.1,
        )
        result = _Agent(spec, channel, logs, check_somebody_trains, pass_stop_on).run()
    if result is None:
        raise RankLostError(f"the others have ended without this machine. To go on: {again}")
    if result.is_failed():
        rank, failure = next(iter(result.failures.items()))
        raise RankFailedError(
            f"rank {rank} failed after all had been started again {spec.max_restarts} times: {_reason(failure)}. "
            f"What the ranks have printed is in {logs}"
        )
    shutil.rmtree(logs, ignore_errors=True)
    return Ending.model_validate_json(next(iter(result.return_values.values())))


class _Agent(LocalElasticAgent):
    """Torch's agent, which also says what happened, and lets healthy ranks save before it stops them."""

    def __init__(
        self,
        spec: WorkerSpec,
        channel: LauncherChannel,
        logs: Path,
        before_start: Callable[[], None],
        at_each_look: Callable[[], None],
    ) -> None:
        """`before_start` is called before each start of the ranks, which may mean a long wait; `at_each_look` ten
        times a second while they run."""
        super().__init__(
            spec,
            DefaultLogsSpecs(str(logs), redirects=Std.ERR, tee=Std.ERR),
            exit_barrier_timeout=_EXIT_SECONDS,
            log_line_prefix_template="[rank ${rank}] ",
        )
        self._channel, self._before_start, self._at_each_look = channel, before_start, at_each_look

    def _initialize_workers(self, worker_group: WorkerGroup) -> None:
        self._before_start()
        super()._initialize_workers(worker_group)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        assert worker_group.store
        # Every start has a store of its own, so that ranks find nothing in theirs that others have left there.
        start = worker_group.store.compare_set("start", "", secrets.token_hex(8)).decode()
        setup, job_text = worker_group.spec.args
        worker_group.spec.args = replace(setup, start=start), job_text
        pids: dict[int, Any] = super()._start_workers(worker_group)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._at_each_look()
        result: RunResult = super()._monitor_workers(worker_group)
        for rank, failure in result.failures.items():
            progress.current().warn(f"rank {rank} failed: {_reason(failure)}")
        return result

    def _stop_workers(self, worker_group: WorkerGroup) -> None:
        self._channel.order("restart")
        self._channel.wait_until_all_left()
        super()._stop_workers(worker_group)
        self._channel.withdraw("restart")

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        at_once = isinstance(sys.exception(), KeyboardInterrupt)  # raised by a second signal
        super()._shutdown(signal.SIGKILL if at_once else death_sig, timeout)


def _reason(failure: ProcessFailure) -> str:
    """What is known about a failure, such as `Signal 9 (SIGKILL) received by PID 123`."""
    message: Any = failure.message  # declared as str, but for an exception it is what torch stored about it
    reason = str(message["message"] if isinstance(message, dict) else message)
    return (reason.strip().splitlines() or ["no reason is known"])[-1]


@contextmanager
def _environment(alone: bool) -> Iterator[None]:
    """Set what torch's agent and the ranks read from the environment, as long as the run trains."""
    ours = {
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGQUIT",  # SIGTERM and SIGINT are for the launcher
        # Otherwise torch's agent listens on all networks for ranks, which ours do not need.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if alone:  # ranks listen for each other where no other machine can reach them
        ours |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    # Otherwise torch warns of what `Ranks.parallel` asks for on purpose.
    ours["TORCH_CPP_LOG_LEVEL"] = os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
