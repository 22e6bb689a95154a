"""Several ranks: the same batches as one, the same bits each time, whatever rank is killed or stopped."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import build_model
from nightshift import progress
from nightshift.checkpoints.payload import read_payload, weights_sha256
from nightshift.config.train import TrainConfig
from nightshift.data import batches
from nightshift.data.datasets import open_dataset
from nightshift.errors import ConfigError, RankFailedError, TrainingInterrupted
from nightshift.parallel.batch_norm import synchronized
from nightshift.parallel.launch import train_run
from nightshift.progress import LogProgress, StepReport
from nightshift.records.lease import is_live
from nightshift.records.run import RunRecord, read_record
from nightshift.refs import DatasetRef
from nightshift.settings import NodesSettings
from nightshift.storage.s3 import S3
from nightshift.training.optimizers import build_optimizer
from nightshift.training.ranks import ALONE
from nightshift.workspace import Workspace
from tests.bits import state_sha256
from tests.commands import Command, Finished
from tests.conftest import eventually, small_config
from tests.parallel.struck import Blow, struck_by


class Warnings(LogProgress):
    """Keeps what a user would be warned of."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warn(self, message: str) -> None:
        self.warnings.append(message)


class At(LogProgress):
    """Does something, once, when the training reports that it has come to a step."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action
        self.is_done = False

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        if report.step >= self.step and not self.is_done:
            self.is_done = True
            self.action()


def train(
    workspace: Workspace, cifar10: DatasetRef, run_id: str, config: TrainConfig, shown_by: LogProgress | None = None
) -> str:
    """sha256 of everything a run ends with."""
    with progress.shown_by(shown_by or LogProgress()):
        last = train_run(workspace, run_id, config, cifar10)
    return state_sha256(read_payload(workspace.store, last))


def record_of(workspace: Workspace, run_id: str) -> RunRecord:
    return read_record(workspace.store, run_id)[0]


def events(workspace: Workspace, run_id: str) -> list[str]:
    return [event.what for event in record_of(workspace, run_id).events]


SIZES: dict[str, Any] = {
    "max_train_images": 640,
    "batch_size": 32,
    "epochs": 2,
    "nproc_per_node": 2,
    "checkpoint_every_steps": 10,
}
TWO = small_config(**SIZES)
SEVERAL = {"NIGHTSHIFT_NODES__COUNT": "2", "NIGHTSHIFT_NODES__SECRET": "5" * 32}


@pytest.fixture(scope="module")
def uninterrupted(
    home: Path, server: S3, cifar10: DatasetRef, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, RunRecord]:
    """How a run of two ranks ends that nothing has happened to, and its record."""
    workspace = Workspace(server, home, lease_seconds=60, save_retry_seconds=5)
    state = train(workspace, cifar10, "two-ranks", TWO)
    return state, record_of(workspace, "two-ranks")


def test_the_first_50_losses_of_two_ranks_are_those_of_one_and_nothing_is_warned_of(
    workspace: Workspace, cifar10: DatasetRef, capfd: pytest.CaptureFixture[str]
) -> None:
    """Batch norm included. With SGD, for Adam and Muon multiply the rounding of sums in another order."""
    config = small_config(
        "quick", optimizer="sgd", lr=0.01, precision="float32", batch_size=64, max_train_images=64, epochs=50
    )

    def losses(run_id: str, ranks: int) -> list[float]:
        train(workspace, cifar10, run_id, config.override({"nproc_per_node": ranks}))
        return [point.loss for point in record_of(workspace, run_id).curve]  # an epoch is a step here

    assert losses("two", 2) == pytest.approx(losses("one", 1), abs=1e-5, rel=0)
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "name", [pytest.param("timm:mobilenetv3_small_050", marks=pytest.mark.soak), "torchvision:shufflenet_v2_x0_5"]
)
def test_two_ranks_share_the_statistics_of_batch_norm_in_networks_of_others_too(
    workspace: Workspace, cifar10: DatasetRef, name: str
) -> None:
    """timm's batch norm also has an activation, and must keep it. After more steps, rounding shows."""
    config = small_config(model=name, optimizer="sgd", lr=0.01, batch_size=64, max_train_images=64)

    def losses(run_id: str, ranks: int) -> list[float]:
        train(workspace, cifar10, run_id, config.override({"nproc_per_node": ranks}))
        return [point.loss for point in record_of(workspace, run_id).curve]

    assert losses("two", 2) == pytest.approx(losses("one", 1), abs=1e-4, rel=0)


