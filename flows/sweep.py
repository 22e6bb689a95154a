"""The flow `sweep`: train many configs, each as a run of its own, and let the best go live if it is better."""

import logging
import time
from dataclasses import dataclass, field
from typing import Annotated, Any
from uuid import UUID

import httpx
from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Completed, Failed
from pydantic import Field

from flows.nights import this_start
from flows.recover import CANCELLED, is_being_cancelled, newest_flow_run, server_fails, start_again_if_lost
from flows.verdicts import handle_rejection, verdict_message
from nightshift import progress
from nightshift.config.project import load_project
from nightshift.errors import DeploymentNotFoundError, RecoveryLimitError, StorageError
from nightshift.ids import durable_run_id
from nightshift.records import recovery
from nightshift.records.run import RunRecord
from nightshift.refs import ModelRef, SweepResult, TrialResult
from nightshift.settings import Settings
from nightshift.storage.store import Store
from nightshift.sweeps.stored import Sweep, Trial, begin, best_model, end, plan, read_trial, result, results
from nightshift.sweeps.study import ask, bad_trials
from nightshift.text import plain
from nightshift.workspace import open_workspace
from tasks.promote import promote as ask_gate
from tasks.serve import serve
from tasks.tell import tell
from tasks.track import track

_POLL_SECONDS = 2.0
_AT_WORK = {StateType.PENDING, StateType.RUNNING}
_THE_END = {StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED}

# As in flows.night: Prefect passes the logger on, but leaves its level at WARNING.
logging.getLogger("nightshift").setLevel(logging.INFO)

AtLeastOne = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]


def _sweep_id(sweep_id: str | None) -> str:
    return durable_run_id(sweep_id, "sweep", this_start(), str(flow_run.get_id()))


def _flow_run_name() -> str:
    parameters = flow_run.get_parameters()
    return f"{_sweep_id(parameters['sweep_id'])} ({parameters['recipe']})"


@flow(name="sweep", flow_run_name=_flow_run_name, persist_result=True, result_serializer="json")
def sweep(
    space: dict[str, Any],
    recipe: str = "quick",
    overrides: dict[str, Any] | None = None,
    sweep_id: str | None = None,
    trials: AtLeastOne | None = None,
    parallel: AtLeastOne = 2,
    seed: NotNegative = 0,
    startup_trials: AtLeastOne = 4,
    warmup_epochs: NotNegative = 2,
    deployment: str | None = None,
    promote: bool = True,
) -> State[SweepResult]:
    """Train many configs, each as a run of its own, stop the bad ones early, and send the best to the gate.

    A sweep that is started again under the same sweep id goes on where it stopped, with the same trials and images. So
    a cancelled sweep is only halted: no further trial starts, and those that train go on. The best is chosen on the
    validation images. CIFAR-10 has none, and there it is chosen on the test images: among equally good trials it is the
    luckiest, so its test accuracy is optimistic, more so with more trials, and the gate does not correct for that.

    Args:
        space: Fields of the config, each with a list of values or a range, such as {"lr": {"low": 0.01, "high": 0.2,
            "log": true}, "momentum": [0.6, 0.9]}.
        recipe: The named config to start from.
        overrides: Fields of the config to replace in every trial.
        sweep_id: Durable name of the sweep, in which {date} stands for the day it is scheduled for; its trials are
            named after it. None: a name is made.
        trials: How many trials a study (TPE) asks for, each chosen from the results so far. None: the grid of all
            lists.
        parallel: How many trials train at once. A study learns more with fewer.
        seed: The study's seed. The seed of the runs is a field of the config.
        startup_trials: How many trials must have finished before one is stopped early. With as many as there are
            trials, none is.
        warmup_epochs: How many epochs a trial trains before it may be stopped.
        deployment: What trains a trial, as FLOW/DEPLOYMENT. None: train-cifar/adhoc, or, for images of your own, the
            deployment of the flow retrain that has the recipe.
        promote: Let the best go live if it is better.
    """
    settings = Settings.load()
    project = load_project(settings.project)
    planned = plan(_sweep_id(sweep_id), recipe, space, overrides, trials, seed, startup_trials, warmup_epochs, project)
    if flow_run.get_run_count() > 1 + settings.max_recoveries:
        raise RecoveryLimitError(
            f"sweep {planned.sweep_id} was started again {settings.max_recoveries} times and is given up "
            "(NIGHTSHIFT_MAX_RECOVERIES). Start it again under this sweep id to go on with it all the same"
        )
    with open_workspace(settings) as workspace, get_client(sync_client=True) as client:
        study = begin(workspace.store, planned)
        runs = _Runs(client, workspace.store, _read_deployment(client, deployment or _trainer(client, study)))
        try:
            done = runs.train_all(study, parallel)
            ended = results(done, runs.records)
            create_table_artifact(table(ended), key="sweep", description=f"Sweep {done.sweep_id}")
            best = best_model(ended, runs.records)
            verdict = ask_gate(workspace, best, settings.gate) if best and promote else None
            if best and verdict and verdict.promoted and runs.records[best.run_id].train_config().publish.triton:
                serve(workspace, best.name)
            if settings.mlflow.tracking_uri:
                track(workspace)
            if best and verdict and settings.hook:
                tell(workspace, best, verdict, settings.hook)
        except TerminationSignal:
            if not is_being_cancelled():
                raise
            return Cancelled(message="Cancelled: no further trial is started, and those that train go on.")
    if not best:
        return Failed(message=f"None of {len(ended)} trials has finished: {ended[-1].reason}")
    sentence = f"{best.run_id} is the best of {len(ended)} trials: {_accuracy(best, ended)}"
    if verdict:
        handle_rejection(best.run_id, verdict, settings.gate.fail_when_rejected)
        sentence += f". {verdict_message(best.run_id, verdict)}"
    return Completed(
        message=sentence, data=SweepResult(sweep_id=done.sweep_id, trials=ended, best=best, verdict=verdict)
    )


