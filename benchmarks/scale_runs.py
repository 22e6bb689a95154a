"""What `runs`, `recover` and `gc` cost when many runs are stored.

The runs are made up but whole: a record as a finished run of the recipe quick leaves it (two checkpoints, six
epochs, the gate's verdict), and for `gc` two payloads and a report, of one byte each. One run in a
hundred is interrupted instead. All are in one embedded S3 server, which grows from one number to the next.
A page of runs is written last, some seconds after the others, so that some runs are recent.

    runs, first page     `overviews` with the command's limit of 50
    nightshift runs      the same as a command, with the start of its process; the server runs
    runs, all            `overviews` of all: every record is read
    recover, recent      `recovery.find` where only the last page was written to lately, as it is every night
    recover, all         the same where every record was written to lately: all are read
    gc, none old         `orphans.find` where everything is too young to be an orphan: it only lists keys
    gc, all old          the same where everything is old enough, as all but the last day is: every record is read
    index, renewed       what `gc` does at its end where no run is in the index yet: every record is read

Then, with the index, once more:

    nightshift runs, all   the command for all of them: the records of runs that are not over are read
    recover, all indexed   as above

Every request that the client sends is counted, including retries. Growth is the ratio of the seconds to those
with the previous number of runs: 10 is linear. The requests of a separate process are not counted.

Client and server share the same cores. 2 cores, n = 3, up to 10,000 runs (40,000 objects): an estimated
15 minutes, 4 of them for writing.

    python benchmarks/scale_runs.py [--count N …] [--rounds N] [--quick] [--json FILE]
"""

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import Summary, machine, show, tell, temporary_home, write_json

from nightshift.config.recipes import make_config
from nightshift.hardware import Hardware
from nightshift.local.s3 import embedded_s3
from nightshift.records import orphans, recovery
from nightshift.records.curve import CurvePoint
from nightshift.records.index import KEY, Known, overviews, renew
from nightshift.records.keys import payload_key, report_key
from nightshift.records.run import (
    Checkpoint,
    CheckpointMetrics,
    Lease,
    Result,
    RunRecord,
    write_record,
)
from nightshift.refs import ChampionRef, Comparison, DatasetRef, Verdict
from nightshift.storage.s3 import S3

_PAGE, _ALL = 50, 1_000_000
_WRITERS = 8
_STEPS, _EPOCHS = 2_340, 6
_REPORTS = ("metrics.jsonl",)
_CONFIG = make_config("quick", {})
_ENVIRONMENT = Hardware(torch.device("cpu"), "float32", compiled=False, deterministic=True).describe()
_PAUSE = 3
"""Seconds between the old runs and the recent ones."""
_SHA256 = "0" * 64


class Requests:
    """Counts the requests a store sends, by operation."""

    def __init__(self, store: S3) -> None:
        self._lock = threading.Lock()
        self._sent: Counter[str] = Counter()
        store._client.meta.events.register("before-send.s3", self._count)

    def _count(self, event_name: str, **_: Any) -> None:
        with self._lock:
            self._sent[event_name.rpartition(".")[2]] += 1

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """The requests sent within the block; complete once it is left."""
        sent: Counter[str] = Counter()
        with self._lock:
            before = self._sent.copy()
        yield sent
        with self._lock:
            sent.update(self._sent - before)


@dataclass(frozen=True)
class Scan:
    """What one look at the stored runs cost."""

    runs: int
    what: str
    seconds: float
    requests: dict[str, int]
    """The number of each operation; empty where they are not counted."""
    found: int


def record(number: int, now: datetime) -> RunRecord:
    """A finished run, or for one number in a hundred an interrupted one."""
    run_id, interrupted = run_name(number), number % 100 == 99
    times = [now - timedelta(hours=1) + timedelta(seconds=20 * epoch) for epoch in range(1, _EPOCHS + 1)]
    made = RunRecord(
        run_id=run_id,
        status="interrupted" if interrupted else "finished",
        sequence=9,
        config=_CONFIG.model_dump(),
        config_digest=_CONFIG.digest,
        dataset=DatasetRef(name="cifar10", digest=_SHA256, key="datasets/0/packed.safetensors", source="bucket"),
        environment=_ENVIRONMENT,
        lease=Lease(owner="host/1/0123abcd", process="", token=1, expires_at=times[-1]),
        checkpoints=[
            Checkpoint(
                step=step,
                epoch=epoch,
                key=payload_key(run_id, step, token=1),
                bytes=1,
                sha256=_SHA256,
                written_at=times[epoch - 1],
                metrics=CheckpointMetrics(loss=0.9, accuracy=0.8, train_seconds=20.0 * epoch),
            )
            for epoch, step in checkpoints()
        ],
        curve=[CurvePoint(epoch=epoch, step=epoch, loss=0.9, accuracy=0.8) for epoch in range(1, _EPOCHS + 1)],
        total_steps=_STEPS,
        result=None if interrupted else result(run_id),
        created_at=times[0],
        updated_at=now,
    )
    for what in ("started", "interrupted" if interrupted else "finished"):
        made = made.with_event(what, times[-1])
    return made


def result(run_id: str) -> Result:
    comparison = Comparison(
        champion=run_name(0),
        images=10_000,
        only_candidate=500,
        only_champion=480,
        difference=0.002,
        low=-0.004,
        high=0.008,
        p_value=0.5,
    )
    champion = ChampionRef(name="cifar10", version=run_id, run_id=run_id, test_accuracy=0.82, previous=run_name(0))
    verdict = Verdict(promoted=True, reason="82.00%, +0.20 points", comparison=comparison, champion=champion)
    model = f"models/cifar10/{run_id}/"
    return Result(test_accuracy=0.82, test_loss=0.9, weights_sha256=_SHA256, model=model, verdict=verdict)


