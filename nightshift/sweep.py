"""A sweep: many runs over some fields of the config, compared with each other while they train.

The study needs no database. What a trial is asked to train is written down before its run starts, in one small
object, `sweeps/<sweep_id>.json`, by compare-and-swap; how the trial went is in the record of its run. From both the
study is built anew whenever something is to be decided. So a sweep that was killed at any instant goes on, with the
same trials, when it is started again under its id, and two that do the same at once do no harm.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nightshift.errors import (
    ConfigError,
    ObjectNotFoundError,
    PreconditionFailedError,
    ResumeMismatchError,
    RunNotFoundError,
    StorageError,
)
from nightshift.recipes import make_config
from nightshift.records import RunRecord, read_record, sealed, unsealed
from nightshift.refs import ModelRef, RunId, TrialResult, parse_run_id
from nightshift.s3 import S3
from nightshift.settings import TrainConfig

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

PREFIX = "sweeps/"
MAX_TRIALS = 1000


class Range(BaseModel):
    """All values of a field from `low` to `high`, both included."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    low: float
    high: float
    log: bool = False
    """Whether each doubling is as likely as the next."""
    step: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low must be less than high")
        if self.log and (self.low <= 0 or self.step):
            raise ValueError("log needs a low above 0, and no step")
        return self


class Trial(BaseModel):
    """What a trial was asked, and what the record of its run cannot say of its end."""

    model_config = ConfigDict(frozen=True)

    run_id: RunId
    overrides: dict[str, Any]
    """The values of the swept fields."""
    ended: Literal["pruned", "failed"] | None = None
    """pruned: it is to be cancelled, or was. failed: its flow run has, whether or not there ever was a record."""
    reason: str = ""


class Sweep(BaseModel):
    """A sweep as it is stored: what was wanted, and the trials so far in the order in which they were asked."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    sweep_id: RunId
    recipe: str
    overrides: dict[str, Any]
    """Of every trial."""
    space: dict[str, list[Any] | Range]
    trials: int | None
    """How many the study asks for; None: each point of the grid, once."""
    seed: int
    startup_trials: int
    warmup_epochs: int
    asked: list[Trial] = Field(default_factory=list)

    @property
    def size(self) -> int:
        """How many trials there will be."""
        return self.trials or math.prod(len(values) for values in self.space.values() if isinstance(values, list))

    def changed(self, **fields: Any) -> Self:
        return self.model_copy(update=fields)

    def config(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """A trial's config; raises ConfigError."""
        return make_config(self.recipe, {**self.overrides, **overrides})


def plan(
    sweep_id: str,
    recipe: str,
    space: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    trials: int | None = None,
    seed: int = 0,
    startup_trials: int = 4,
    warmup_epochs: int = 2,
) -> Sweep:
    """A sweep of which no trial was asked yet, after everything it can ask was found valid.

    Args:
        space: each field's values, as a list, or as {"low":, "high":, "log":, "step":}.
        overrides: of every trial.
        trials: how many trials a TPE study asks for; None: the grid of all lists.
        seed: of the study. That of the trainings is a field of the config.
        startup_trials: so many must have finished before any is pruned; no fewer than `trials`: none ever is.
        warmup_epochs: so many epochs each has before it may be pruned.

    Raises:
        ConfigError: naming the field that is not valid, or what is missing.
    """
    config = make_config(recipe, overrides)
    # As the config has them: text from the command line and a number of a form's are the same.
    fixed = {name: getattr(config, name) for name in overrides or {}}
    if not space:
        raise ConfigError("nothing is swept: name a field and its values, such as --over lr=0.05,0.1")
    if twice := sorted(fixed.keys() & space.keys()):
        raise ConfigError(f"{', '.join(twice)}: swept and fixed at once. Take it out of one of the two")
    checked = {name: _checked(recipe, fixed, name, wanted) for name, wanted in space.items()}
    ranges = [name for name, wanted in checked.items() if isinstance(wanted, Range)]
    if trials is None and ranges:
        raise ConfigError(f"{', '.join(ranges)}: a range has no end of values. Say how many trials (--trials)")
    if trials is not None and trials < 1:
        raise ConfigError(f"trials={trials} is not valid: at least one")
    sweep = Sweep(
        sweep_id=parse_run_id(sweep_id),
        recipe=recipe,
        overrides=fixed,
        space=checked,
        trials=trials,
        seed=seed,
        startup_trials=startup_trials,
        warmup_epochs=warmup_epochs,
    )
    if sweep.size > MAX_TRIALS:
        raise ConfigError(f"{sweep.size:,} trials are too many: at most {MAX_TRIALS:,}. Say how many (--trials)")
    parse_run_id(_run_id(sweep, sweep.size - 1))
    if trials is None:
        for point in grid(sweep):
            sweep.config(point)
    return sweep


def grid(sweep: Sweep) -> list[dict[str, Any]]:
    """Every combination of the lists; the field named last changes fastest."""
    values = [wanted for wanted in sweep.space.values() if isinstance(wanted, list)]
    return [dict(zip(sweep.space, point, strict=True)) for point in itertools.product(*values)]