def _accuracy(best: ModelRef, trials: list[TrialResult]) -> str:
    """That by which the best trial was chosen."""
    (validated,) = [trial.validation_accuracy for trial in trials if trial.run_id == best.run_id]
    return f"{best.test_accuracy:.2%}" if validated is None else f"{validated:.2%} of the validation images"


def table(results: list[TrialResult]) -> list[dict[str, Any]]:
    """A row per trial."""
    is_validated = any(trial.validation_accuracy is not None for trial in results)
    return [
        {
            "run": trial.run_id,
            "overrides": "  ".join(f"{name}={value}" for name, value in trial.overrides.items()),
            "status": trial.status,
            **({"validation accuracy": trial.validation_accuracy} if is_validated else {}),
            "test accuracy": trial.test_accuracy,
            "training seconds": round(trial.train_seconds, 1),
            "reason": plain(trial.reason),
        }
        for trial in results
    ]


def _passes(error: httpx.HTTPError | StorageError) -> bool:
    """Whether an error can pass by itself: a sweep outlives a server or a store that does not answer."""
    return error.transient if isinstance(error, StorageError) else server_fails(error)


def _trainer(client: SyncPrefectClient, study: Sweep) -> str:
    """The deployment that trains a trial, if none is named."""
    if not study.snapshot:
        return "train-cifar/adhoc"
    found = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=["retrain"])))
    names = sorted(trainer.name for trainer in found if trainer.parameters.get("recipe") == study.recipe)
    return f"retrain/{names[0] if names else study.recipe}"


def _read_deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    try:
        return client.read_deployment_by_name(name)
    except (ObjectNotFound, ValueError):
        raise DeploymentNotFoundError(
            f"there is no deployment {name!r} to train the trials. `nightshift deploy` makes those of nightshift, "
            "and for images of your own those of nightshift.toml ([deployments.NAME])"
        ) from None


