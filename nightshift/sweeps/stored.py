"""A sweep as it is stored: what it was asked, and the trials so far.

The study needs no database. What a trial is asked to train is written down before its run starts, in the document
`sweeps/<sweep_id>.json`, by compare-and-swap. How the trial went is in the record of its run. The study is built anew
from both whenever something is to be decided. So a sweep that was killed at any instant goes on with the same trials
when it is started again under its id, and two that do the same at once do no harm.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Literal

from pydantic import Field

from nightshift.config.project import Project
from nightshift.config.recipes import get_recipe, make_config, named
from nightshift.config.train import TrainConfig
from nightshift.data.names import checked_config
from nightshift.data.specs import SPECS
from nightshift.errors import ConfigError, ResumeMismatchError, RunNotFoundError, SourceError
from nightshift.ids import RunId, Sha256, parse_run_id
from nightshift.records.curve import kept_of
from nightshift.records.keys import SWEEPS
from nightshift.records.run import RunRecord, read_record
from nightshift.records.snapshots import read_history, read_manifest
from nightshift.refs import ModelRef, TrialResult
from nightshift.storage import documents
from nightshift.storage.documents import Document, Part
from nightshift.storage.store import Store
from nightshift.sweeps.space import Range, Space, checked_values, grid
from nightshift.values import Count, Line, Text

MAX_TRIALS = 1000


class Trial(Part):
    """What a trial was asked to train, and what the record of its run cannot say of its end."""

    run_id: RunId
    overrides: dict[str, Any]
    """The values of the swept fields."""
    ended: Literal["pruned", "failed"] | None = None
    """pruned: it is to be cancelled, or was. failed: its flow run failed, whether or not there ever was a record."""
    reason: Text = ""


class Sweep(Document):
    """What was wanted, and the trials so far in the order in which they were asked."""

    title: ClassVar[str] = "sweep"
    if_damaged: ClassVar[str] = (
        "Bring an older version of the object back if the bucket keeps them, or start the sweep under another id"
    )
    max_bytes: ClassVar[int] = 4 * documents.MIB

    format: Literal[2] = 2
    sweep_id: RunId
    recipe: Line
    base: Line | None = None
    """The recipe of nightshift that `overrides` change, where `recipe` is one of a team's own."""
    overrides: dict[str, Any]
    """The fields that are the same in every trial."""
    snapshot: Sha256 | None = None
    """The images of a team's own data set on which all trials train."""
    validated: bool = False
    """Whether some of these images are for validation. Then every epoch is validated, unless trials say otherwise."""
    space: Space
    trials: Count | None
    """How many the study asks for; None: each point of the grid, once."""
    seed: Count
    startup_trials: Count
    warmup_epochs: Count
    asked: list[Trial] = Field(default_factory=list)

    @property
    def size(self) -> int:
        """How many trials there will be."""
        return self.trials or math.prod(len(values) for values in self.space.values() if isinstance(values, list))

    def check(self, key: str) -> None:
        if key != _key(self.sweep_id):
            raise ValueError(f"it is the sweep {self.sweep_id}, copied from elsewhere")
        if len(self.asked) > min(self.size, MAX_TRIALS):
            raise ValueError("it has more trials than it was to have")
        # Else it would train, prune and cancel runs that are not its own.
        for number, trial in enumerate(self.asked):
            if trial.run_id != trial_run_id(self, number) or trial.overrides.keys() != self.space.keys():
                raise ValueError(f"{trial.run_id} is not its trial {number + 1}")
            self.config(trial.overrides)

    def config(self, overrides: Mapping[str, Any]) -> TrainConfig:
        """A trial's config; raises ConfigError."""
        return make_config(self.base or self.recipe, self.fields(overrides))

    def fields(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """What a trial replaces in the recipe. Of two that mean the same field, the later counts."""
        looks = {"evaluation.validate_every": 1} if self.validated else {}
        return {**looks, **self.overrides, **overrides}


def plan(
    sweep_id: str,
    recipe: str,
    space: Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    trials: int | None = None,
    seed: int = 0,
    startup_trials: int = 4,
    warmup_epochs: int = 2,
    project: Project | None = None,
) -> Sweep:
    """A sweep with no trial asked yet, after everything it can ask was found valid.

    Args:
        space: each field's values, as a list, or as {"low":, "high":, "log":, "step":}.
        overrides: fields that are the same in every trial.
        trials: how many trials a TPE study asks for; None: the grid of all lists.
        seed: of the study. The trainings have a seed of their own in the config.
        startup_trials: how many must have finished before any is pruned. With `trials` or more, none ever is.
        warmup_epochs: how many epochs a trial has before it may be pruned.
        project: what else there are recipes and data sets in.

    Raises:
        ConfigError: naming the field that is not valid, or what is missing.
    """
    config = checked_config(recipe, overrides, project=project)
    # The config's values, so that text from the command line and a number from a form are the same.
    fixed = {name: config.value_of(name) for name in overrides or {}}
    if not space:
        raise ConfigError("nothing is swept: name a field and its values, such as --over lr=0.05,0.1")
    paths = {config.path_of(name) for name in fixed}
    if twice := sorted(name for name in space if config.path_of(name) in paths):
        raise ConfigError(f"{', '.join(twice)}: swept and fixed at once. Take it out of one of the two")
    swept = {config.path_of(name) for name in space}
    if "data.dataset" in swept:
        raise ConfigError("dataset: trials are compared on the same images. Make a sweep of each data set")
    checked = {name: checked_values(recipe, fixed, name, wanted, project) for name, wanted in space.items()}
    ranges = [name for name, wanted in checked.items() if isinstance(wanted, Range)]
    if trials is None and ranges:
        raise ConfigError(f"{', '.join(ranges)}: a range has no end of values. Say how many trials (--trials)")
    if trials is not None and trials < 1:
        raise ConfigError(f"trials={trials} is not valid: at least one")
    base, of_recipe = None, dict[str, Any]()
    if project and recipe in project.recipes:
        # Written down whole: whoever reads the sweep later may have another project file, or none.
        base, of_recipe = named(get_recipe(recipe, project).config)
    sweep = Sweep(
        sweep_id=parse_run_id(sweep_id),
        recipe=recipe,
        base=base,
        overrides={**{name: value for name, value in of_recipe.items() if name not in paths | swept}, **fixed},
        space=checked,
        trials=trials,
        seed=seed,
        startup_trials=startup_trials,
        warmup_epochs=warmup_epochs,
    )
    if sweep.size > MAX_TRIALS:
        raise ConfigError(f"{sweep.size:,} trials are too many: at most {MAX_TRIALS:,}. Say how many (--trials)")
    parse_run_id(trial_run_id(sweep, sweep.size - 1))
    if trials is None:
        for point in grid(sweep.space):
            sweep.config(point)
    return sweep


def begin(store: Store, planned: Sweep) -> Sweep:
    """The stored sweep of this id, or the planned one, stored with the newest images there are of its data set.

    Raises:
        ResumeMismatchError: the stored one wants something else; the message lists what.
        SourceError: no snapshot of its data set is fit to train on.
        StorageError: it cannot be read or written.
    """
    stored = change_sweep(store, planned.sweep_id, lambda found: found or _with_images(store, planned))
    not_wanted = {"asked", "snapshot", "validated"}
    ours, theirs = planned.model_dump(exclude=not_wanted), stored.model_dump(exclude=not_wanted)
    differing = [
        f"  {name}: stored {theirs[name]!r:.500}, now {ours[name]!r}" for name in ours if ours[name] != theirs[name]
    ]
    if differing:
        raise ResumeMismatchError(
            f"sweep {planned.sweep_id} was begun otherwise:\n" + "\n".join(differing) + "\n"
            "Start it again as it was begun, or choose another sweep id."
        )
    return stored


def _with_images(store: Store, sweep: Sweep) -> Sweep:
    name = sweep.config({}).data.dataset
    if name in SPECS:
        return sweep
    newest = read_history(store, name).accepted
    if not newest:
        raise SourceError(
            f"there are no images of {name} to train on in {store.url('')} yet: make a snapshot "
            f"(nightshift data snapshot {name}), or start a first run"
        )
    manifest = read_manifest(store, name, newest.digest)
    return sweep.changed(snapshot=newest.digest, validated=manifest.splits.get("validation", 0) > 0)


def end(store: Store, sweep: Sweep, run_id: str, ended: Literal["pruned", "failed"], reason: str) -> Sweep:
    """Write down how a trial is to end, or ended, unless that was done before; return the sweep with it.

    Raises:
        StorageError: as `change_sweep`.
    """

    def note(found: Sweep | None) -> Sweep:
        found = found or sweep
        noted = {"ended": ended, "reason": reason}
        asked = [
            trial.changed(**noted) if trial.run_id == run_id and not trial.ended else trial for trial in found.asked
        ]
        return found.changed(asked=asked)

    return change_sweep(store, sweep.sweep_id, note)


def result(trial: Trial, record: RunRecord | None) -> TrialResult | None:
    """How a trial ended, or None if it is not over. A record that says `finished` counts more than a note."""
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
        validation_accuracy=_validation_accuracy(record) if record else None,
        train_seconds=record.train_seconds if record else 0.0,
        reason=reason,
    )


