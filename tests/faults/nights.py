"""Everything at once: nights, kills, failing stores, gc, second trainers, cancels, rollbacks and sweeps on one store.

    make soak                                             an hour of it, after the kills
    .venv/bin/python -m tests.faults.nights --minutes 10 --seed 7

Nights of three time zones, around all changes of their clocks, run the whole way from training to the report. What
should be there is kept beside, in `Expected`, and compared with the store in the end: every night has its run, no
champion and no checkpoint is missing, every verdict in a record is the one in the history, and gc leaves no orphan.
"""

import argparse
import itertools
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from zoneinfo import ZoneInfo

from nightshift import progress
from nightshift.checkpoints.verify import verify_checkpoints
from nightshift.cli.screen import Screen
from nightshift.cli.terminal import TerminalProgress
from nightshift.config.recipes import make_config
from nightshift.config.train import TrainConfig
from nightshift.data.known import fetch, pack
from nightshift.errors import LeaseHeldError, ModelNotFoundError, NightshiftError
from nightshift.ids import durable_run_id
from nightshift.judging import evaluation, gate
from nightshift.judging.report import publish_report
from nightshift.local.s3 import embedded_credentials, embedded_s3
from nightshift.publishing.publish import publish_model
from nightshift.records import champions, orphans, recovery
from nightshift.records.history import History, read_history
from nightshift.records.run import Origin, RunRecord, newest_records, read_record
from nightshift.records.versions import read_card, read_file
from nightshift.refs import DatasetRef
from nightshift.settings import GateSettings, S3Settings
from nightshift.storage.s3 import S3, Credentials
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.faults.proxy import Kind, Proxy, refuse, running
from tests.forked import forked

ZONES = ("Europe/Helsinki", "Asia/Tokyo", "America/New_York")
CHANGES = (date(2027, 3, 14), date(2027, 3, 28), date(2027, 10, 31), date(2027, 11, 7))
GATE = GateSettings(max_regression=0.02, max_slide=0.05)
KINDS: tuple[Kind, ...] = ("record get", "record put", "payload get", "payload put", "part put", "payload delete")
NAME = "cifar10"
_PAUSES_OF_A_PERSON = (10.0, 40.0)
_SWEEP_EVERY = 12


@dataclass
class Expected:
    """What should be in the store."""

    nights: dict[str, str] = field(default_factory=dict)
    """Each night's run id, and how it is to end: `finished` or `cancelled`."""
    trials: list[str] = field(default_factory=list)
    by_hand: list[tuple[str, str]] = field(default_factory=list)
    """What a person did to the champion, in order: how, and to which version."""
    accidents: Counter[str] = field(default_factory=Counter)
    collected: int = 0


def nights() -> Iterator[tuple[str, date]]:
    """Zones and dates, the changes of the clocks first, then the days around them."""
    for days in itertools.chain.from_iterable((number, -number) if number else (0,) for number in range(60)):
        for change in CHANGES:
            for zone in ZONES:
                yield zone, change + timedelta(days=days)


def run_id_of(zone: str, night: date) -> str:
    """As a schedule at 02:00 in this zone has it."""
    start = datetime(night.year, night.month, night.day, 2, tzinfo=ZoneInfo(zone))
    return durable_run_id(f"{zone.partition('/')[2].lower()}-{{date}}", "night", start, "")


def config_of(run_id: str, number: int) -> TrainConfig:
    """Each fifth night has the same seed, and so the same weights as others."""
    small = {"max_train_images": 256, "batch_size": 32, "epochs": 2, "checkpoint_every_steps": 3, "keep_last": 2}
    return make_config("quick", {**small, "precision": "float32", "seed": 7 if number % 5 == 0 else number})