def begin(store: S3, planned: Sweep) -> Sweep:
    """The stored sweep of this id, or the planned one, stored.

    Raises:
        ResumeMismatchError: the stored one wants something else; the message lists what.
        StorageError: it cannot be read or written.
    """
    stored = _change(store, planned.sweep_id, lambda found: found or planned)
    ours, theirs = planned.model_dump(exclude={"asked"}), stored.model_dump(exclude={"asked"})
    differing = [
        f"  {name}: stored {theirs[name]!r}, now {ours[name]!r}" for name in ours if ours[name] != theirs[name]
    ]
    if differing:
        raise ResumeMismatchError(
            f"sweep {planned.sweep_id} was begun otherwise:\n" + "\n".join(differing) + "\n"
            "Start it again as it was begun, or choose another sweep id."
        )
    return stored


def ask(store: S3, sweep: Sweep, records: Mapping[str, RunRecord]) -> Sweep:
    """The sweep with one trial more, which is written down: whoever asks for that one gets the same.

    Args:
        records: of the runs of the trials so far, by run id, as far as there are any.

    Raises:
        StorageError: it may or may not have been written; asking again finds out.
    """
    number = len(sweep.asked)
    overrides = grid(sweep)[number] if sweep.trials is None else _suggest(sweep, records)
    sweep.config(overrides)
    trial = Trial(run_id=_run_id(sweep, number), overrides=overrides)

    def append(found: Sweep | None) -> Sweep:
        found = found or sweep
        return found if len(found.asked) > number else found.changed(asked=[*found.asked, trial])

    return _change(store, sweep.sweep_id, append)


def end(store: S3, sweep: Sweep, run_id: str, ended: Literal["pruned", "failed"], reason: str) -> Sweep:
    """The sweep in which it is written down how a trial is to end, or ended, unless that was done before."""

    def note(found: Sweep | None) -> Sweep:
        found = found or sweep
        noted = {"ended": ended, "reason": reason}
        asked = [
            trial.model_copy(update=noted) if trial.run_id == run_id and not trial.ended else trial
            for trial in found.asked
        ]
        return found.changed(asked=asked)

    return _change(store, sweep.sweep_id, note)


def bad_trials(sweep: Sweep, records: Mapping[str, RunRecord]) -> dict[str, str]:
    """The runs that are to be stopped early, by Optuna's median rule, each with the reason.

    A trial is bad if its best training accuracy so far is below the median that the finished ones had after as many
    epochs. Accuracy and not loss: with another label smoothing, another loss is as good.
    """
    training = [
        (number, record)
        for number, trial in enumerate(sweep.asked)
        if (record := records.get(trial.run_id))
        # In its last epoch it is as good as done.
        if record.status == "running" and not trial.ended and 0 < len(record.curve) < record.config["epochs"]
    ]
    if not training or sum(record.status == "finished" for record in records.values()) < sweep.startup_trials:
        return {}
    study = _study(sweep, records)
    return {
        record.run_id: f"after epoch {record.curve[-1]['epoch']:.0f} its training accuracy, "
        f"{record.curve[-1]['accuracy']:.1%}, was below the median of the finished trials"
        for number, record in training
        if study.pruner.prune(study, study.trials[number])
    }


def result(trial: Trial, record: RunRecord | None) -> TrialResult | None:
    """How a trial ended, or None if it is not over. What its record says of a finished run counts more than a note."""
    status, reason = record.status if record else "running", ""
    if status == "finished":
        ended: Literal["finished", "pruned", "cancelled", "failed"] = "finished"
    elif status == "cancelled":
        ended, reason = ("pruned", trial.reason) if trial.ended == "pruned" else ("cancelled", "by a user")
    elif status == "failed" and record:
        ended, reason = "failed", record.events[-1].detail
    elif trial.ended == "failed":
        ended, reason = "failed", trial.reason
    else:
        return None
    return TrialResult(
        run_id=trial.run_id,
        overrides=trial.overrides,
        status=ended,
        test_accuracy=record.test_accuracy if record else None,
        train_seconds=record.train_seconds if record else 0.0,
        reason=reason,
    )


def results(sweep: Sweep, records: Mapping[str, RunRecord]) -> list[TrialResult]:
    """Of the trials that are over, in the order in which they were asked."""
    return [found for trial in sweep.asked if (found := result(trial, records.get(trial.run_id)))]


def best_model(found: Sequence[TrialResult], records: Mapping[str, RunRecord]) -> ModelRef | None:
    """The published version with the highest test accuracy, of equal ones the first; None if no trial finished."""
    finished = [record for trial in found if (record := records.get(trial.run_id)) and record.result]
    if not finished:
        return None
    record = max(finished, key=lambda record: record.test_accuracy or 0.0)
    assert record.result
    return ModelRef(
        name=record.dataset.name,
        version=record.run_id,
        run_id=record.run_id,
        key=record.result.model,
        test_accuracy=record.result.test_accuracy,
        weights_sha256=record.result.weights_sha256,
    )


