"""The work pools: what the server accepts, and what becomes of a job of theirs."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.utilities.schema_tools import validate
from pydantic import ValidationError as RefusedError

from nightshift.settings import NodesSettings, Settings
from tests.deployments.manifests import (
    DEPLOYMENTS,
    KUBERNETES,
    POOLS,
    Mutation,
    by_stem,
    kubernetes_job,
    mutated,
    objects,
    read_pool,
    render,
)

RENDEZVOUS = DEPLOYMENTS / "kubernetes" / "rendezvous.yaml"
HARMLESS = {
    *("name", "labels", "annotations", "env", "stream_output", "auto_remove"),
    *("s3_bucket", "s3_endpoint_url", "s3_prefix", "s3_region"),
    *("nodes", "gpu_count", "cpu_request", "cpu_limit", "memory_request", "memory_limit", "mem_limit", "memswap_limit"),
    *("shm_size", "tolerations", "node_selector"),
    *("finished_job_ttl", "job_watch_timeout_seconds", "pod_watch_timeout_seconds", "termination_grace_period_seconds"),
}
"""All that a job variable may be."""
CHOSEN = {
    "command": "sh -c 'id > /tmp/evil'",
    "working_dir": "/tmp/evil",
    "image": "evil:1",
    "image_pull_policy": "Always",
    "registry_credentials": {"username": "evil"},
    "volumes": ["/:/host"],
    "credentials_directory": "/root",
    "network_mode": "host",
    "networks": ["database"],
    "privileged": True,
    "container_create_kwargs": {"privileged": True},
    "job_manifest": {"spec": {}},
    "namespace": "kube-system",
    "service_account_name": "admin",
    "secret_name": "another",
    "cluster_config": {"config": {}, "context_name": "another"},
}
"""What would choose what is executed, as whom, or what it may reach; and so would these in the environment."""
CHOOSING = (
    *("LD_PRELOAD", "PATH", "PYTHONPATH", "PYTHONSTARTUP", "BASH_ENV", "NCCL_NET_PLUGIN", "TORCHINDUCTOR_CACHE_DIR"),
    *("PREFECT_API_URL", "PREFECT_HOME", "NIGHTSHIFT_HOME", "NIGHTSHIFT_NODES__RENDEZVOUS", "CUDA_VISIBLE_DEVICES"),
)
HEARTBEAT_AND_LOG = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PREFECT_LOGGING_EXTRA_LOGGERS": "nightshift"}


class Started(NamedTuple):
    program: str
    """With its arguments."""
    replaces_the_shell: bool
    settings: dict[str, str]
    """Those of its environment variables that are nightshift's."""


@pytest.fixture
def start_pod(tmp_path: Path) -> Callable[..., Started]:
    """Runs the command of a job's pod as Kubernetes does, with programs that only tell who they are."""
    for name in ("python", "nightshift"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*"\necho $$\nenv | grep ^NIGHTSHIFT_\n')
        program.chmod(0o755)

    def start(index: int, **values: Any) -> Started:
        container = kubernetes_job(**values)["spec"]["template"]["spec"]["containers"][0]
        given = {"PATH": f"{tmp_path}:{os.defpath}", "HOSTNAME": f"nightly-x7k2p-{index}"}
        given |= {"JOB_COMPLETION_INDEX": str(index)}
        given |= {entry["name"]: entry["value"] for entry in container["env"] if entry["value"] is not None}
        with subprocess.Popen(container["args"], env=given, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout
            program, pid, *settings = process.stdout.read().splitlines()
        assert process.returncode == 0
        return Started(program, int(pid) == process.pid, dict(line.split("=", 1) for line in settings))

    return start


def accept(template: dict[str, Any]) -> None:
    """What the server and the form in its UI ask of a base job template."""
    WorkPoolCreate(name="pool", type="process", base_job_template=template)
    Draft202012Validator.check_schema(template["variables"])
    for name, variable in template["variables"]["properties"].items():
        assert variable.get("description"), f"{name} does not explain itself"
        if "default" in variable:
            schema = {**template["variables"], "type": ["object"], "properties": {name: variable}}
            Draft202012Validator(schema).validate({name: variable["default"]})


@pytest.mark.parametrize("path", POOLS, ids=by_stem)
def test_the_work_pools_are_accepted_by_the_server_and_explain_every_variable(path: Path) -> None:
    template = json.loads(path.read_text())
    accept(template)
    assert path.read_text() == json.dumps(template, indent=2) + "\n"


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda pool: pool["job_configuration"].update(command="{{ no_such_variable }}"), RefusedError),
        (lambda pool: pool["variables"]["properties"]["stream_output"].update(default="perhaps"), ValidationError),
        (lambda pool: pool["variables"]["properties"]["env"].pop("description"), AssertionError),
    ],
    ids=["unknown variable", "default of another type", "unexplained variable"],
)
@pytest.mark.parametrize("path", POOLS, ids=by_stem)
def test_a_work_pool_with_a_mistake_is_refused(path: Path, change: Mutation, error: type[Exception]) -> None:
    with pytest.raises(error):
        accept(mutated(json.loads(path.read_text()), change))