class Campaign:
    """All actors on one server; each run through a proxy of its own."""

    def __init__(self, workspace: Workspace, dataset: DatasetRef, seed: int, until: float) -> None:
        self.home, self.store, self.dataset, self.until = workspace.home, workspace.store, dataset, until
        self.chance = random.Random(seed)
        self.expected = Expected()
        self._numbers = itertools.count(1)
        self._nights = nights()
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def run(self, jobs: int) -> None:
        """Nights, several at a time, until the time is over; a person and gc meanwhile."""
        others = [threading.Thread(target=actor, daemon=True) for actor in (self._a_person, self._gc)]
        for thread in others:
            thread.start()
        with ThreadPoolExecutor(jobs) as pool:
            for ended in [pool.submit(self._nights_until_the_end) for _ in range(jobs)]:
                ended.result()
        self._ended.set()
        for thread in others:
            thread.join()

    def _nights_until_the_end(self) -> None:
        while time.monotonic() < self.until:
            with self._lock:
                number, (zone, night) = next(self._numbers), next(self._nights)
                chance = random.Random(self.chance.random())
            if number % _SWEEP_EVERY == 0:
                self._sweep(number, chance)
            self._night(run_id_of(zone, night), number, chance)

    def _night(self, run_id: str, number: int, chance: random.Random) -> None:
        assert run_id not in self.expected.nights, f"two nights are called {run_id}"
        self.expected.nights[run_id] = "finished"
        while (status := self._status(run_id)) not in ("finished", "cancelled"):
            assert status != "failed", f"{run_id} has failed: {read_record(self.store, run_id)[0].events[-1].detail}"
            self._attempt(run_id, number, chance, promote=True)

    def _attempt(self, run_id: str, number: int, chance: random.Random, promote: bool) -> None:
        """Start a run, or start it again, and let something happen to it."""
        accident = chance.choices(
            ["none", "killed", "store fails", "second trainer", "cancelled"], [30, 40, 20, 10, 3 if promote else 0]
        )[0]
        self.expected.accidents[accident] += 1
        with running(self.store.endpoint) as proxy:
            if accident == "store fails":
                kind = chance.choice(KINDS)
                proxy.plan(kind, refuse(503, "SlowDown"), skip=chance.randrange(4), times=chance.randrange(1, 8))
            process = self._process(proxy, run_id, number, promote)
            process.start()
            second = self._process(proxy, run_id, number, promote) if accident == "second trainer" else None
            if second:
                time.sleep(chance.uniform(0, 4))
                second.start()
            if accident in ("killed", "cancelled"):
                process.join(chance.uniform(0, 15))
                process.kill() if accident == "killed" else process.terminate()
            process.join()
            if second:
                second.join()
        if accident == "cancelled":
            recovery.close(self.store, run_id, "cancelled")
            # A run that had not begun, or is finished, cannot be cancelled.
            self.expected.nights[run_id] = "cancelled" if self._status(run_id) == "cancelled" else "finished"

    def _sweep(self, number: int, chance: random.Random) -> None:
        """Two trials that do not ask the gate; the better one goes there."""
        found = []
        for trial in (1, 2):
            run_id = f"sweep-{number}-{trial}"
            self.expected.trials.append(run_id)
            while self._status(run_id) != "finished":
                self._attempt(run_id, 1000 * number + trial, chance, promote=False)
            found.append(read_card(self.store, NAME, run_id).ref())
        gate.promote(self.store, max(found, key=lambda model: model.test_accuracy), GATE)

    def _a_person(self) -> None:
        chance = random.Random(self.chance.random())
        while not self._ended.wait(chance.uniform(*_PAUSES_OF_A_PERSON)):
            with suppress(ModelNotFoundError):
                before = read_history(self.store, NAME)
                if chance.random() < 0.6:
                    done, what = champions.roll_back(self.store, NAME), "rolled back"
                else:
                    version = chance.choice(before.transitions).version if before.transitions else "none"
                    done, what = champions.promote_by_hand(self.store, NAME, version), "promoted by hand"
                self.expected.by_hand.append((what, done.version))

    def _gc(self) -> None:
        """Of any age: what is about to be committed is protected by its lease alone."""
        while not self._ended.wait(5):
            with suppress(NightshiftError):
                found = orphans.find(self.store, timedelta(0))
                self.expected.collected += len(orphans.collect(self.store, found).keys)

    def _status(self, run_id: str) -> str | None:
        with suppress(NightshiftError):
            return read_record(self.store, run_id)[0].status
        return None

    def _process(self, proxy: Proxy, run_id: str, number: int, promote: bool) -> ForkServerProcess:
        assert isinstance(self.store, S3)
        settings = S3Settings(endpoint_url=proxy.endpoint_url, bucket=self.store.bucket, prefix=self.store.prefix)
        where = (settings, embedded_credentials(self.home / "s3"), self.home)
        return forked().Process(target=_night, args=(*where, run_id, config_of(run_id, number), self.dataset, promote))