def results(sweep: Sweep, records: Mapping[str, RunRecord]) -> list[TrialResult]:
    """How the trials that are over ended, in the order in which they were asked."""
    return [found for trial in sweep.asked if (found := result(trial, records.get(trial.run_id)))]


def best_model(found: Sequence[TrialResult], records: Mapping[str, RunRecord]) -> ModelRef | None:
    """The published version of the best trial, the first of equally good ones; None if no trial finished."""
    finished = [record for trial in found if (record := records.get(trial.run_id)) and record.result]
    if not finished:
        return None
    record = max(finished, key=lambda record: goodness(record) or 0.0)
    assert record.result
    return ModelRef(
        name=record.dataset.name,
        version=record.run_id,
        run_id=record.run_id,
        key=record.result.model,
        test_accuracy=record.result.test_accuracy,
        weights_sha256=record.result.weights_sha256,
    )


def goodness(record: RunRecord) -> float | None:
    """How good a trial is: by the validation images, where it has looked at them, and else by the test images."""
    validated = _validation_accuracy(record)
    return record.test_accuracy if validated is None else validated


def _validation_accuracy(record: RunRecord) -> float | None:
    """The accuracy after the epoch whose weights a run would publish now, or after the last validated epoch."""
    if kept := kept_of(record.curve, record.train_config().evaluation):
        return kept.validation_accuracy
    seen = (point.validation_accuracy for point in reversed(record.curve))
    return next((accuracy for accuracy in seen if accuracy is not None), None)


def read_trial(store: Store, trial: Trial) -> RunRecord | None:
    """The record of a trial's run, or None if there is none yet; raises StorageError."""
    with suppress(RunNotFoundError):
        return read_record(store, trial.run_id)[0]
    return None


def trial_run_id(sweep: Sweep, number: int) -> str:
    """The run id of a trial; `number` counts from 0."""
    return f"{sweep.sweep_id}-{number + 1:0{max(2, len(str(sweep.size)))}}"


def change_sweep(store: Store, sweep_id: str, change: Callable[[Sweep | None], Sweep]) -> Sweep:
    """Store what `change` makes of the sweep as it stands; `change` may be applied again without harm.

    Raises:
        StorageError: the sweep cannot be read or written, is damaged, or is of a newer nightshift.
    """
    return documents.change(store, _key(sweep_id), Sweep, change)


def _key(sweep_id: str) -> str:
    return f"{SWEEPS}{parse_run_id(sweep_id)}.json"