@dataclass
class _Runs:
    """The runs of the trials: their records, and the flow runs that train them."""

    client: SyncPrefectClient
    store: Store
    trainer: DeploymentResponse
    records: dict[str, RunRecord] = field(default_factory=dict)
    _started: dict[str, UUID] = field(default_factory=dict)

    def train_all(self, study: Sweep, parallel: int) -> Sweep:
        """Start trials, `parallel` at a time, until all are over."""
        is_reachable = True
        while True:
            try:
                study = self._look_after(study)
                # Another flow run of this sweep may ask at the same time: each answer has all that were asked.
                while len(self._open(study)) < parallel and len(study.asked) < study.size:
                    study = ask(self.store, study, self.records)
                    self._flow_run(study, study.asked[-1])
                if not self._open(study):
                    return study
                is_reachable = True
            except (httpx.HTTPError, StorageError) as error:
                if not _passes(error):
                    raise
                if is_reachable:
                    progress.current().warn(f"the trials cannot be watched, but go on by themselves: {error}")
                is_reachable = False
            time.sleep(_POLL_SECONDS)

    def _look_after(self, study: Sweep) -> Sweep:
        """Read how the trials are, start those that were asked for and never started, and stop the bad ones."""
        flow_runs = {}
        for trial in self._open(study):
            if not self._is_over(trial):
                flow_runs[trial.run_id] = found = self._flow_run(study, trial)
                # Read again: the trial may have ended between the two reads.
                if found.state_type in _THE_END and not self._is_over(trial):
                    study = self._note_failure(study, trial, found)
                if not trial.ended:
                    start_again_if_lost(self.client, found)
        for run_id, reason in bad_trials(study, self.records).items():
            progress.current().say(f"trial {run_id} is stopped: {reason}")
            study = end(self.store, study, run_id, "pruned", reason)
        for trial in self._open(study):
            if trial.ended == "pruned" and (found := flow_runs[trial.run_id]).state_type not in CANCELLED:
                # An unexecuted flow run never reports its own cancellation.
                state: State[Any] = Cancelling() if found.state_type in _AT_WORK else Cancelled()
                self.client.set_flow_run_state(found.id, state)
        return study

    def _open(self, study: Sweep) -> list[Trial]:
        """The trials that were not over when their records were last read."""
        return [trial for trial in study.asked if not result(trial, self.records.get(trial.run_id))]

    def _is_over(self, trial: Trial) -> bool:
        record = read_trial(self.store, trial)
        if record:
            self.records[trial.run_id] = record
        return result(trial, record) is not None

    def _flow_run(self, study: Sweep, trial: Trial) -> FlowRun:
        """The flow run that trains a trial: the first, started here if it never was, or a recovery's since."""
        if trial.run_id not in self._started:
            progress.current().say(f"trial {trial.run_id}: {trial.overrides}")
            started = self.client.create_flow_run_from_deployment(
                self.trainer.id,
                parameters={
                    "recipe": study.recipe,
                    "overrides": study.fields(trial.overrides),
                    "run_id": trial.run_id,
                    "promote": False,
                    **({"snapshot": study.snapshot} if study.snapshot else {}),
                },
                tags=[study.sweep_id],
                # If the sweep was started again, this returns the flow run that exists already.
                idempotency_key=trial.run_id,
            )
            self._started[trial.run_id] = started.id
        found = newest_flow_run(self.client, trial.run_id, str(self._started[trial.run_id]))
        assert found
        return found

    def _note_failure(self, study: Sweep, trial: Trial, found: FlowRun) -> Sweep:
        """Note that a trial has failed if its flow run has ended, and no record says how, or will."""
        assert found.state
        record = self.records.get(trial.run_id)
        if found.state_type == StateType.CANCELLED and record:
            recovery.close(self.store, trial.run_id, "cancelled")  # if it was not being trained, nobody else has
            return study
        if record and record.status == "interrupted":  # it will be recovered
            return study
        reason = found.state.message or str(found.state.name)
        if found.state_type == StateType.COMPLETED:
            reason = f"it is Completed, but not in {self.store.url('')}: its worker has other settings than the sweep's"
        return end(self.store, study, trial.run_id, "failed", reason)
