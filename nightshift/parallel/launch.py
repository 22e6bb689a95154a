"""Train a run in one process, or in several on one or more machines."""

from typing import TYPE_CHECKING, Literal

from nightshift.config.sections import HardwareConfig
from nightshift.config.train import TrainConfig
from nightshift.errors import LeaseExpiredError, RankFailedError, StorageError, TrainingInterrupted
from nightshift.hardware import ranks_here
from nightshift.records import recovery
from nightshift.records.run import Origin
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.training.run import Job, check_before_training, train_alone
from nightshift.workspace import Workspace

if TYPE_CHECKING:
    from nightshift.parallel.worker import Ending


def train_run(
    workspace: Workspace, run_id: str, config: TrainConfig, dataset: DatasetRef, origin: Origin | None = None
) -> CheckpointRef:
    """Train a run to its end, in as many processes as the config says, on as many machines as the workspace says.

    Raises:
        RankFailedError: one of them failed, and again after every restart.
        Otherwise as `train_alone`.
    """
    here = ranks_here(config.hardware)
    if here == 1 and workspace.nodes.alone:
        return train_alone(workspace, run_id, config, dataset, origin)
    job = Job(run_id=run_id, config=config, dataset=dataset, origin=origin or Origin())
    finished = check_before_training(workspace, job)
    if finished:
        return finished
    from nightshift.parallel.agent import run_ranks  # here, because torch's agent takes time to import

    try:
        return run_ranks(workspace, here, job).result()
    except RankFailedError as error:
        recovery.close(workspace.store, run_id, "failed", str(error))
        raise
    except (StorageError, LeaseExpiredError) as error:
        if workspace.nodes.alone:
            raise
        # A retry at once, as on one machine, would be alone at the rendezvous.
        raise TrainingInterrupted(f"{error}. To go on, on all machines: nightshift resume {run_id}") from error


def join(workspace: Workspace, nproc_per_node: int | Literal["auto"]) -> "Ending":
    """Lend this machine to the run that is trained at the rendezvous, until it ends.

    Raises:
        ConfigError: more ranks than this machine has GPUs.
        RankLostError: the machine that hosts the rendezvous is gone, or never came.
    """
    from nightshift.parallel.agent import run_ranks

    return run_ranks(workspace, ranks_here(HardwareConfig(nproc_per_node=nproc_per_node)), None)
