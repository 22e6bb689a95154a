"""The flow `train-cifar`: download → preprocess → train → evaluate → publish → promote → report."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal

from flows.night import check_recoveries, flow_run_name, judge, run_id_of, stopped
from flows.nights import this_start
from nightshift.config.project import load_project
from nightshift.data.names import check_flow, checked_config
from nightshift.records.run import dataset_of
from nightshift.refs import ModelRef
from nightshift.settings import Settings
from nightshift.training.run import check_config
from nightshift.workspace import open_workspace
from tasks.download import download
from tasks.preprocess import preprocess
from tasks.train import train

__all__ = ["TerminationSignal", "train_cifar"]


@flow(name="train-cifar", flow_run_name=flow_run_name, persist_result=True, result_serializer="json")
def train_cifar(
    recipe: str = "quick",
    overrides: dict[str, Any] | None = None,
    run_id: str | None = None,
    promote: bool = True,
) -> State[ModelRef]:
    """Train an image classifier on CIFAR-10, evaluate what was stored, publish it, and let it go live if it is better.

    A run that is started again under the same run id goes on where it stopped, and ends with the same bits. If a
    model is not promoted, that is a result and no failure: the verdict is the message of the final state.

    Args:
        recipe: The named config to start from: one of nightshift's own, or of `nightshift.toml`.
        overrides: Fields of the config to replace, such as {"epochs": 3, "lr": 0.1}. With {"seed": "date"} each night
            has a seed of its own, such as 20261125.
        run_id: Durable name of the run, in which {date} stands for the day it is scheduled for, in the schedule's zone.
            An unfinished run of this name is resumed, a finished one trains nothing. None: a name is made.
        promote: Let it go live if it is better. A trial of a sweep is compared with the other trials instead.
    """
    settings = Settings.load()
    project = load_project(settings.project)
    config = checked_config(recipe, overrides, this_start(), project)
    check_flow("train-cifar", config, project)
    check_config(config)
    run_id = run_id_of(run_id, recipe)
    with open_workspace(settings) as workspace:
        check_recoveries(workspace, run_id, settings)
        try:
            dataset = dataset_of(workspace.store, run_id)
            if not dataset:
                dataset = preprocess(workspace, download(workspace, config.data.dataset))
            checkpoint = train(workspace, run_id, config, dataset, promote)
            return judge(workspace, checkpoint, config, dataset, promote, settings)
        except TerminationSignal as stop:
            return stopped(workspace, run_id, stop)