def may_be_asked_for(template: dict[str, Any], **values: Any) -> bool:
    """Whether the server takes these job variables for a flow run of this pool."""
    return not validate(values, template["variables"], allow_none_with_default=True)


@pytest.mark.parametrize("path", POOLS, ids=by_stem)
def test_a_job_variable_says_how_much_a_run_gets_and_where_its_data_lies_and_nothing_else(path: Path) -> None:
    variables = json.loads(path.read_text())["variables"]
    assert set(variables["properties"]) <= HARMLESS
    assert variables["additionalProperties"] is False


@pytest.mark.parametrize("path", POOLS, ids=by_stem)
def test_whoever_starts_a_run_cannot_choose_what_is_executed(path: Path) -> None:
    template = json.loads(path.read_text())
    assert not any(may_be_asked_for(template, **{name: value}) for name, value in CHOSEN.items())
    assert not any(may_be_asked_for(template, env={name: "/tmp/evil"}) for name in CHOOSING)
    assert not may_be_asked_for(template, **{"env.LD_PRELOAD": "/tmp/evil.so"})
    assert may_be_asked_for(template, env=dict.fromkeys(("NIGHTSHIFT_MAX_RECOVERIES", "OMP_NUM_THREADS"), "0"))
    assert may_be_asked_for(template, s3_bucket="another", name="a run")


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_a_worker_takes_no_command_even_from_a_server_that_has_not_looked(kind: str) -> None:
    """A flow run can be made without its deployment, and then the server looks at no job variable."""
    assert render(kind, **CHOSEN) == render(kind)


@pytest.mark.parametrize("kind", ["process", "docker", "kubernetes"])
def test_every_flow_run_has_a_heartbeat_and_nightshifts_log_whatever_its_deployment_adds(kind: str) -> None:
    assert render(kind).env.items() >= HEARTBEAT_AND_LOG.items()
    env = render(kind, env={"OMP_NUM_THREADS": "4"}, s3_bucket="bucket", s3_endpoint_url="http://s3:8333").env
    assert env["NIGHTSHIFT_S3__BUCKET"] == "bucket"
    assert env["NIGHTSHIFT_S3__ENDPOINT_URL"] == "http://s3:8333"
    assert env.items() >= {"OMP_NUM_THREADS": "4", **HEARTBEAT_AND_LOG}.items()


def test_a_process_trains_on_the_gpu_and_in_the_bucket_of_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = {"CUDA_VISIBLE_DEVICES": "3", "NIGHTSHIFT_S3__BUCKET": "the-workers", "AWS_ACCESS_KEY_ID": "the-workers"}
    for name, value in worker.items():
        monkeypatch.setenv(name, value)
    assert render("process").env.items() >= worker.items()
    assert "CUDA_VISIBLE_DEVICES" not in render("docker").env


def test_the_main_process_of_a_container_is_the_trainer_because_no_other_gets_the_signal(
    start_pod: Callable[..., Started],
) -> None:
    # `prefect flow-run execute`, the default, starts the trainer as its child and passes no SIGTERM on.
    assert render("docker").command == "python -m prefect.engine"
    pods = [start_pod(0), start_pod(0, nodes=2), start_pod(1, nodes=2)]
    assert [pod.replaces_the_shell for pod in pods] == [True, True, True]


def test_a_container_gets_as_many_gpus_as_are_asked_for() -> None:
    requests = render("docker", gpu_count=2).container_create_kwargs["device_requests"]
    assert [(request["driver"], request["count"]) for request in requests] == [("nvidia", 2)]


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_kubernetes_job_is_valid_by_the_schemas_of_kubernetes(nodes: int) -> None:
    kubernetes_validate.validate(kubernetes_job(nodes=nodes), KUBERNETES, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError, match="tolerations"):
        kubernetes_validate.validate(kubernetes_job(tolerations="none"), KUBERNETES, strict=True)


