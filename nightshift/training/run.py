"""Training a run from its checks to its last checkpoint. A retry is the same call: the store knows where to resume."""

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from pydantic import BaseModel

from nightshift import plugins, progress
from nightshift.config.sections import LOSSES
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.batches import Plan
from nightshift.data.datasets import Dataset, open_dataset
from nightshift.data.names import check_extras, check_fits, check_loss, check_names
from nightshift.data.transforms import check_transform
from nightshift.errors import RunNotFoundError
from nightshift.hardware import Hardware, failures_explained, find_device, ranks_here
from nightshift.ids import RunId
from nightshift.networks import check_network, network_factory
from nightshift.records.lease import RunSpec, check_matches, hold
from nightshift.records.run import Origin, read_record
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.signals import StopSignals
from nightshift.training.loop import Loop, RankOrders
from nightshift.training.losses import check_own_loss
from nightshift.training.ranks import ALONE, Ranks
from nightshift.training.recorder import Recorder, RunRecorder
from nightshift.training.starts import parent_of
from nightshift.training.state import optimizer_of
from nightshift.workspace import Workspace


class Job(BaseModel):
    """What to train."""

    run_id: RunId
    config: TrainConfig
    dataset: DatasetRef
    origin: Origin = Origin()
    """What started the run, for its record."""


def train_alone(
    workspace: Workspace,
    run_id: str,
    config: TrainConfig,
    dataset: DatasetRef,
    origin: Origin | None = None,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> CheckpointRef:
    """Train a run to its end in this process, from wherever it stands, and return the checkpoint to publish.

    Args:
        origin: what started the run, for its record.
        should_stop: called after each step with the number of steps done. SIGTERM and SIGINT stop the run too.

    Raises:
        TrainingInterrupted: stopped by a signal or `should_stop`; the last step done is saved, or the message
            says that it could not be.
        LeaseLostError: another trainer has taken the run over.
        LeaseHeldError, ResumeMismatchError: as `hold`.
        ConfigError: the model or the device does not exist, or the model cannot be trained on these images, or cannot
            begin with the weights that the config says.
        TrainingDivergedError: the loss is not finite; the last good checkpoint remains.
    """
    job = Job(run_id=run_id, config=config, dataset=dataset, origin=origin or Origin())
    finished = check_before_training(workspace, job)
    if finished:
        return finished
    with StopSignals() as signals:
        orders = RankOrders(lambda step: signals.poll() or should_stop(step))
        done = train_as_rank(ALONE, workspace, job, orders)
    assert done is not None
    return done


def train_as_rank(ranks: Ranks, workspace: Workspace, job: Job, orders: RankOrders) -> CheckpointRef | None:
    """Do one rank's part of a run. Returns the checkpoint to publish on rank 0, None elsewhere.

    Raises:
        RankLostError: another rank is gone, or `orders` say restart.
        Otherwise as `train_alone`.
    """
    with ranks.loss_explained():
        with ranks.first_on_each_machine():
            dataset = open_dataset(workspace, job.dataset, _loader_threads(job.config, ranks))
        return train_on(dataset, ranks, workspace, job, orders)


def train_on(
    dataset: Dataset, ranks: Ranks, workspace: Workspace, job: Job, orders: RankOrders
) -> CheckpointRef | None:
    """Do one rank's part of a run on images that are at hand; the rest is as of `train_as_rank`."""
    config, device = job.config, find_device(job.config.hardware.device)
    dataset = batches.resident(dataset, config, device)
    plan = batches.make_plan(config, dataset)
    ranks.check_batches(plan.smallest_batch)
    if ranks.leads:
        _check_code(config, dataset, plan, ranks)
    hardware = Hardware.resolve(config.hardware, plan.total_steps)
    with hardware.numerics():
        if not ranks.leads:
            with failures_explained(device):
                return Loop(config, dataset, plan, hardware, ranks, Recorder()).run(orders)
        environment = {**hardware.describe(ranks.world_size), **plugins.all_described(config)}
        parent = parent_of(workspace.store, job.run_id, config, dataset)
        spec = RunSpec(job.run_id, config, job.dataset, environment, plan.total_steps, job.origin, parent)
        if orders.process:
            spec = replace(spec, process=orders.process)
        # A rank 0 that was lost with its machine leaves a lease behind, which must expire first.
        patience = 1.5 * workspace.lease_seconds if ranks.nodes > 1 else 0
        with (
            hold(workspace.store, spec, workspace.lease_seconds, patience) as run,
            ranks.loss_explained(),
            failures_explained(device),
        ):
            recorder = RunRecorder(run, config, plan, hardware, workspace, len(dataset.test_labels))
            return Loop(config, dataset, plan, hardware, ranks, recorder).run(orders)


def check_before_training(workspace: Workspace, job: Job) -> CheckpointRef | None:
    """Check, before any work, that a run can be trained. Returns what it ended with if the run is already finished.

    Raises:
        ConfigError, ResumeMismatchError, StorageError: as `train_alone`.
    """
    check_config(job.config)
    job.config.budget.hours(workspace.price_per_hour)
    check_fits(job.config, job.dataset.image_size)
    check_loss(job.config, job.dataset.classes)
    with suppress(RunNotFoundError):
        record, _ = read_record(workspace.store, job.run_id)
        if record.status == "finished" and record.chosen:
            check_matches(record, job.config, job.dataset)
            progress.current().say(f"run {job.run_id} is finished: nothing to train")
            return record.ref(record.chosen)
    workspace.store.check_fencing()
    return None


def _loader_threads(config: TrainConfig, ranks: Ranks) -> int:
    if config.hardware.loader_threads != "auto":
        return config.hardware.loader_threads
    return max(1, (os.cpu_count() or 1) * ranks.nodes // ranks.world_size)


def _check_code(config: TrainConfig, dataset: Dataset, plan: Plan, ranks: Ranks) -> None:
    """Try the network, and what else there is of the team's own, before the first step."""
    if config.augment.transform is not None:
        check_transform(config.augment.transform, dataset.image_size)
    if config.loss.name not in LOSSES:
        labels = dataset.train_labels[: plan.images]
        check_own_loss(config.loss.name, labels, len(dataset.classes), mixed=config.augment.mixes)
    check_network(
        config.model.name,
        len(dataset.classes),
        dataset.image_size,
        # Over all ranks, whose batch norms are one.
        plan.smallest_batch // ranks.parts_of(plan.smallest_batch, config.optimizer.accumulate),
        averaged=bool(config.optimizer.ema_decay),
        build_optimizer=lambda network: optimizer_of(network, config, len(dataset.classes), dataset.image_size),
    )


def check_config(config: TrainConfig) -> None:
    """Raise ConfigError if something that a config names does not exist here: code, data set, package or device."""
    check_names(config)
    check_extras(config)
    network_factory(config.model.name)
    for kind, name in plugins.own_of(config):
        plugins.load(name, kind)
    ranks_here(config.hardware)
