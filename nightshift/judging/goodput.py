"""Where a night's time went, from schedule to verdict, and which share of it was of use: the goodput.

The parts are those of the record's attempts, and follow each other without a gap. Times are by the store's clock,
with two exceptions: Prefect says when a flow run was to start, and the flow run's machine says when it did. Clocks that
differ move a second or two from one part to its neighbour.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import pairwise

from nightshift.records.run import Attempt, RunRecord
from nightshift.tracking.metrics import CheckpointLine, Line, TrainingLine


@dataclass
class Parts:
    """Seconds, over all attempts of a run."""

    waiting: float = 0.0
    """For a worker, its imports included, and between two attempts."""
    data: float = 0.0
    """From the flow's begin to the lease: download, snapshot, packing, checks."""
    start: float = 0.0
    """From the lease to the first step: the network, the restore, compilation."""
    training: float = 0.0
    """Of the steps that were kept."""
    stalls: float = 0.0
    """Of the training, for checkpoints."""
    replayed: float = 0.0
    """Training that was lost with a process, and done again by the next. Training that a killed process did after it
    last wrote the record counts as waiting: a third of a lease at most."""
    evaluation: float = 0.0
    """From the last step to the verdict: evaluation, publication, gate, report."""


@dataclass(frozen=True)
class Goodput:
    """A night's account."""

    wall: float
    """Seconds from schedule to verdict."""
    parts: Parts
    goodput: float
    """Kept steps times the median time of a step, at most their own time, as a share of `wall`."""
    attempts: int

    @property
    def shares(self) -> dict[str, float]:
        """Of each part, in order; those without any time are left out."""
        return {name: seconds / self.wall for name, seconds in asdict(self.parts).items() if seconds > 0}


def account(record: RunRecord, lines: Sequence[Line]) -> Goodput | None:
    """Where the time of a run went, up to when it was last heard of; None for the record of an older nightshift.

    Args:
        lines: its metrics.
    """
    if not record.attempts:
        return None
    first, parts = record.attempts[0], Parts()
    heard = begin = first.scheduled_at or first.began_at or first.held_at
    for attempt, then in zip(record.attempts, [*record.attempts[1:], None], strict=True):
        kept = (then.from_seconds if then else record.train_seconds) - attempt.from_seconds
        _add(parts, attempt, heard, kept, is_last=not then)
        heard = max(heard, attempt.heard_at)
    stalls = sum(line.stall_seconds for line in lines if isinstance(line, CheckpointLine))
    parts.stalls = min(stalls, parts.training)
    parts.training -= parts.stalls
    wall = max((heard - begin).total_seconds(), 1e-9)
    useful = record.step * _median_step(lines)
    return Goodput(wall, parts, min(useful or parts.training, parts.training) / wall, len(record.attempts))


def _add(parts: Parts, attempt: Attempt, heard: datetime, kept: float, is_last: bool) -> None:
    """Add an attempt's time, from when the one before was last heard of until it was itself."""
    # Each moment no earlier than the one before. A flow run that waited for its store began before the run was lost.
    held = max(attempt.held_at, heard)
    ended = max(attempt.heard_at, held)
    began = min(attempt.began_at, held) if attempt.began_at and attempt.began_at >= heard else held
    trained = min(max(attempt.trained_at or ended, held), ended)
    parts.waiting += (began - heard).total_seconds()
    parts.data += (held - began).total_seconds()
    parts.start += (trained - held).total_seconds()
    span = (ended - trained).total_seconds()
    kept = min(max(kept, 0.0), span)
    parts.training += kept
    if is_last:
        parts.evaluation += span - kept
    else:
        parts.replayed += span - kept


def _median_step(lines: Sequence[Line]) -> float:
    """The median time of a step, in seconds, from the lines about the training; 0 if there are not two.

    Each line counts with its steps: lines come every few seconds, so slow steps have more of them.
    """
    import numpy as np  # here, because the command line imports this file

    training = [line for line in lines if isinstance(line, TrainingLine)]
    steps, seconds = [], []
    for before, after in pairwise(training):
        if after.step > before.step and after.train_seconds > before.train_seconds:
            steps.append(after.step - before.step)
            seconds.append((after.train_seconds - before.train_seconds) / steps[-1])
    return float(np.median(np.repeat(seconds, steps))) if steps else 0.0
