"""The flow `retrain`: snapshot → pack → train → evaluate → publish → promote → report."""

from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import TerminationSignal
from prefect.states import Completed

from flows.dask import on_dask
from flows.night import check_recoveries, flow_run_name, judge, run_id_of, stopped
from flows.nights import this_start
from nightshift.config.project import load_project
from nightshift.data.names import dataset_config, named_config
from nightshift.data.parts import read_parts
from nightshift.data.snapshot import check_rules, stored_snapshot
from nightshift.records.run import dataset_of
from nightshift.records.snapshots import Trained, note_trained, read_history
from nightshift.refs import ModelRef
from nightshift.settings import Settings
from nightshift.training.run import check_config
from nightshift.workspace import open_workspace
from tasks.pack import pack
from tasks.snapshot import snapshot as make_snapshot
from tasks.train import train


@flow(name="retrain", flow_run_name=flow_run_name, persist_result=True, result_serializer="json")
def retrain(
    recipe: str = "quick",
    overrides: dict[str, Any] | None = None,
    run_id: str | None = None,
    promote: bool = True,
    images: str | None = None,
    snapshot: str | None = None,
) -> State[ModelRef]:
    """Train on the images that there are tonight, evaluate, publish, and let the model go live if it is better.

    A run keeps the images it began with, however often it is started again and whatever came since. Where neither
    images nor config have changed since the last finished run, nothing is trained.

    Args:
        recipe: The named config to start from: one of nightshift's own, or of `nightshift.toml`.
        overrides: Fields of the config to replace, such as {"epochs": 3, "lr": 0.1, "dataset": "parts"}.
        run_id: Durable name of the run, in which {date} stands for the day it is scheduled for, in the schedule's zone.
        promote: Let it go live if it is better.
        images: A folder, s3:// prefix or table to train on, if the data set is none of `nightshift.toml`.
        snapshot: The digest of an earlier snapshot to train on again. None: tonight's is made.
    """
    settings = Settings.load()
    project = load_project(settings.project)
    config = named_config(recipe, overrides, this_start(), project, images)
    check_config(config)
    run_id = run_id_of(run_id, recipe)
    with open_workspace(settings) as workspace:
        check_recoveries(workspace, run_id, settings)
        try:
            dataset = dataset_of(workspace.store, run_id)
            if not dataset:
                source = dataset_config(project, config.data.dataset, images)
                if snapshot:
                    made = stored_snapshot(workspace.store, config.data.dataset, snapshot)
                else:
                    reader = on_dask(settings.dask) if settings.dask else read_parts
                    made = make_snapshot(workspace, config.data.dataset, source, reader)
                    check_rules(made)
                    last = read_history(workspace.store, made.name).trained
                    if last and last.is_of(made.digest, config.digest) and not source.retrain_unchanged:
                        return Completed(message=f"{run_id} trains nothing: all is as it was for {last.run_id}")
                dataset = pack(workspace, made, source.rules.near_duplicates)
            checkpoint = train(workspace, run_id, config, dataset, promote)
            ended = judge(workspace, checkpoint, config, dataset, promote, settings)
            # What the clock has ended is worth another night.
            if promote and not checkpoint.clock:
                trained = Trained(run_id=run_id, snapshot=dataset.digest, config_digest=config.digest)
                note_trained(workspace.store, dataset.name, trained)
            return ended
        except TerminationSignal as stop:
            return stopped(workspace, run_id, stop)
