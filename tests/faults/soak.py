"""SIGKILL campaign: every run is killed once, resumed, and has to end with the bits of an uninterrupted one.

    make soak                                          200 kills, twenty to thirty minutes on two cores
    .venv/bin/python -m tests.faults.soak --kills 20 --seed 7

Kills come at random instants and at every point of the storage protocol, over several recipes. Prints kills,
resumes, bit-identical endings, steps lost, orphans found and orphans left after gc.
"""

import argparse
import itertools
import logging
import os
import random
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from torch import Tensor

from nightshift import progress
from nightshift.checkpoints.payload import read_weights, weights_sha256
from nightshift.cli.screen import Screen
from nightshift.cli.terminal import TerminalProgress
from nightshift.config.train import TrainConfig
from nightshift.data.known import fetch, pack
from nightshift.errors import TrainingInterrupted
from nightshift.local.s3 import embedded_credentials, embedded_s3
from nightshift.records import orphans
from nightshift.records.run import newest_records, read_record
from nightshift.refs import DatasetRef
from nightshift.settings import S3Settings
from nightshift.storage import s3
from nightshift.storage.s3 import S3
from nightshift.training.run import train_alone
from nightshift.training.snapshot import Path as TensorPath
from nightshift.training.snapshot import Snapshot
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.faults.proxy import Kind, Proxy, kill, running
from tests.forked import forked

CONFIGS: dict[str, TrainConfig] = {
    "tutorial": small_config(checkpoint_every_steps=3, keep_last=1),
    "quick": small_config("quick", checkpoint_every_steps=3, keep_last=2),
    "adamw": small_config(
        optimizer="adamw", schedule="cosine", precision="bfloat16", checkpoint_every_steps=4, keep_every_epochs=1
    ),
    # Its state of 90 MB goes up in two parts even without smaller ones.
    "resnet18": small_config(
        "resnet18", max_train_images=64, batch_size=8, epochs=2, checkpoint_every_steps=2, keep_last=1
    ),
}
SNAPSHOT = "snapshot"
RANDOM = "random instant"
GC_DELETE = "gc delete"
KINDS: tuple[Kind, ...] = (
    "multipart begin",
    "part put",
    "multipart end",
    "record put",
    "record get",
    "payload delete",
    "payload get",
)
_TRIES = 50
POINTS = (SNAPSHOT, *(f"{when} {kind}" for kind in KINDS for when in ("before", "after")))


@dataclass
class Tally:
    kills: int = 0
    identical: int = 0
    different: list[str] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)
    points: Counter[str] = field(default_factory=Counter)
    recipes: Counter[str] = field(default_factory=Counter)
    orphans: int = 0
    orphans_left: int = 0
    uploads_left: int = 0


class Campaign:
    """Runs on one server; each through a proxy of its own."""

    def __init__(self, workspace: Workspace, dataset: DatasetRef) -> None:
        self.home, self.store, self.dataset = workspace.home, workspace.store, dataset
        self.expected: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.tally = Tally()
        self._lock = threading.Lock()

    def measure(self, name: str) -> None:
        """What an uninterrupted run of this config ends with, and how long it takes."""
        with running(self.store.endpoint) as proxy:
            started = time.monotonic()
            assert self._train(proxy, name, f"whole-{name}") == 0, f"{name} does not train"
            self.seconds[name] = time.monotonic() - started
        self.expected[name] = self._ending(f"whole-{name}")

    def kill_one(self, point: str, chance: random.Random) -> None:
        """Kill a run at `point`, resume it, and compare how it ends; one that ends too soon is not counted."""
        step = forked().Value("i", 0)
        with running(self.store.endpoint) as proxy:
            for _ in range(_TRIES):
                name = chance.choice(sorted(self.expected))
                run_id = f"{name}-{secrets.token_hex(4)}"
                if self._killed(proxy, point, name, run_id, step, chance):
                    break
            else:
                raise AssertionError(f"no run comes to this point: {point}")
            exit_code = self._train(proxy, name, run_id)
            assert exit_code == 0, f"{run_id}, killed {point}, does not resume: exit code {exit_code}"
        resumed_from = read_record(self.store, run_id)[0].resumed_from_step or 0
        identical = self._ending(run_id) == self.expected[name]
        tally = self.tally
        with self._lock:
            tally.kills += 1
            tally.points[point] += 1
            tally.recipes[name] += 1
            tally.steps_lost.append(max(step.value - resumed_from, 0))
            tally.identical += identical
            if not identical:
                tally.different.append(f"{run_id}, killed {point}")

    def collect(self) -> None:
        """Kill gc in the middle of it, before and after a delete; then let it end, and see what is left."""
        self.tally.orphans = len(orphans.find(self.store, timedelta(0)).keys)
        for when in ("before", "after"):
            with running(self.store.endpoint) as proxy:
                process = forked().Process(target=_collect, args=(self._settings(proxy), self._credentials()))
                proxy.plan("payload delete", kill(process, when))
                process.start()
                process.join()
                if process.exitcode == -signal.SIGKILL:
                    self.tally.points[f"{when} {GC_DELETE}"] += 1
        orphans.collect(self.store, orphans.find(self.store, timedelta(0)))
        named = {checkpoint.key for record in newest_records(self.store) for checkpoint in record.checkpoints}
        self.tally.orphans_left = len({item.key for item in self.store.list("checkpoints/")} ^ named)
        self.tally.uploads_left = len(list(self.store.list_uploads("")))

    def _killed(
        self, proxy: Proxy, point: str, name: str, run_id: str, step: "Synchronized[int]", chance: random.Random
    ) -> bool:
        when, _, kind = point.partition(" ")
        if kind == "payload get":  # asked for by a resumed run only
            self._train(proxy, name, run_id, stop=chance.randrange(3, 13))
        copies = chance.randrange(1, 40) if point == SNAPSHOT else 0
        process = self._process(proxy, name, run_id, step=step, kill_at_copy=copies)
        if when in ("before", "after"):
            skip = chance.randrange(5) if kind in ("record put", "part put", "payload delete") else 0
            proxy.plan(kind, kill(process, when), skip=skip)  # type: ignore[arg-type]
        process.start()
        if point == RANDOM:
            process.join(chance.uniform(0, self.seconds[name]))
            process.kill()
        process.join()
        return process.exitcode == -signal.SIGKILL

    def _train(self, proxy: Proxy, name: str, run_id: str, stop: int = -1) -> int | None:
        process = self._process(proxy, name, run_id, stop=stop)
        process.start()
        process.join()
        return process.exitcode

    def _process(self, proxy: Proxy, name: str, run_id: str, **options: Any) -> ForkServerProcess:
        config = CONFIGS[name]
        where = (self._settings(proxy), self._credentials(), self.home)
        return forked().Process(target=_train, args=(*where, run_id, config, self.dataset), kwargs=options)

    def _settings(self, proxy: Proxy) -> S3Settings:
        assert isinstance(self.store, S3)
        return S3Settings(endpoint_url=proxy.endpoint_url, bucket=self.store.bucket, prefix=self.store.prefix)

    def _credentials(self) -> s3.Credentials:
        return embedded_credentials(self.home / "s3")

    def _ending(self, run_id: str) -> str:
        record, _ = read_record(self.store, run_id)
        return weights_sha256(read_weights(self.store, record.checkpoints[-1]))


