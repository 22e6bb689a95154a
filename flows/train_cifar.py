"""The flow `train-cifar`: download → preprocess → train → evaluate → publish → promote → report."""

import logging
from typing import Annotated, Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows.nights import this_start
from flows.recover import is_being_cancelled
from flows.verdicts import handle_rejection, verdict_message
from nightshift.config.recipes import recipe_names
from nightshift.data.names import checked_config
from nightshift.errors import RecoveryLimitError
from nightshift.ids import durable_run_id
from nightshift.records import recovery
from nightshift.refs import ModelRef
from nightshift.settings import Settings
from nightshift.workspace import open_workspace
from tasks import crashed_because
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.preprocess import preprocess
from tasks.promote import promote as ask_gate
from tasks.publish import publish
from tasks.report import report
from tasks.train import train

__all__ = ["TerminationSignal", "train_cifar"]

Recipe = Annotated[str, Field(json_schema_extra={"enum": list(recipe_names())})]


# Prefect passes on the loggers named in PREFECT_LOGGING_EXTRA_LOGGERS, but leaves their level at WARNING.
logging.getLogger("nightshift").setLevel(logging.INFO)


def _run_id(run_id: str | None, recipe: str) -> str:
    return durable_run_id(run_id, deployment.get_name() or recipe, this_start(), str(flow_run.get_id()))


def _flow_run_name() -> str:
    parameters = flow_run.get_parameters()
    return f"{_run_id(parameters['run_id'], parameters['recipe'])} ({parameters['recipe']})"


@flow(name="train-cifar", flow_run_name=_flow_run_name, persist_result=True, result_serializer="json")
def train_cifar(
    recipe: Recipe = "quick",
    overrides: dict[str, Any] | None = None,
    run_id: str | None = None,
    promote: bool = True,
) -> State[ModelRef]:
    """Train an image classifier on CIFAR-10, evaluate what was stored, publish it, and let it go live if it is better.

    A run that is started again under the same run id goes on where it stopped, and ends with the same bits. If a
    model is not promoted, that is a result and no failure: the verdict is the message of the final state.

    Args:
        recipe: The named config to start from.
        overrides: Fields of the config to replace, such as {"epochs": 3, "lr": 0.1}. With {"seed": "date"} each night
            has a seed of its own, such as 20261125.
        run_id: Durable name of the run, in which {date} stands for the day it is scheduled for, in the schedule's zone.
            An unfinished run of this name is resumed, a finished one trains nothing. None: a name is made.
        promote: Let it go live if it is better. A trial of a sweep is compared with the other trials instead.
    """
    config = checked_config(recipe, overrides, this_start())
    run_id, settings = _run_id(run_id, recipe), Settings.load()
    with open_workspace(settings) as workspace:
        if flow_run.get_run_count() > 1 + settings.max_recoveries:
            raise RecoveryLimitError(recovery.give_up(workspace.store, run_id, settings.max_recoveries))
        try:
            raw = download(workspace, config.data.dataset)
            dataset = preprocess(workspace, raw)
            checkpoint = train(workspace, run_id, config, dataset, promote)
            with recovery.closed_if_it_fails(workspace.store, run_id):
                evaluation = evaluate(workspace, checkpoint, dataset)
                model = publish(workspace, checkpoint, dataset, evaluation)
                verdict = ask_gate(workspace, model, settings.gate) if promote else None
                report(workspace, checkpoint, evaluation, model, verdict, settings.price_per_hour)
        except TerminationSignal as stop:
            if not is_being_cancelled():
                return crashed_because(stop)
            recovery.close(workspace.store, run_id, "cancelled")
            return Cancelled(message=f"Cancelled. What was last saved stands: nightshift resume {run_id}")
    if not verdict:
        return Completed(message=f"{run_id}: {model.test_accuracy:.2%}, the gate was not asked", data=model)
    handle_rejection(run_id, verdict, settings.gate.fail_when_rejected)
    return Completed(message=verdict_message(run_id, verdict), data=model)
