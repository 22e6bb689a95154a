"""What all nights share: their names, their end, and after the training evaluate → publish → promote → report."""

import logging

from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed

from flows.nights import this_start
from flows.recover import is_being_cancelled
from flows.verdicts import handle_rejection, verdict_message
from nightshift.config.train import TrainConfig
from nightshift.errors import RecoveryLimitError
from nightshift.ids import durable_run_id
from nightshift.records import recovery
from nightshift.refs import CheckpointRef, DatasetRef, ModelRef
from nightshift.settings import Settings
from nightshift.workspace import Workspace
from tasks import crashed_because
from tasks.evaluate import evaluate
from tasks.promote import promote as ask_gate
from tasks.publish import publish
from tasks.report import report
from tasks.serve import serve
from tasks.tell import tell
from tasks.track import track

# Prefect passes on the loggers named in PREFECT_LOGGING_EXTRA_LOGGERS, but leaves their level at WARNING.
logging.getLogger("nightshift").setLevel(logging.INFO)


def run_id_of(run_id: str | None, recipe: str) -> str:
    """The id of the run that this flow run trains, however often it is started."""
    return durable_run_id(run_id, deployment.get_name() or recipe, this_start(), str(flow_run.get_id()))


def flow_run_name() -> str:
    parameters = flow_run.get_parameters()
    return f"{run_id_of(parameters['run_id'], parameters['recipe'])} ({parameters['recipe']})"


def check_recoveries(workspace: Workspace, run_id: str, settings: Settings) -> None:
    """Raise RecoveryLimitError if Prefect has started this flow run more often than the settings allow."""
    if flow_run.get_run_count() > 1 + settings.max_recoveries:
        raise RecoveryLimitError(recovery.give_up(workspace.store, run_id, settings.max_recoveries))


def stopped(workspace: Workspace, run_id: str, stop: TerminationSignal) -> State[ModelRef]:
    """The last state of a flow run that was told to stop: Cancelled by the user, or Crashed and to be resumed."""
    if not is_being_cancelled():
        return crashed_because(stop)
    recovery.close(workspace.store, run_id, "cancelled")
    return Cancelled(message=f"Cancelled. What was last saved stands: nightshift resume {run_id}")


def judge(
    workspace: Workspace,
    checkpoint: CheckpointRef,
    config: TrainConfig,
    dataset: DatasetRef,
    promote: bool,
    settings: Settings,
) -> State[ModelRef]:
    """Evaluate what was trained and stored, publish it, and let it go live if it is better."""
    run_id = checkpoint.run_id
    with recovery.closed_if_it_fails(workspace.store, run_id):
        evaluation = evaluate(workspace, checkpoint, dataset)
        model = publish(workspace, checkpoint, dataset, evaluation)
        verdict = ask_gate(workspace, model, settings.gate, checkpoint) if promote else None
        if verdict and verdict.promoted and config.publish.triton:
            serve(workspace, model.name)
        report(workspace, checkpoint, evaluation, model, verdict, settings.price_per_hour)
    if settings.mlflow.tracking_uri:
        track(workspace, run_id)
    if verdict and settings.hook:
        tell(workspace, model, verdict, settings.hook)
    if not verdict:
        return Completed(message=f"{run_id}: {model.test_accuracy:.2%}, the gate was not asked", data=model)
    handle_rejection(run_id, verdict, settings.gate.fail_when_rejected)
    return Completed(message=verdict_message(run_id, verdict, checkpoint.clock), data=model)