def test_a_batch_norm_of_somebodys_own_is_refused_where_several_processes_would_have_to_share_it() -> None:
    class Own(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    network = nn.Sequential(nn.Conv2d(3, 4, 3), Own(4))
    with pytest.raises(ConfigError, match=r"1 of the network is a Own, .* set nproc_per_node=1"):
        synchronized(network, torch.device("cpu"))
    assert ALONE.synchronized(network, torch.device("cpu")) is network


def test_two_ranks_take_bit_for_bit_the_steps_of_one_process_that_adds_the_gradients_of_both_halves(
    server: S3, workspace: Workspace, cifar10: DatasetRef, uninterrupted: tuple[str, RunRecord]
) -> None:
    """With Adam too, which makes of another order of addition another training within fifty steps."""
    dataset = open_dataset(workspace, cifar10)
    plan = batches.make_plan(TWO, dataset)
    scale, shift = batches.normalizer(dataset, TWO)
    torch.manual_seed(TWO.seed)
    model = build_model(TWO.model.name, 10).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model, TWO.optimizer)
    for step in range(plan.total_steps):
        images, labels = batches.training_batch(dataset, TWO, plan, step)
        optimizer.zero_grad()
        for half, answers in zip(images.chunk(2), labels.chunk(2), strict=True):
            (F.cross_entropy(model(batches.to_input(half, scale, shift)), answers) / 2).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    last = uninterrupted[1].checkpoints[-1]
    assert weights_sha256(model.state_dict()) == weights_sha256(read_payload(server, last)["model"])


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_a_run_of_which_a_rank_is_killed_ends_with_the_same_bits(
    rank: int, workspace: Workspace, cifar10: DatasetRef, uninterrupted: tuple[str, RunRecord]
) -> None:
    seen = Warnings()
    with struck_by(Blow(0, 10, signal.SIGTERM)), pytest.raises(TrainingInterrupted):  # so that this step is saved
        train(workspace, cifar10, "run", TWO)
    with struck_by(Blow(rank, 15, signal.SIGKILL)):
        assert train(workspace, cifar10, "run", TWO, seen) == uninterrupted[0]
    assert record_of(workspace, "run").resumed_from_step == 10
    assert record_of(workspace, "run").curve == uninterrupted[1].curve
    assert [f"rank {rank} failed" in warning and "SIGKILL" in warning for warning in seen.warnings] == [True]


