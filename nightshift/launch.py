"""Training a run in one process, or in several on one machine or more."""

from typing import TYPE_CHECKING, Literal

import torch

from nightshift import recovery, training
from nightshift.errors import RankFailedError, StorageError, TrainingInterrupted
from nightshift.records import Origin
from nightshift.refs import CheckpointRef, DatasetRef
from nightshift.settings import TrainConfig
from nightshift.workspace import Workspace

if TYPE_CHECKING:
    from nightshift.elastic import Ending


def train(
    workspace: Workspace, run_id: str, config: TrainConfig, dataset: DatasetRef, origin: Origin | None = None
) -> CheckpointRef:
    """`training.train`, in as many processes as the config says, on as many machines as the workspace does.

    Raises:
        RankFailedError: one of them failed, again after every restart; otherwise what `training.train` raises.
    """
    here = processes_here(config.nproc_per_node)
    if here == 1 and workspace.nodes.alone:
        return training.train(workspace, run_id, config, dataset, origin)
    finished = training.find_finished(workspace, run_id, config, dataset)
    if finished:
        return finished
    from nightshift import elastic  # here, because torch's agent costs every start some time

    job = elastic.Job(run_id=run_id, config=config, dataset=dataset, origin=origin or Origin())
    try:
        return elastic.run_ranks(workspace, here, job).result()
    except RankFailedError as error:
        recovery.close(workspace.store, run_id, "failed", str(error))
        raise
    except StorageError as error:
        if workspace.nodes.alone:
            raise
        # Trying again at once, as one machine would, it would be alone at the rendezvous.
        raise TrainingInterrupted(f"{error}. To go on, on all machines: nightshift resume {run_id}") from error


def join(workspace: Workspace, nproc_per_node: int | Literal["auto"]) -> "Ending":
    """Lend this machine to the run that is trained at the rendezvous, until it ends.

    Raises:
        RankLostError: the machine that hosts the rendezvous is gone, or does not come.
    """
    from nightshift import elastic

    return elastic.run_ranks(workspace, processes_here(nproc_per_node), None)


def processes_here(nproc_per_node: int | Literal["auto"]) -> int:
    return max(torch.cuda.device_count(), 1) if nproc_per_node == "auto" else nproc_per_node
