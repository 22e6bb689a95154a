"""SIGKILL, and trainers that believe themselves alive: what is stored stays whole, and runs end with the same bits."""

import signal
from collections.abc import Callable

from nightshift.checkpoints.payload import read_payload, weights_sha256
from nightshift.checkpoints.verify import verify_checkpoints
from nightshift.config.recipes import make_config
from nightshift.records.run import read_record
from nightshift.refs import DatasetRef
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.commands import Command
from tests.conftest import eventually
from tests.faults import soak

TWO_EPOCHS = ("train", "--recipe", "tutorial", "--set", "max_train_images=3200", "--set", "epochs=2", "--json")


def test_runs_killed_at_points_of_the_protocol_and_at_random_end_with_the_same_bits_and_leave_nothing_behind(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    """`make soak` has all points, and more kinds of runs."""
    points = [*soak.POINTS[::2], soak.RANDOM]
    tally = soak.run(soak.Campaign(workspace, cifar10), points, seed=0, jobs=2, names=("tutorial",))
    assert tally.kills == len(points)
    assert (tally.identical, tally.different) == (tally.kills, [])
    assert set(tally.points) == {*points, f"before {soak.GC_DELETE}", f"after {soak.GC_DELETE}"}
    assert tally.orphans > 0
    assert (tally.orphans_left, tally.uploads_left) == (0, 0)


def test_of_two_live_trainers_of_one_run_exactly_one_finishes_and_the_other_stops_with_exit_code_3(
    start: Callable[..., Command],
    workspace: Workspace,
    prefect_api: str,
    cifar10: DatasetRef,
) -> None:
    def trainer(*arguments: str) -> Command:
        return start(*TWO_EPOCHS, *arguments, NIGHTSHIFT_LEASE_SECONDS="6", PREFECT_API_URL=prefect_api)

    config = make_config("tutorial", {"max_train_images": 3200, "epochs": 2})
    whole = read_payload(workspace.store, train_alone(workspace, "whole", config, cifar10))
    first = trainer("--run-id", "shared", "--set", "checkpoint_every_steps=10")
    first.wait_for_line("training simple_cnn")
    eventually(lambda: bool(read_record(workspace.store, "shared")[0].checkpoints))
    first.send(signal.SIGSTOP)  # as a machine that is cut off, or a virtual one that is moved
    eventually(lambda: read_record(workspace.store, "shared")[0].lease.expires_at < workspace.store.now())
    second = trainer("--run-id", "shared")
    second.wait_for_line("resumed from step")
    first.send(signal.SIGCONT)
    ended = [first.finish(), second.finish()]
    assert [end.exit_code for end in ended] == [3, 0], [end.err for end in ended]
    assert "lease of run shared" in ended[0].json["error"] or "taken over" in ended[0].json["error"]
    assert ended[1].json["weights_sha256"] == weights_sha256(whole["model"])
    record, _ = read_record(workspace.store, "shared")
    assert record.lease.token == 2
    assert [bad for _, bad in verify_checkpoints(workspace.store, record)] == [None] * len(record.checkpoints)