def read_trial(store: S3, trial: Trial) -> RunRecord | None:
    """The record of a trial's run, or None if there is none yet; raises StorageError."""
    with suppress(RunNotFoundError):
        return read_record(store, trial.run_id)[0]
    return None


def _run_id(sweep: Sweep, number: int) -> str:
    return f"{sweep.sweep_id}-{number + 1:0{max(2, len(str(sweep.size)))}}"


def _checked(recipe: str, fixed: Mapping[str, Any], name: str, wanted: Any) -> list[Any] | Range:
    """A field's values, as the config has them: text from the command line has become a number."""

    def valid(value: Any) -> Any:
        return getattr(make_config(recipe, {**fixed, name: value}), name)

    if isinstance(wanted, Mapping):
        try:
            span = Range.model_validate(wanted)
        except ValidationError as error:
            problems = (
                ".".join([name, *map(str, detail["loc"])]) + ": " + detail["msg"].removeprefix("Value error, ")
                for detail in error.errors()
            )
            raise ConfigError("; ".join(problems)) from None
        for bound in (wanted["low"], wanted["high"]):
            valid(bound)
        return span
    if not isinstance(wanted, list) or not wanted:
        raise ConfigError(f"{name}={wanted!r} is not valid: a list of values, or a range with low and high")
    values = [valid(value) for value in wanted]
    if len(set(values)) < len(values):
        raise ConfigError(f"{name}={wanted!r} is not valid: a value is named twice")
    return values


def _change(store: S3, sweep_id: str, change: Callable[[Sweep | None], Sweep]) -> Sweep:
    """Store what `change` makes of the sweep as it stands; `change` may be applied again without harm."""
    key = f"{PREFIX}{parse_run_id(sweep_id)}.json"
    while True:
        found: Sweep | None = None
        condition: dict[str, Any] = {"if_absent": True}
        with suppress(ObjectNotFoundError):
            body, etag = store.get(key)
            found, condition = _parsed(store.url(key), body), {"if_match": etag}
        changed = change(found)
        if changed == found:
            return changed
        with suppress(PreconditionFailedError):  # somebody else has, or we have, and the answer was lost
            store.put(key, sealed(changed.model_dump(mode="json")), **condition)
            return changed


def _parsed(url: str, body: bytes) -> Sweep:
    try:
        return Sweep.model_validate(unsealed(body))
    except (ValueError, AttributeError) as error:  # of which ValidationError and JSONDecodeError are kinds
        raise StorageError(
            f"{url} is damaged, or not of this version of nightshift: {error}. Bring an older version of the object "
            "back if the bucket keeps them, or start the sweep under another id"
        ) from error


def _suggest(sweep: Sweep, records: Mapping[str, RunRecord]) -> dict[str, Any]:
    study = _study(sweep, records)
    return dict(study.ask(_distributions(sweep)).params)


def _study(sweep: Sweep, records: Mapping[str, RunRecord]) -> "Study":
    """The study as it stands: what it asks next depends on the seed, the number of trials and how they went."""
    import optuna  # here, because it costs every start most of a second

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # A generator for each trial: one that was made anew with the seed alone would draw the same again.
    digest = hashlib.sha256(f"{sweep.seed}/{len(sweep.asked)}".encode()).digest()
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4])),
        pruner=optuna.pruners.MedianPruner(sweep.startup_trials, sweep.warmup_epochs),
    )
    distributions = _distributions(sweep)
    for trial in sweep.asked:
        study.add_trial(_frozen(trial, records.get(trial.run_id), distributions))
    return study


def _frozen(trial: Trial, record: RunRecord | None, distributions: dict[str, "BaseDistribution"]) -> "FrozenTrial":
    """A trial as Optuna knows it: its value is the test accuracy, on the way to it the training accuracy."""
    from optuna.trial import TrialState, create_trial

    states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    ended = result(trial, record)
    return create_trial(
        state=states.get(ended.status, TrialState.FAIL) if ended else TrialState.RUNNING,
        value=record.test_accuracy if record else None,
        params=trial.overrides,
        distributions=distributions,
        intermediate_values={int(point["epoch"]): point["accuracy"] for point in record.curve} if record else {},
    )


def _distributions(sweep: Sweep) -> dict[str, "BaseDistribution"]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    def distribution(name: str, wanted: list[Any] | Range) -> "BaseDistribution":
        if isinstance(wanted, list):
            return CategoricalDistribution(wanted)
        annotation = TrainConfig.model_fields[name].annotation
        if float in (annotation, *get_args(annotation)):
            return FloatDistribution(wanted.low, wanted.high, log=wanted.log, step=wanted.step)
        return IntDistribution(int(wanted.low), int(wanted.high), log=wanted.log, step=int(wanted.step or 1))

    return {name: distribution(name, wanted) for name, wanted in sweep.space.items()}