@pytest.mark.soak
def test_a_run_begun_with_two_ranks_goes_on_with_one_and_with_two_again(
    workspace: Workspace, cifar10: DatasetRef, uninterrupted: tuple[str, RunRecord]
) -> None:
    one = TWO.override({"nproc_per_node": 1})
    with struck_by(Blow(1, 7, signal.SIGTERM)), pytest.raises(TrainingInterrupted, match="which is saved"):
        train(workspace, cifar10, "run", TWO)
    with pytest.raises(TrainingInterrupted, match="which is saved"):
        train(workspace, cifar10, "run", one, At(20, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    train(workspace, cifar10, "run", TWO)
    record = record_of(workspace, "run")
    assert record.step == 40
    details = [event.detail for event in record.events if event.what == "resumed"]
    assert "world_size 2 → 1" in details[0]
    assert "world_size 1 → 2" in details[1]
    # The same batches: the curves can differ by rounding only.
    assert [point.loss for point in record.curve] == pytest.approx(
        [point.loss for point in uninterrupted[1].curve], abs=1e-4
    )


def test_sigterm_to_any_rank_stops_all_at_the_same_step_and_saves_it(
    workspace: Workspace, cifar10: DatasetRef, uninterrupted: tuple[str, RunRecord]
) -> None:
    config = TWO.override({"checkpoint_every_steps": None})
    with struck_by(Blow(1, 5, signal.SIGTERM)), pytest.raises(TrainingInterrupted, match="which is saved"):
        train(workspace, cifar10, "run", config)
    stopped = record_of(workspace, "run")
    assert (stopped.status, stopped.step, len(stopped.checkpoints)) == ("interrupted", 5, 1)
    assert train(workspace, cifar10, "run", config) == uninterrupted[0]
    assert record_of(workspace, "run").resumed_from_step == stopped.step


def test_a_rank_that_fails_again_and_again_fails_the_run_with_its_reason(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    reason = r"rank 1 failed after all had been started again 1 times: .*SIGKILL"
    few = Workspace(workspace.store, workspace.home, 60, 5, NodesSettings(max_restarts=1))
    with struck_by(Blow(1, 1, signal.SIGKILL, times=2)), pytest.raises(RankFailedError, match=reason):
        train(few, cifar10, "run", TWO.override({"checkpoint_every_steps": None}))
    assert record_of(workspace, "run").status == "failed"


def test_what_a_user_did_wrong_is_told_as_by_one_process(workspace: Workspace, cifar10: DatasetRef) -> None:
    with pytest.raises(ConfigError, match="the last batch of an epoch has 1 images, too few for 2 processes"):
        train(workspace, cifar10, "run", TWO.override({"max_train_images": 33}))


def test_a_second_trainer_of_a_run_of_several_ranks_is_refused(workspace: Workspace, cifar10: DatasetRef) -> None:
    owners: list[bool] = []

    def look() -> None:
        owners.append(is_live(record_of(workspace, "run").lease, workspace.store.now(), process="another"))

    train(workspace, cifar10, "run", TWO, At(5, look))
    assert owners == [True]


def test_a_killed_command_leaves_no_rank_behind_and_resumes_to_the_same_bits(
    start: Callable[..., Command], workspace: Workspace, prefect_api: str, uninterrupted: tuple[str, RunRecord]
) -> None:
    settings = [f"--set={name}={value}" for name, value in SIZES.items()]
    command = start("train", "--recipe", "tutorial", "--run-id", "run", *settings, PREFECT_API_URL=prefect_api)
    command.wait_for_line("training simple_cnn on 2 processes")
    ranks = _children_of(command.pid)
    assert len(ranks) >= 2
    command.send(signal.SIGKILL)
    command.finish()
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))
    done = start("resume", "run", "--json", PREFECT_API_URL=prefect_api).finish()
    assert done.exit_code == 0, done.err
    final = read_payload(workspace.store, record_of(workspace, "run").checkpoints[-1])
    assert done.json["weights_sha256"] == weights_sha256(final["model"])
    assert state_sha256(final) == uninterrupted[0]


def test_a_machine_that_waits_for_the_others_stops_when_it_is_told_to(start: Callable[..., Command]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        rendezvous = f"127.0.0.1:{taken.getsockname()[1]}"
    command = start("join", "--json", **SEVERAL, NIGHTSHIFT_NODES__RENDEZVOUS=rendezvous)
    command.wait_for_line("waiting for the run at")
    command.send(signal.SIGTERM)
    done = command.finish()
    assert done.exit_code == 3
    assert "stopped while no rank was training" in done.json["error"]


@pytest.mark.parametrize(
    ("arguments", "environment", "told"),
    [
        ((), {}, "there is no run to join: set NIGHTSHIFT_NODES__COUNT"),
        (
            (),
            {"NIGHTSHIFT_NODES__COUNT": "2"},
            "several machines need a place to meet: set NIGHTSHIFT_NODES__RENDEZVOUS",
        ),
        (
            (),
            {**SEVERAL, "NIGHTSHIFT_NODES__RENDEZVOUS": "a:1", "NIGHTSHIFT_NODES__SECRET": "guess me"},
            "a secret of at least 32 characters: set NIGHTSHIFT_NODES__SECRET",
        ),
        (("--nproc-per-node", "0"), {**SEVERAL, "NIGHTSHIFT_NODES__RENDEZVOUS": "a:1"}, "from 1"),
    ],
)
def test_a_mistake_in_joining_is_told_in_a_sentence(
    nightshift: Callable[..., Finished], arguments: tuple[str, ...], environment: dict[str, str], told: str
) -> None:
    done = nightshift("join", *arguments, **environment)
    assert (done.exit_code, told in " ".join(done.err.split())) == (2, True), done.err
    assert "guess me" not in done.err


def _children_of(pid: int) -> list[int]:
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]
