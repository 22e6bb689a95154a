"""The study behind a sweep: which trial to ask for next, and which of those that train to stop early."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nightshift.errors import ConfigError
from nightshift.records.curve import is_enough
from nightshift.records.run import RunRecord
from nightshift.storage.store import Store
from nightshift.sweeps.space import distributions, grid
from nightshift.sweeps.stored import Sweep, Trial, change_sweep, goodness, result, trial_run_id

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


def bad_trials(sweep: Sweep, records: Mapping[str, RunRecord]) -> dict[str, str]:
    """The run ids of the trials to stop early, by Optuna's median rule, each with the reason.

    A trial is bad if its best accuracy so far is below the median of the finished trials after as many epochs. The
    accuracy is that on the validation images if trials look at them, otherwise that on the training images. The loss
    does not count: with another label smoothing, another loss is just as good.
    """
    training = [
        (number, record)
        for number, trial in enumerate(sweep.asked)
        if (record := records.get(trial.run_id))
        # A trial in its last epoch is as good as done, and so is one that stops by itself.
        if record.status == "running"
        and not trial.ended
        and 0 < len(record.curve) < record.train_config().schedule.epochs
        and not is_enough(record.curve, record.train_config().evaluation)
    ]
    if not training or sum(record.status == "finished" for record in records.values()) < sweep.startup_trials:
        return {}
    study = _study(sweep, records)
    return {
        record.run_id: f"after epoch {max(seen)} its {'validation' if sweep.validated else 'training'} accuracy, "
        f"{seen[max(seen)]:.1%}, was below the median of the finished trials"
        for number, record in training
        if (seen := _seen(sweep, record)) and study.pruner.prune(study, study.trials[number])
    }


def _suggest(sweep: Sweep, records: Mapping[str, RunRecord]) -> dict[str, Any]:
    study = _study(sweep, records)
    return dict(study.ask(distributions(sweep.space)).params)


def _study(sweep: Sweep, records: Mapping[str, RunRecord]) -> "Study":
    """The study as it stands. What it asks next depends on the seed, the number of trials and how they went."""
    import optuna  # here, because it costs every start most of a second

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # Each trial has a generator of its own: one made anew with the seed alone would draw the same again.
    digest = hashlib.sha256(f"{sweep.seed}/{len(sweep.asked)}".encode()).digest()
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=int.from_bytes(digest[:4])),
        pruner=optuna.pruners.MedianPruner(sweep.startup_trials, sweep.warmup_epochs),
    )
    of_space = distributions(sweep.space)
    for trial in sweep.asked:
        try:
            study.add_trial(_frozen(sweep, trial, records.get(trial.run_id), of_space))
        except ValueError as error:
            raise ConfigError(f"trial {trial.run_id} does not fit sweep {sweep.sweep_id}: {error}") from None
    return study


def _frozen(
    sweep: Sweep, trial: Trial, record: RunRecord | None, distributions: dict[str, "BaseDistribution"]
) -> "FrozenTrial":
    """A trial in Optuna's form: its value says how good it is, and intermediate values how good it was so far."""
    from optuna.trial import TrialState, create_trial

    states = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    ended = result(trial, record)
    return create_trial(
        state=states.get(ended.status, TrialState.FAIL) if ended else TrialState.RUNNING,
        value=goodness(record) if record and record.result else None,
        params=trial.overrides,
        distributions=distributions,
        intermediate_values=_seen(sweep, record) if record else {},
    )


def _seen(sweep: Sweep, record: RunRecord) -> dict[int, float]:
    """How good a trial was after the epochs after which that is known."""
    if not sweep.validated:
        return {point.epoch: point.accuracy for point in record.curve}
    return {point.epoch: seen for point in record.curve if (seen := point.validation_accuracy) is not None}


def ask(store: Store, sweep: Sweep, records: Mapping[str, RunRecord]) -> Sweep:
    """Ask for one trial more and write it down; return the sweep with it. Whoever asks at the same time gets the same.

    Args:
        records: those of the trials' runs that exist so far, by run id.

    Raises:
        StorageError: it may or may not have been written; asking again finds out.
    """
    number = len(sweep.asked)
    overrides = grid(sweep.space)[number] if sweep.trials is None else _suggest(sweep, records)
    sweep.config(overrides)
    trial = Trial(run_id=trial_run_id(sweep, number), overrides=overrides)

    def append(found: Sweep | None) -> Sweep:
        found = found or sweep
        return found if len(found.asked) > number else found.changed(asked=[*found.asked, trial])

    return change_sweep(store, sweep.sweep_id, append)