def test_a_kubernetes_job_is_never_repeated_by_kubernetes_and_has_its_gpu() -> None:
    job = kubernetes_job(gpu_count=4)["spec"]
    pod = job["template"]["spec"]
    assert (job["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 4


def test_a_kubernetes_job_has_as_many_numbered_pods_as_nodes_and_ends_with_the_first() -> None:
    for nodes, job in ((1, kubernetes_job()["spec"]), (2, kubernetes_job(nodes=2)["spec"])):
        assert (job["completionMode"], job["completions"], job["parallelism"]) == ("Indexed", nodes, nodes)
        # The others would wait ten minutes for a flow that has found nothing to train.
        assert job["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}


def test_no_deployment_may_ask_for_less_than_one_node() -> None:
    schema = read_pool("kubernetes")["variables"]
    with pytest.raises(ValidationError, match="less than the minimum"):
        Draft202012Validator(schema).validate({"nodes": 0})


def test_the_first_pod_runs_the_flow_and_the_others_join_it(start_pod: Callable[..., Started]) -> None:
    programs = [start_pod(index, nodes=3).program for index in range(3)]
    assert programs == ["python -m prefect.engine", "nightshift join", "nightshift join"]


@pytest.mark.parametrize("index", [0, 1])
def test_every_pod_is_told_how_many_there_are_and_that_they_meet_at_the_first(
    index: int, start_pod: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in start_pod(index, nodes=2, s3_bucket="bucket").settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("NIGHTSHIFT_NODES__SECRET", "5" * 32)
    settings = Settings.load()
    assert (settings.nodes.fewest, settings.nodes.most) == (2, 2)
    assert settings.nodes.rendezvous == "nightly-x7k2p-0.nightshift-ranks:29500"
    assert settings.s3.bucket == "bucket"


def test_a_pod_that_trains_alone_needs_no_rendezvous(
    start_pod: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = start_pod(0)
    assert alone.program == "python -m prefect.engine"
    for name, value in alone.settings.items():
        monkeypatch.setenv(name, value)
    assert Settings.load().nodes == NodesSettings()


def test_the_rendezvous_has_a_name_and_only_ranks_are_let_in(start_pod: Callable[..., Started]) -> None:
    service, policy = objects(RENDEZVOUS)
    pods = kubernetes_job(nodes=2)["spec"]["template"]
    address = start_pod(1, nodes=2).settings["NIGHTSHIFT_NODES__RENDEZVOUS"]
    ours = {"podSelector": {"matchLabels": service["spec"]["selector"]}}

    # Kubernetes names a pod HOSTNAME.SUBDOMAIN if a headless service of the subdomain's name selects it.
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pods["metadata"]["labels"].items()
    name, port = service["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert pods["spec"]["subdomain"] == name
    assert address.endswith(f"-0.{name}:{port}")

    assert policy["spec"] == {**ours, "policyTypes": ["Ingress"], "ingress": [{"from": [ours]}]}
    namespaces = {found["metadata"]["namespace"] for found in (service, policy)}
    assert namespaces == {read_pool("kubernetes")["job_configuration"]["namespace"]}


def test_the_secret_of_the_machines_of_a_run_comes_from_the_secret_of_the_jobs() -> None:
    (secret,) = objects(DEPLOYMENTS / "kubernetes" / "secret.example.yaml")
    container = kubernetes_job(nodes=2)["spec"]["template"]["spec"]["containers"][0]
    assert "NIGHTSHIFT_NODES__SECRET" in secret["stringData"]
    assert container["envFrom"] == [{"secretRef": {"name": secret["metadata"]["name"], "optional": True}}]


def test_ranks_of_a_container_have_more_shared_memory_than_the_64_mb_of_its_default() -> None:
    docker = read_pool("docker")["job_configuration"]["container_create_kwargs"]
    assert docker["shm_size"] == "{{ shm_size }}"
    pod = kubernetes_job()["spec"]["template"]["spec"]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod["containers"][0]["volumeMounts"]


def test_what_watches_over_the_trainings_does_not_wait_in_their_pool() -> None:
    planned = yaml.safe_load((DEPLOYMENTS / "prefect.yaml").read_text())["deployments"]
    pools = {deployment["name"]: deployment["work_pool"]["name"] for deployment in planned}
    assert pools["every-5-minutes"] == pools["manual"] == "cpu-process"
    assert pools["nightly"] == "gpu-process"
