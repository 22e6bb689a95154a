"""What the records say of time: when a run's verdict is due, what it costs, and how long nights like it took."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from statistics import median
from typing import Any

from nightshift.config.sections import BudgetConfig
from nightshift.records.run import RunRecord

_LOOKED_AT = 200
_NIGHTS = 5
_OF_NO_WEIGHT = ("seed", "data.dataset", "data.max_train_images", "start.", "schedule.", "evaluation.")
"""The decisive fields that change no step's time."""
_MACHINE = ("device", "world_size", "threads", "precision", "compile")


@dataclass(frozen=True)
class Due:
    """When the verdict has to be there, and which field says so."""

    at: datetime
    why: str


def due(record: RunRecord, budget: BudgetConfig, price_per_hour: float | None, now: datetime) -> Due | None:
    """When a run's verdict is due by its budget, the earliest of what the budget says; None if that is nothing.

    Raises:
        ConfigError: as `BudgetConfig.hours`.
    """
    used = machine_seconds(record, now)
    found = [
        Due(now + timedelta(hours=hours) - timedelta(seconds=used), why)
        for why, hours in budget.hours(price_per_hour).items()
    ]
    if moment := budget.begun_at(record.created_at).finish_at:
        found.append(Due(moment, f"budget.finish_by={budget.finish_by}"))
    return min(found, key=lambda one: one.at, default=None)


def cost(record: RunRecord, price_per_hour: float | None) -> float | None:
    """What the machine of a run costs, from the begin of each attempt; None without a price.

    An older nightshift has noted no attempts: there it is the training alone.
    """
    if price_per_hour is None:
        return None
    seconds = machine_seconds(record) if record.attempts else record.train_seconds
    return price_per_hour * seconds / 3600


def machine_seconds(record: RunRecord, now: datetime | None = None) -> float:
    """For how many seconds a run has had a machine; pauses between attempts do not count.

    Args:
        now: of one that is being trained; None: up to when it was last heard of.
    """
    seconds, heard = 0.0, None
    for number, attempt in enumerate(record.attempts, 1):
        began = attempt.began_at
        if began is None or began > attempt.held_at or (heard and began < heard):
            began = attempt.held_at
        heard = now if now and number == len(record.attempts) else attempt.heard_at
        seconds += max((heard - began).total_seconds(), 0.0)
    return seconds


def judging_seconds(record: RunRecord) -> float | None:
    """Seconds from a finished run's last save to its verdict; None if it was started again then."""
    if record.status != "finished" or not record.checkpoints:
        return None
    ended = next(event.at for event in reversed(record.events) if event.what == "finished")
    if any(event.what == "resumed" and event.step >= record.step for event in record.events):
        return None
    return max((ended - record.checkpoints[-1].written_at).total_seconds(), 0.0)


@dataclass(frozen=True)
class Past:
    """How long it took on the last nights of the same network and data set, on the same kind of machine."""

    judging: tuple[float, ...] = ()
    """Seconds from the last save to the verdict, of up to five nights."""
    step: float | None = None
    """Seconds of a step, the median of these nights; None if none was trained as tonight's run is."""


def past_of(records: Iterable[RunRecord], ours: RunRecord) -> Past:
    """What the records of other runs, newest first, say of a run that is about to train."""
    alike = (record for record in islice(records, _LOOKED_AT) if _is_alike(record, ours))
    nights = list(islice(alike, _NIGHTS))
    steps = [
        night.train_seconds / night.step for night in nights if night.step and _of_a_step(night) == _of_a_step(ours)
    ]
    judging = tuple(seconds for night in nights if (seconds := judging_seconds(night)) is not None)
    return Past(judging, median(steps) if steps else None)


def _is_alike(record: RunRecord, ours: RunRecord) -> bool:
    return (
        (record.status, record.dataset.name, record.origin.promote)
        == ("finished", ours.dataset.name, ours.origin.promote)
        and record.run_id != ours.run_id
        and record.environment.get("device") == ours.environment.get("device")
        and record.train_config().model == ours.train_config().model
    )


def _of_a_step(record: RunRecord) -> list[Any]:
    """All that a step's time may depend on."""
    fields = record.train_config().decisive().items()
    decisive = [(name, value) for name, value in fields if not name.startswith(_OF_NO_WEIGHT)]
    return [record.dataset.image_size, *(record.environment.get(name) for name in _MACHINE), *decisive]