def _night(
    settings: S3Settings,
    credentials: Credentials,
    home: Path,
    run_id: str,
    config: TrainConfig,
    dataset: DatasetRef,
    promote: bool,
) -> None:
    """In a process of its own: what the flow does of a night, from training to the report."""
    logging.disable(logging.WARNING)
    workspace = Workspace(S3(settings, credentials), home, lease_seconds=60, save_retry_seconds=60)
    try:
        checkpoint = train_alone(workspace, run_id, config, dataset, Origin(promote=promote))
        with recovery.closed_if_it_fails(workspace.store, run_id):
            evaluated = evaluation.evaluate(workspace, checkpoint, dataset)
            model = publish_model(workspace, checkpoint, dataset, evaluated)
            verdict = gate.promote(workspace.store, model, GATE) if promote else None
            publish_report(workspace, checkpoint, evaluated, model, verdict, price_per_hour=None)
    except LeaseHeldError:
        os._exit(2)
    except NightshiftError as error:
        print(f"{run_id}: {type(error).__name__}: {error}", file=sys.stderr)
        os._exit(3)


def compare(store: S3, expected: Expected) -> list[str]:
    """In what the store differs from what should be there; a sentence each."""
    records = {record.run_id: record for record in newest_records(store)}
    history = read_history(store, NAME)
    wrong = []

    def check(holds: bool, sentence: str) -> None:
        if not holds:
            wrong.append(sentence)

    check(set(records) == {*expected.nights, *expected.trials}, "there are other runs than nights and trials")
    for run_id, status in expected.nights.items():
        record = records.get(run_id)
        check(record is not None and record.status == status, f"night {run_id} is not {status}")
    for record in records.values():
        if record.status == "finished":
            wrong += _differences_of_a_finished_run(store, record, history)
    by_hand = [(entry.what, entry.version) for entry in history.transitions if entry.what != "promoted"]
    # Nothing is written if the version was the champion already.
    check(_is_subsequence(by_hand, expected.by_hand), "the history has changes by hand that nobody made")
    for entry in history.transitions:
        try:
            card = read_card(store, NAME, entry.version)
            for name in card.files:
                read_file(store, card, name)
        except NightshiftError as error:
            wrong.append(f"champion {entry.version} cannot be read: {error}")
    orphans.collect(store, orphans.find(store, timedelta(0)))
    named = {checkpoint.key for record in records.values() for checkpoint in record.checkpoints}
    check({item.key for item in store.list("checkpoints/")} == named, "payloads and records do not name each other")
    check(not list(store.list_uploads("")), "uploads are left unfinished")
    check(orphans.find(store, timedelta(0)).keys == [], "orphans are left")
    return wrong


def _differences_of_a_finished_run(store: S3, record: RunRecord, history: History) -> Iterator[str]:
    for checkpoint, unusable in verify_checkpoints(store, record):
        if unusable:
            yield f"checkpoint {checkpoint.key} of {record.run_id} is missing: {unusable.reason}"
    made = history.find(f"gate/{record.run_id}")
    verdict = record.result.verdict if record.result else None
    if record.origin.promote and not verdict:
        yield f"{record.run_id} has no verdict"
    elif verdict and verdict.promoted != bool(made):
        yield f"{record.run_id}: the record says promoted={verdict.promoted}, and the history has {made}"
    elif verdict and made and verdict.reason != made.reason:
        yield f"{record.run_id}: the record's verdict is not the history's"


def _is_subsequence(part: Sequence[tuple[str, str]], whole: Sequence[tuple[str, str]]) -> bool:
    rest = iter(whole)
    return all(item in rest for item in part)


def main() -> None:
    parser = argparse.ArgumentParser(description="Everything at once, for a while; then compare the store.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    console, started = Screen(stderr=True), time.monotonic()
    forked()
    with (
        tempfile.TemporaryDirectory() as directory,
        embedded_s3(Path(directory)) as store,
        progress.shown_by(TerminalProgress(console)),
    ):
        workspace = Workspace(store, Path(directory), lease_seconds=60, save_retry_seconds=60)
        dataset = pack(workspace, fetch(workspace, NAME))
        campaign = Campaign(workspace, dataset, arguments.seed, started + 60 * arguments.minutes)
        campaign.run(arguments.jobs)
        wrong = compare(store, campaign.expected)
    expected = campaign.expected
    lines: dict[str, object] = {
        "seconds": round(time.monotonic() - started),
        "nights": len(expected.nights),
        "cancelled": sum(status == "cancelled" for status in expected.nights.values()),
        "trials": len(expected.trials),
        "changes by hand": len(expected.by_hand),
        "orphans collected meanwhile": expected.collected,
        "accidents": ", ".join(f"{count} {what}" for what, count in sorted(expected.accidents.items())),
        "wrong": "\n  ".join(wrong) or "nothing",
    }
    print("\n".join(f"{name}: {value}" for name, value in lines.items()))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