def _train(
    settings: S3Settings,
    credentials: s3.Credentials,
    home: Path,
    run_id: str,
    config: TrainConfig,
    dataset: DatasetRef,
    step: "Synchronized[int] | None" = None,
    stop: int = -1,
    kill_at_copy: int = 0,
) -> None:
    """In a process of its own: train a run to its end, or until it is killed."""
    logging.disable(logging.WARNING)
    if config.model.name != "resnet18":  # else states of a few MB would go up in one piece
        s3._TRANSFER.multipart_threshold = s3._PIPED.multipart_threshold = s3.MIB // 4
    if kill_at_copy:
        _kill_within_a_snapshot(kill_at_copy)

    def note_step(done: int) -> bool:
        if step:
            step.value = done
        return done == stop

    workspace = Workspace(S3(settings, credentials), home, lease_seconds=60, save_retry_seconds=60)
    with suppress(TrainingInterrupted):
        train_alone(workspace, run_id, config, dataset, should_stop=note_step)


def _kill_within_a_snapshot(number: int) -> None:
    """Let this process end itself in the middle of a copy of the state."""
    copy, copies = Snapshot._copy, itertools.count(1)

    def copy_or_die(self: Snapshot, path: TensorPath, tensor: Tensor) -> Tensor:
        if next(copies) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return copy(self, path, tensor)

    Snapshot._copy = copy_or_die  # type: ignore[method-assign]


def _collect(settings: S3Settings, credentials: s3.Credentials) -> None:
    store = S3(settings, credentials)
    orphans.collect(store, orphans.find(store, timedelta(0)))


def run(
    campaign: Campaign,
    points: Iterable[str],
    *,
    seed: int,
    jobs: int,
    names: Iterable[str] = tuple(CONFIGS),
    advance: Callable[[], object] = lambda: None,
) -> Tally:
    """Kill one run at each of these points, several at a time, and collect the orphans."""
    for name in names:
        campaign.measure(name)

    def kill_one(numbered: tuple[int, str]) -> None:
        campaign.kill_one(numbered[1], random.Random(f"{seed}/{numbered[0]}"))
        advance()

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(kill_one, enumerate(points)))
    campaign.collect()
    return campaign.tally


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill runs, resume them, and compare how they end.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    # Half of them at random instants, the others at each point in turn.
    halves = zip(itertools.repeat(RANDOM), itertools.cycle(POINTS), strict=False)
    points = itertools.islice(itertools.chain.from_iterable(halves), arguments.kills)
    console, started = Screen(stderr=True), time.monotonic()
    forked()
    with (
        tempfile.TemporaryDirectory() as directory,
        embedded_s3(Path(directory)) as store,
        progress.shown_by(TerminalProgress(console)),
        Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as bar,
    ):
        workspace = Workspace(store, Path(directory), lease_seconds=60, save_retry_seconds=60)
        dataset = pack(workspace, fetch(workspace, "cifar10"))
        task = bar.add_task("kills", total=arguments.kills)
        campaign = Campaign(workspace, dataset)
        tally = run(campaign, points, seed=arguments.seed, jobs=arguments.jobs, advance=lambda: bar.advance(task))
    _show(tally, time.monotonic() - started)
    sys.exit(bool(tally.different or tally.orphans_left or tally.uploads_left))


def _show(tally: Tally, seconds: float) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    lost = sorted(tally.steps_lost)
    for name, value in {
        "kills, each resumed": tally.kills,
        "bit-identical endings": f"{tally.identical} of {tally.kills}",
        "steps lost to a kill": f"median {lost[len(lost) // 2]}, at most {lost[-1]}",
        "orphans found": tally.orphans,
        "orphans left after gc": tally.orphans_left,
        "unfinished uploads left": tally.uploads_left,
        "seconds": f"{seconds:.0f}",
        "recipes": ", ".join(f"{name} {count}" for name, count in sorted(tally.recipes.items())),
        "killed": "\n".join(f"{count:4} {point}" for point, count in sorted(tally.points.items())),
        "different": "\n".join(tally.different) or "none",
    }.items():
        table.add_row(name, str(value))
    Console().print(table)


if __name__ == "__main__":
    main()
