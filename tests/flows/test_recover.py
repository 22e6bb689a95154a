"""Recovery on a Prefect server: it starts deployments of nightshift's training, and nothing else a record may name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow

from flows.retrain import retrain
from flows.train_cifar import train_cifar
from nightshift.local.prefect import PrefectServer
from nightshift.records.keys import record_key
from nightshift.records.lease import acquire
from nightshift.records.run import Origin, read_record
from nightshift.workspace import Workspace
from tests import asking
from tests.commands import Finished
from tests.records.test_lease import spec

OURS = "flows.train_cifar.train_cifar"


@pytest.fixture
def ask(prefect_server: PrefectServer) -> Callable[[str, dict[str, Any]], Any]:
    """What the server's API says to a body."""

    def request(path: str, body: dict[str, Any]) -> Any:
        return asking.ask(prefect_server, path, body)

    return request


def test_only_deployments_of_ours_are_started_whatever_a_record_says(
    ask: Callable[..., Any], prefect_api: str, nightshift: Callable[..., Finished], workspace: Workspace
) -> None:
    deployments = {}
    for name, entrypoint in (
        ("train-cifar/ours", OURS),
        ("retrain/recovered", "flows.retrain.retrain"),
        ("train-cifar/theirs", "evil.main"),
        ("evil/nightly", OURS),
    ):
        flow, _, deployment = name.partition("/")
        flow_id = ask("flows/", {"name": flow})["id"]
        made = ask("deployments/", {"name": deployment, "flow_id": flow_id, "entrypoint": entrypoint})
        deployments[name] = made["id"]
    named = {
        "a-flow-of-others": "evil/nightly",
        "an-entrypoint-of-others": "train-cifar/theirs",
        "no-deployment": "evil",
        "outside": "train-cifar/../../../flows/filter",
        "gone": "train-cifar/gone",
        "ours": "train-cifar/ours",
        "a-teams": "retrain/recovered",
    }
    good = {"ours", "a-teams"}
    for run_id, deployment in named.items():
        origin = Origin(flow_run_id=str(uuid4()), deployment=deployment)
        acquire(workspace.store, replace(spec(run_id), origin=origin), lease_seconds=60).end("interrupted")
    recovered = nightshift("recover", "--json", PREFECT_API_URL=prefect_api)
    assert (recovered.exit_code, set(recovered.json["started"])) == (0, good), recovered.err
    for run_id in named:
        url = workspace.store.url(record_key(run_id))
        assert (f"({url})" in recovered.err) is (run_id not in good), recovered.err
        claimed = bool(read_record(workspace.store, run_id)[0].recoveries)
        assert claimed is (run_id in {*good, "gone"}), f"{run_id} was to be left alone"
    started = ask("flow_runs/filter", {"deployments": {"id": {"any_": list(deployments.values())}}})
    assert {run["deployment_id"]: run["parameters"]["run_id"] for run in started} == {
        deployments[named[run_id]]: run_id for run_id in good
    }
    for run in started:
        begun: Flow[..., Any] = train_cifar if run["parameters"]["run_id"] == "ours" else retrain
        begun.validate_parameters(run["parameters"])
