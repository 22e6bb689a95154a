"""When training has to end so that the verdict comes in time: by a time of day, or within hours or a price.

How long testing, publication, gate and report will take is known from former nights of the same network and data set;
on the first one it is estimated from the training itself. How long steps take is seen in this run. Nobody knows either
for certain: so some time is to spare, and a verdict can still be late.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from nightshift import progress
from nightshift.config.train import TrainConfig
from nightshift.data.batches import Plan
from nightshift.errors import NoTimeError
from nightshift.records.lease import Run
from nightshift.records.run import newest_records
from nightshift.records.times import Due, Past, due, past_of

_SPARE = 10.0
_FIRST_NIGHT = 60.0
"""Seconds for publication, gate and report, where no night has shown how long they take."""
_LOOKS = {"off": 1, "flip": 2, "crops": 6}
"""How often each test image passes the network, by `evaluation.tta`."""
_STEPS, _SECONDS = 10, 2.0
"""So many steps and seconds have to be seen before the time of a step is known."""
_DOUBT = 0.5
"""An epoch may take this share of what it seems to take: on a machine that has other work, first steps tell little."""


@dataclass
class Clock:
    """The clock of a run with a budget. Only rank 0 has one."""

    run: Run
    config: TrainConfig
    plan: Plan
    due: Due
    past: Past
    test_images: int
    begun_with: int
    """The step that the training begins with or goes on from."""
    seconds: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._first: tuple[int, float] | None = None
        self._last = self._longest = 0.0
        self._step_seconds = self._save_seconds = 0.0
        self._is_checked = self.begun_with > 0  # what there is already goes to the gate
        if not self._is_checked:
            self._check_an_epoch(0, self.past.step or 0.0)
        progress.current().say(self._when)

    def reason(self, step: int, save_seconds: float = 0.0) -> str | None:
        """Why the training has to end with this step, the last one done; None if another can be done.

        Args:
            save_seconds: how long the longest save has taken.

        Raises:
            NoTimeError: the first epoch will not be done in time. Looked at once, as soon as that can be known.
        """
        self._notice(step)
        self._save_seconds = save_seconds
        is_up = self._left() <= self.reserve + self._longest
        if not self._is_checked and (is_up or self._step_seconds):
            self._is_checked = True
            if step < self.plan.steps_per_epoch:
                self._check_an_epoch(step, self._step_seconds, is_up)
        if not is_up:
            return None
        return (
            f"after step {step:,} of {self.plan.total_steps:,}: {self._when}. Where the clock decides, a training is "
            "not reproducible"
        )

    @property
    def reserve(self) -> float:
        """How many seconds are kept for all that comes after the last step."""
        if self.past.judging:  # one night may have been a quick one, and had no champion to test
            longest = max(self.past.judging) * (2 if len(self.past.judging) == 1 else 1.25)
            # The night's last save may have to wait for the one before.
            return _SPARE + longest + 2 * self._save_seconds
        # Candidate and champion are tested. A network predicts faster than it trains, and one process does it.
        ranks = int(self.run.record.environment["world_size"])
        images = 2 * _LOOKS[self.config.evaluation.tta] * self.test_images
        return _FIRST_NIGHT + images / self.plan.batch_size * self._step_seconds * ranks + 4 * self._save_seconds

    @property
    def _when(self) -> str:
        nights = len(self.past.judging)
        known = (
            f"by {nights} former night{'s' * (nights > 1)}" if nights else "as no former night says how long it takes"
        )
        return (
            f"the verdict is due by {self.due.at:%Y-%m-%d %H:%M:%S} UTC ({self.due.why}), and about "
            f"{self.reserve:,.0f} s are kept for it, {known}"
        )

    def _left(self) -> float:
        return (self.due.at - self.run.store.now()).total_seconds()

    def _notice(self, step: int) -> None:
        """Note when a step was done. The first one is no measure: a network is compiled then."""
        now = self.seconds()
        if self._first:
            self._longest = max(self._longest, now - self._last)
            steps, seconds = step - self._first[0], now - self._first[1]
            if steps >= _STEPS and seconds >= _SECONDS:
                self._step_seconds = seconds / steps
        elif step > self.begun_with:
            self._first = step, now
        self._last = now

    def _check_an_epoch(self, step: int, step_seconds: float, is_up: bool = False) -> None:
        """Raise NoTimeError if there is no doubt that the first epoch will not be done in time."""
        epoch, left = self.plan.steps_per_epoch, self._left()
        if not is_up and left >= self.reserve + (epoch - step) * step_seconds * _DOUBT:
            return
        takes = f" An epoch takes about {epoch * step_seconds:,.0f} s." if step_seconds else ""
        field = self.due.why.removeprefix("budget.").partition("=")[0]
        raise NoTimeError(
            f"there is no time for a single epoch: {self._when}. {max(left, 0):,.0f} s are left.{takes} Nothing was "
            f"published. To train it all the same: nightshift resume {self.run.run_id} --set {field}=none"
        )


def clock_of(
    run: Run, config: TrainConfig, plan: Plan, test_images: int, price_per_hour: float | None, step: int
) -> Clock | None:
    """The clock of a run that begins with this step or goes on from it; None if its config has no budget.

    Raises:
        ConfigError: the budget is one of money, and nobody has said what an hour costs.
        NoTimeError: there is no time for a single epoch.
        StorageError: the records of former nights cannot be read.
    """
    found = due(run.record, config.budget, price_per_hour, run.store.now())
    if not found:
        return None
    return Clock(run, config, plan, found, past_of(newest_records(run.store), run.record), test_images, step)