def run_name(number: int) -> str:
    return f"quick-{number:06d}"


def checkpoints() -> list[tuple[int, int]]:
    """Epoch and step of the checkpoints that are kept."""
    return [(epoch, epoch * _STEPS // _EPOCHS) for epoch in (_EPOCHS - 1, _EPOCHS)]


def write(store: S3, numbers: range) -> None:
    """Store these runs: payloads and reports first, as a trainer does."""

    def write_one(number: int) -> None:
        run_id = run_name(number)
        for key in (
            *(payload_key(run_id, step, token=1) for _, step in checkpoints()),
            *(report_key(run_id, name) for name in _REPORTS),
        ):
            store.put(key, b"0")
        write_record(store, record(number, store.now()), None)

    with ThreadPoolExecutor(_WRITERS) as pool:
        for _ in pool.map(write_one, numbers):
            pass


def environment(home: Path) -> dict[str, str]:
    """Our environment without the variables that would lead to another store than that of `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NIGHTSHIFT_")}
    return {**kept, "NIGHTSHIFT_HOME": str(home)}


def looks(store: S3, home: Path, recent_since: datetime) -> dict[str, Callable[[], int]]:
    """All ways to look. Each returns how many runs or orphans it has found."""
    ever, cut = timedelta(days=1), timedelta(seconds=1)  # the store truncates times to the second

    def command(*options: str) -> int:
        program = [sys.executable, "-c", "from nightshift.cli import main; main()", "runs", "--json", *options]
        printed = subprocess.run(program, env=environment(home), cwd=home, capture_output=True, text=True, check=True)
        return printed.stdout.count('"run_id"')

    def indexed() -> int:
        renew(store)
        return len(Known(store))

    store.delete(KEY)
    return {
        "runs, first page": lambda: len(overviews(store, _PAGE)),
        "nightshift runs": command,
        "runs, all": lambda: len(overviews(store, _ALL)),
        "recover, recent": lambda: len(recovery.find(store, store.now() - recent_since + cut).interrupted),
        "recover, all": lambda: len(recovery.find(store, ever).interrupted),
        "gc, none old": lambda: len(orphans.find(store, ever).keys),
        "gc, all old": lambda: len(orphans.find(store, timedelta(0)).keys),
        "index, renewed": indexed,
        "nightshift runs, all": lambda: command("--limit", str(_ALL)),
        "recover, all indexed": lambda: len(recovery.find(store, ever).interrupted),
    }


def main(
    count: Annotated[
        list[int] | None, typer.Option(help="Stored runs; may be repeated, in growing order. 100, 1,000 and 10,000.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each look is taken.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it works: 100 and 1,000 runs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the result there.")] = None,
) -> None:
    """What `runs`, `recover` and `gc` cost when many runs are stored."""
    counts = count or [100, 1_000, 10_000]
    if quick:
        counts, rounds = [100, 1_000], 1
    facts, scans, written = machine(), [], {}
    with temporary_home() as home, embedded_s3(home) as store:
        requests, stored = Requests(store), 0
        for number in counts:
            tell(f"{number:,} runs")
            started = time.perf_counter()
            write(store, range(stored, number - _PAGE))
            time.sleep(_PAUSE)
            recent_since = store.now()
            write(store, range(max(stored, number - _PAGE), number))
            written[number], stored = time.perf_counter() - started, number
            for _ in range(rounds):
                for what, look in looks(store, home, recent_since).items():
                    with requests.counted() as sent:
                        started = time.perf_counter()
                        found = look()
                        seconds = time.perf_counter() - started
                    scans.append(Scan(number, what, seconds, dict(sent), found))
    report(scans, written, facts, json_file)


def report(scans: list[Scan], written: dict[int, float], facts: dict[str, Any], json_file: Path | None) -> None:
    counts, names = list(written), list(dict.fromkeys(scan.what for scan in scans))
    seconds = {
        what: {
            number: Summary.of([scan.seconds for scan in scans if (scan.what, scan.runs) == (what, number)])
            for number in counts
        }
        for what in names
    }
    last = {(scan.what, scan.runs): scan for scan in scans}
    rows = []
    for what in names:
        for place, number in enumerate(counts):
            taken, scan = seconds[what][number], last[what, number]
            growth = taken.median / seconds[what][counts[place - 1]].median
            rows.append(
                [
                    what,
                    f"{number:,}",
                    f"{scan.found:,}",
                    f"{sum(scan.requests.values()):,}" if scan.requests else "",
                    ", ".join(f"{times:,} {operation}" for operation, times in scan.requests.items()),
                    str(taken.n),
                    *(f"{value:.2f}" for value in (taken.median, taken.min, taken.max)),
                    f"{growth:.1f}" if place else "",
                ]
            )
    show(
        "A look at the stored runs",
        {**{f"{number:,} written in": f"{taken:.0f} s" for number, taken in written.items()}, **facts},
        ["", "runs", "found", "requests", "of which", "n", "median s", "min", "max", "growth"],
        rows,
    )
    write_json(
        json_file,
        {
            "benchmark": "scale_runs",
            "machine": facts,
            "seconds": seconds,
            "requests": {what: {number: last[what, number].requests for number in counts} for what in names},
            "write_seconds": written,
            "samples": scans,
        },
    )


if __name__ == "__main__":
    typer.run(main)
