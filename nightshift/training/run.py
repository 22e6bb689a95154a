"""Build state → loop → step edge. A retry is the same call: where to go on from lies in the store."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from importlib.util import find_spec

from models import known_models
from nightshift import progress
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import open_dataset
from nightshift.data.specs import get_spec
from nightshift.errors import (
    ConfigError,
    RunNotFoundError,
)
from nightshift.hardware import (
    _keep_freed_memory,
    _numerics,
    describe_environment,
    pick_compile,
    pick_device,
    pick_precision,
)
from nightshift.records.lease import RunSpec, check_matches, hold
from nightshift.records.run import Origin, read_record
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.signals import StopSignals
from nightshift.training.loop import RankOrders, _Loop
from nightshift.training.ranks import ALONE, Ranks
from nightshift.workspace import Workspace


def train_alone(
    workspace: Workspace,
    run_id: str,
    config: TrainConfig,
    dataset_ref: DatasetRef,
    origin: Origin | None = None,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> CheckpointRef:
    """Train a run to its end in this process, from wherever it stands, and return its last checkpoint.

    Args:
        origin: what started it, for its record.
        should_stop: asked after each step with the number of steps done, besides SIGTERM and SIGINT.

    Raises:
        TrainingInterrupted: stopped by a signal or `should_stop`; the last step done is saved, or the message
            says that it could not be.
        LeaseLostError: another trainer has taken the run over.
        LeaseHeldError, ResumeMismatchError: as `hold`.
        ConfigError: the model or the device does not exist.
        TrainingDivergedError: the loss is not finite; the last good checkpoint stands.
    """
    finished = finished_checkpoint(workspace, run_id, config, dataset_ref)
    if finished:
        return finished
    with StopSignals() as signals:
        done = train_as_rank(
            ALONE,
            workspace,
            run_id,
            config,
            dataset_ref,
            RankOrders(lambda step: signals.received is not None or should_stop(step)),
            origin,
        )
    assert done is not None
    return done


def train_as_rank(
    ranks: Ranks,
    workspace: Workspace,
    run_id: str,
    config: TrainConfig,
    dataset_ref: DatasetRef,
    orders: RankOrders,
    origin: Origin | None = None,
) -> CheckpointRef | None:
    """What one rank does of `train`, which tells what is raised; its last checkpoint on rank 0, None elsewhere.

    Raises:
        RankLostError: another rank is gone, or `orders` are to start again.
    """
    device = pick_device(config)
    if device.type == "cpu":
        _keep_freed_memory()
    with ranks.loss_explained(), _numerics(config, device):
        with ranks.first_on_each_machine():
            dataset = open_dataset(workspace, dataset_ref).resident_on(device)
        plan = batches.make_plan(config, dataset)
        ranks.check_batches(plan.smallest_batch)
        if not ranks.leads:
            return _Loop(ranks, None, config, dataset, plan, device, workspace).run_to_end(orders)
        environment = describe_environment(device, ranks.world_size) | {
            "precision": pick_precision(config, device),
            "compile": pick_compile(config, device, plan.total_steps),
        }
        spec = RunSpec(run_id, config, dataset_ref, environment, plan.total_steps, origin or Origin())
        if orders.process:
            spec = replace(spec, process=orders.process)
        # A rank 0 that was lost with its machine has left a lease behind, which has to run out.
        patience = 1.5 * workspace.lease_seconds if ranks.nodes > 1 else 0
        with hold(workspace.store, spec, workspace.lease_seconds, patience) as run, ranks.loss_explained():
            return _Loop(ranks, run, config, dataset, plan, device, workspace).run_to_end(orders)


def finished_checkpoint(
    workspace: Workspace, run_id: str, config: TrainConfig, dataset: DatasetRef
) -> CheckpointRef | None:
    """The last checkpoint of a run that is finished; finds out before any work is done what stands in its way.

    Raises:
        ConfigError, ResumeMismatchError, StorageError: as `train`.
    """
    check_config(config)
    with suppress(RunNotFoundError):
        record, _ = read_record(workspace.store, run_id)
        if record.status == "finished":
            check_matches(record, config, dataset)
            progress.current().say(f"run {run_id} is finished: nothing to train")
            return record.ref(record.checkpoints[-1])
    workspace.store.check_fencing()
    return None


def check_config(config: TrainConfig) -> None:
    """Raise ConfigError if the model, the data set or the device a config names does not exist."""
    get_spec(config.dataset)
    if config.model not in known_models():
        raise ConfigError(f"there is no model {config.model!r}. The models are: {', '.join(known_models())}")
    if config.tensorboard and not find_spec("tensorboard"):
        raise ConfigError("tensorboard=true needs a package that is not here: install nightshift[tensorboard]")
    pick_device(config)
