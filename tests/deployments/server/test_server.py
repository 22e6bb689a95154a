"""`nightshift up`, the deployments and a real worker: what becomes of a run whatever happens to its machine.

Runs are lost and stopped at the beginning and looked after later: in between the automations find out, which takes up
to a minute and a half, and the other tests need the new worker anyway.
"""

import json
import os
import signal
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nightshift import processes
from nightshift.records.history import read_history
from nightshift.records.run import RunRecord, newest_records
from nightshift.storage import documents
from nightshift.sweeps.stored import Sweep, begin, plan, results
from nightshift.sweeps.study import ask as ask_sweep
from tests.conftest import eventually
from tests.deployments.server.conftest import CONFIG, SETTINGS, Nightshift, Prefect, Training, worker_of
from tests.sweeps.test_sweep import trained


@pytest.fixture(scope="module", autouse=True)
def lost(train: Callable[..., Training], laptop: Path) -> Training:
    """A run whose worker and trainer were killed in the middle of it. The supervisor starts a new worker."""
    training = train("lost")
    wrapper, worker = worker_of(laptop)
    os.kill(worker, signal.SIGKILL)
    training.kill()
    eventually(lambda: processes.identity(wrapper) == "")
    return training


@pytest.fixture(scope="module", autouse=True)
def preempted(train: Callable[..., Training], laptop: Path, lost: Training) -> tuple[Training, RunRecord]:
    """A run whose worker was told to stop, and its record when it had. It is started again after 20 s."""
    training = train("preempted")
    wrapper, _ = worker_of(laptop)
    os.kill(wrapper, signal.SIGTERM)
    eventually(lambda: training.record.status == "interrupted")
    return training, training.record


