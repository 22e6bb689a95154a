"""The flow `train-cifar`: download → preprocess → train → evaluate → publish."""

import logging
from datetime import UTC, datetime
from typing import Annotated, Any

from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run
from pydantic import Field

from nightshift.recipes import make_config, recipe_names
from nightshift.refs import ModelRef, parse_run_id
from nightshift.settings import Settings
from nightshift.workspace import open_workspace
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.preprocess import preprocess
from tasks.publish import publish
from tasks.train import train

__all__ = ["TerminationSignal", "train_cifar"]

Recipe = Annotated[
    str, Field(description="The named config to start from.", json_schema_extra={"enum": list(recipe_names())})
]
Overrides = Annotated[
    dict[str, Any] | None,
    Field(description='Fields of the config to replace, such as {"epochs": 3, "lr": 0.1}.'),
]
RunId = Annotated[
    str | None,
    Field(description="Durable name of the run. An unfinished run of this name is resumed. Empty: a name is made."),
]


# Prefect passes on the loggers named in PREFECT_LOGGING_EXTRA_LOGGERS, but leaves their level at WARNING.
logging.getLogger("nightshift").setLevel(logging.INFO)


def default_run_id(recipe: str) -> str:
    """The same name however often this flow run is started: of its deployment and day, or of itself."""
    scheduled = flow_run.get_scheduled_start_time() or datetime.now(UTC)
    if deployment.get_name():
        return f"{deployment.get_name()}-{scheduled:%Y-%m-%d}"
    return f"{recipe}-{scheduled:%Y%m%d}-{str(flow_run.get_id())[:8]}"


def _flow_run_name() -> str:
    parameters = flow_run.get_parameters()
    run_id = parameters["run_id"] or default_run_id(parameters["recipe"])
    return f"{run_id} ({parameters['recipe']})"


@flow(name="train-cifar", flow_run_name=_flow_run_name, persist_result=True, result_serializer="json")
def train_cifar(recipe: Recipe = "quick", overrides: Overrides = None, run_id: RunId = None) -> ModelRef:
    """Train an image classifier on CIFAR-10, evaluate what was stored, and publish it.

    Whatever starts this again under the same run id goes on where it stopped, and ends with the same bits.
    """
    config = make_config(recipe, overrides)
    run_id = parse_run_id(run_id or default_run_id(recipe))
    with open_workspace(Settings.load()) as workspace:
        raw = download(workspace, config.dataset)
        dataset = preprocess(workspace, raw)
        checkpoint = train(workspace, run_id, config, dataset)
        evaluation = evaluate(workspace, checkpoint, dataset)
        return publish(workspace, checkpoint, dataset, evaluation)