@pytest.fixture(scope="module")
def undisturbed(prefect: Prefect, lost: Training) -> RunRecord:
    """The record of the nightly run with the same config, which nothing happened to."""
    before = datetime.now(UTC)
    ran = prefect(
        *("deployment", "run", "train-cifar/nightly", "--watch", "--param", "recipe=tutorial"),
        *("--param", "overrides=" + json.dumps(CONFIG)),
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    run_ids = {f"nightly-{day:%Y-%m-%d}" for day in (before, datetime.now(UTC))}
    found = [record for record in newest_records(lost.workspace.store) if record.run_id in run_ids]
    assert len(found) == 1
    return found[0]


def test_the_nightly_deployment_trains_and_publishes_under_a_name_of_its_day(
    undisturbed: RunRecord, lost: Training
) -> None:
    assert undisturbed.status == "finished"
    assert undisturbed.origin.deployment == "train-cifar/nightly"
    assert undisturbed.result
    assert any(lost.workspace.store.list(undisturbed.result.model))


def test_its_training_shows_in_the_log_of_prefect(undisturbed: RunRecord, ask: Callable[..., Any]) -> None:
    log = ask("logs/filter", logs={"flow_run_id": {"any_": [undisturbed.origin.flow_run_id]}})
    assert any("epoch 3/3: loss" in line["message"] for line in log)


def test_up_and_deploy_change_nothing_when_they_are_repeated(
    nightshift: Nightshift, stack: dict[str, Any], ask: Callable[..., Any]
) -> None:
    def deployed() -> list[tuple[str, str]]:
        kinds = ("automations", "deployments", "work_pools")
        return sorted((kind, found["name"]) for kind in kinds for found in ask(f"{kind}/filter", limit=100))

    def last_changes() -> dict[str, str]:
        return {found["name"]: found["updated"] for found in ask("automations/filter", limit=100)}

    before, changes_before = deployed(), last_changes()

    assert nightshift("up", "--json").json == stack
    deployed_again = nightshift("deploy", "--json").json
    assert deployed_again == {name: stack[name] for name in ("deployments", "kept", "others")}
    assert deployed_again["kept"] == []
    assert deployed() == before
    assert last_changes() == changes_before, "an automation that is updated forgets which heartbeats it has seen"
    assert [name for kind, name in before if kind == "automations"] == [
        "tell that a model was rejected",
        "tell that train-cifar has crashed and does not go on",
        "tell that train-cifar has failed",
        "train-cifar is lost",
        "train-cifar is started again",
        "train-cifar is stuck in Pending",
    ]


def test_a_schedule_that_somebody_paused_on_the_server_stays_paused_until_it_is_replaced(
    nightshift: Nightshift, stack: dict[str, Any], ask: Callable[..., Any], prefect: Prefect
) -> None:
    def schedule() -> Any:
        (found,) = ask("deployments/filter", deployments={"name": {"any_": ["nightly"]}})
        return found["schedules"][0]

    assert prefect("deployment", "schedule", "pause", "train-cifar/nightly", schedule()["id"]).returncode == 0
    deployed = nightshift("deploy")
    assert "train-cifar/nightly keeps the schedule that somebody gave it on the server: 0 2 * * * UTC (paused)" in (
        deployed.out
    )
    assert not schedule()["active"]
    assert nightshift("deploy", "--replace-schedules", "--json").json["kept"] == []
    assert schedule()["active"]


def test_doctor_sees_the_server_and_the_worker_of_up(nightshift: Nightshift, stack: dict[str, Any]) -> None:
    details = {check["name"]: check for check in nightshift("doctor", "--json").json["checks"]}
    assert stack["prefect_api_url"] in details["Prefect"]["detail"]
    pools = [check for name, check in details.items() if name.startswith("pool ")]
    assert pools
    assert all(check["ok"] for check in pools), pools


def test_submit_takes_the_short_name_and_watches_to_the_end(nightshift: Nightshift, undisturbed: RunRecord) -> None:
    done = nightshift("submit", "train-cifar", "--watch", "--json", "--recipe=tutorial", *SETTINGS)
    assert done.exit_code == 0, done.err
    assert done.json["state"] == "Completed"
    assert done.json["run_id"] == undisturbed.run_id, "the nightly run of this day is not the same run again"


@pytest.mark.parametrize("name", ["no-such-flow", "train-cifar/no-such-deployment"])
def test_submit_says_which_deployments_there_are(nightshift: Nightshift, name: str) -> None:
    done = nightshift("submit", name)
    assert done.exit_code == 2
    assert "there is no deployment" in done.err
    assert "Traceback" not in done.err


def test_a_run_whose_worker_is_told_to_stop_loses_no_step_and_is_resumed(
    preempted: tuple[Training, RunRecord], undisturbed: RunRecord
) -> None:
    training, stopped = preempted
    eventually(training.has_ended)
    assert training.events == ["started", "interrupted", "resumed", "finished"]
    assert training.record.resumed_from_step == stopped.step
    assert training.record.result
    assert undisturbed.result
    assert training.record.result.weights_sha256 == undisturbed.result.weights_sha256


@pytest.fixture(scope="module")
def hopeless(train: Callable[..., Training]) -> Training:
    """A run that may not be started again, and is interrupted."""
    training = train("hopeless", NIGHTSHIFT_MAX_RECOVERIES="0")
    training.kill(signal.SIGTERM)
    return training


def test_a_run_whose_process_is_killed_is_started_again_by_its_worker_before_the_automation_would(
    train: Callable[..., Training], ask: Callable[..., Any], undisturbed: RunRecord
) -> None:
    training = train("killed")
    assert b"forkserver" in Path(f"/proc/{training.pid}/cmdline").read_bytes(), "the worker of `up` is warm"
    training.kill()
    eventually(training.has_ended)
    assert training.events == ["started", "resumed", "finished"]
    assert training.record.lease.token == 2, "somebody else has held it meanwhile"
    assert training.record.result
    assert undisturbed.result
    assert training.record.result.weights_sha256 == undisturbed.result.weights_sha256
    states = ask(f"flow_run_states/?flow_run_id={training.flow_run_id}")
    assert [state["message"] for state in states if state["name"] == "AwaitingRetry"] == [
        "Its process died. It goes on where it stopped."
    ]


def test_a_run_that_the_user_cancels_stays_cancelled(
    hopeless: Training, train: Callable[..., Training], prefect: Prefect, nightshift: Nightshift
) -> None:
    training = train("unwanted")
    assert prefect("flow-run", "cancel", training.flow_run_id).returncode == 0
    eventually(training.has_ended)
    assert training.events == ["started", "interrupted", "cancelled"]
    eventually(lambda: training.state["type"] == "CANCELLED")
    assert "unwanted" not in nightshift("recover", "--json").json["started"]


@pytest.mark.soak
def test_of_two_nightly_runs_at_once_the_second_waits(
    nightshift: Nightshift, train: Callable[..., Training], lost: Training, undisturbed: RunRecord
) -> None:
    """The champion is trained for longer than they are, whichever tests run beside this one."""
    both = []
    for run_id in ("first", "second"):
        done = nightshift("submit", "--json", "--recipe=tutorial", f"--run-id={run_id}", *SETTINGS, "--set=epochs=1")
        assert done.exit_code == 0, done.err
        both.append(Training(lost.workspace, run_id, done.json["flow_run_id"], lost.ask))
    eventually(lambda: {"Running", "AwaitingConcurrencySlot"} == {run.state["name"] for run in both})
    eventually(lambda: all(run.state["type"] == "COMPLETED" for run in both))
    earlier, later = sorted((run.record for run in both), key=lambda record: record.created_at)
    assert earlier.updated_at <= later.created_at


@pytest.mark.soak
def test_somebody_is_told_of_a_model_that_is_worse_than_the_champion(told: tuple[str, list[dict[str, str]]]) -> None:
    """The two before were trained for one epoch only, and the champion for three."""
    eventually(lambda: any("first is not promoted" in message["subject"] for message in told[1]))
    assert any("max_regression" in message["body"] for message in told[1])


@pytest.mark.soak
def test_a_sweep_of_8_trials_with_two_killed_on_the_way_finishes_with_8_results(
    nightshift: Nightshift, ask: Callable[..., Any], lost: Training
) -> None:
    """The sweep itself is killed too, and started again. By then the automation may have done so: they get along."""
    command = [
        *("sweep", "--sweep-id=swept", "--recipe=tutorial", "--over=lr=1e-3,1e-4", "--over=seed=0,1,2,3"),
        *("--set=epochs=2", "--set=max_train_images=1280", "--set=checkpoint_every_steps=10", "--parallel=4", "--json"),
    ]
    started = nightshift(*command)
    assert started.exit_code == 0, started.err
    store, flow_run_id = lost.workspace.store, started.json["flow_run_id"]
    trials = [Training(lost.workspace, f"swept-{number:02}", flow_run_id, ask) for number in range(1, 9)]
    for trial in trials[:2]:
        eventually(lambda: any(store.list(f"checkpoints/{trial.run_id}/")))  # noqa: B023
        trial.kill()
    os.kill(int(ask(f"flow_runs/{flow_run_id}")["infrastructure_pid"]), signal.SIGKILL)
    started = nightshift(*command)
    assert started.exit_code == 0, started.err + started.out
    again = Training(lost.workspace, "swept", started.json["flow_run_id"], ask)
    eventually(lambda: again.state["type"] == "COMPLETED")

    made = {trial.run_id: trial.record for trial in trials}
    study = documents.read(store, "sweeps/swept.json", Sweep)[0]
    ended = results(study, made)
    assert [(result.run_id, result.status) for result in ended] == [(run_id, "finished") for run_id in made]
    assert [trial.events.count("resumed") for trial in trials] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert [record.result and record.result.verdict for record in made.values()] == [None] * 8
    best = max(ended, key=lambda result: result.test_accuracy or 0).run_id
    assert f"{best} is the best of 8 trials" in again.state["message"]
    decided = [entry.id for entry in read_history(store, "cifar10").transitions]
    assert {decision for decision in decided if "swept" in decision} <= {f"gate/{best}"}


@pytest.mark.soak
def test_a_bad_trial_is_stopped_early_and_not_started_again(
    nightshift: Nightshift, ask: Callable[..., Any], lost: Training
) -> None:
    """Of a sweep that is halted after its first trial, which was a good one."""
    store, overrides = lost.workspace.store, {**CONFIG, "epochs": 20}
    planned = plan("stopped", "tutorial", {"lr": [1e-3, 1e-8]}, overrides, startup_trials=1, warmup_epochs=1)
    good = trained(store, ask_sweep(store, begin(store, planned), {}), 0, [0.9] * 20, "finished")
    done = nightshift(
        *(
            "sweep",
            "--sweep-id=stopped",
            "--recipe=tutorial",
            "--over=lr=1e-3,1e-8",
            "--no-promote",
            "--watch",
            "--json",
        ),
        *("--startup-trials=1", "--warmup-epochs=1", *(f"--set={name}={value}" for name, value in overrides.items())),
    )
    assert done.exit_code == 0, done.err
    assert [(line["run"], line["status"]) for line in done.json["trials"]] == [
        (good.run_id, "finished"),
        ("stopped-02", "pruned"),
    ]
    bad = Training(lost.workspace, "stopped-02", done.json["flow_run_id"], ask)
    assert bad.events == ["started", "interrupted", "cancelled"]
    assert bad.run_id not in nightshift("recover", "--json").json["started"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sweep", "--over=ler=0.1"], "Did you mean lr?"),
        (["sweep", "--over=lr=0.1..1"], "Say how many trials"),
        (["submit", "sweep"], "nothing is swept"),
    ],
)
def test_a_sweep_that_is_not_valid_is_refused_before_anything_starts(
    nightshift: Nightshift, arguments: list[str], message: str
) -> None:
    done = nightshift(*arguments)
    assert done.exit_code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_run_that_is_interrupted_too_often_is_given_up_and_somebody_is_told(
    hopeless: Training, told: tuple[str, list[dict[str, str]]]
) -> None:
    eventually(hopeless.has_ended)
    assert hopeless.events == ["started", "interrupted", "failed"]
    eventually(lambda: hopeless.state["type"] == "FAILED")
    assert "NIGHTSHIFT_MAX_RECOVERIES" in hopeless.state["message"]
    eventually(lambda: any("hopeless (tutorial) has failed" in message["subject"] for message in told[1]))


def test_a_run_goes_on_while_the_server_is_killed_and_started_again(
    train: Callable[..., Training], laptop: Path, undisturbed: RunRecord
) -> None:
    training = train("unobserved")
    os.kill(int((laptop / "prefect" / "server.pid").read_text().split()[2]), signal.SIGKILL)
    eventually(training.has_ended)
    assert training.events == ["started", "finished"]
    assert training.record.result
    assert undisturbed.result
    assert training.record.result.weights_sha256 == undisturbed.result.weights_sha256
    eventually(lambda: training.state["type"] == "COMPLETED")


def test_the_lost_run_was_resumed_without_a_human_hand(lost: Training, undisturbed: RunRecord) -> None:
    eventually(lost.has_ended)
    assert lost.record.status == "finished"
    assert lost.record.result
    assert undisturbed.result
    assert lost.record.result.weights_sha256 == undisturbed.result.weights_sha256
