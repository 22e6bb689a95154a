"""The image, the work pools and the manifests: each by its own schema or tool, and by what they promise together."""

import asyncio
import fnmatch
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock
from uuid import UUID

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from prefect.client.schemas.objects import FlowRun
from prefect.server.schemas.actions import WorkPoolCreate
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessJobConfiguration
from pydantic import ValidationError as RefusedError
from safetensors.numpy import load_file

from nightshift.data import sources
from nightshift.data.datasets import fetch, pack
from nightshift.data.specs import SPECS, Arrays, Spec
from nightshift.judging import gate
from nightshift.judging.evaluation import evaluate
from nightshift.judging.report import publish_report
from nightshift.publishing.publish import publish_model
from nightshift.records import orphans
from nightshift.refs import DatasetRef
from nightshift.settings import GateSettings, NodesSettings, Settings
from nightshift.storage.s3 import MIB, S3
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.records.test_orphans import begin_upload

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = ROOT / "deployments"
COMPOSE = DEPLOYMENTS / "compose.yaml"
POOLS = sorted((DEPLOYMENTS / "work-pools").glob("*.json"))
MANIFESTS = sorted((DEPLOYMENTS / "kubernetes").glob("*.yaml"))
RENDEZVOUS = DEPLOYMENTS / "kubernetes" / "rendezvous.yaml"
POLICY = DEPLOYMENTS / "kubernetes" / "s3-policy.json"
KUBERNETES = kubernetes_validate.latest_version()
HEARTBEAT_AND_LOG = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30", "PREFECT_LOGGING_EXTRA_LOGGERS": "nightshift"}
FLOW_RUN = FlowRun(id=UUID(int=1), flow_id=UUID(int=2), name="a flow run")

Mutation = Callable[[Any], object]


def by_stem(path: Path) -> str:
    return path.stem


def objects(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name(name))
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


def mutated(value: Any, change: Mutation) -> Any:
    copy = deepcopy(value)
    change(copy)
    return copy


# Each file by its own schema or tool, which must also be able to say no


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    return tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", path)


def test_the_compose_file_is_valid_by_the_compose_specification() -> None:
    checked = check_compose(COMPOSE)
    assert checked.returncode == 0, checked.stdout


def test_a_compose_file_with_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    bad = mutated(yaml.safe_load(COMPOSE.read_text()), lambda file: file["services"]["worker"].update(restrat="no"))
    path = tmp_path / "compose.yaml"
    path.write_text(yaml.safe_dump(bad))
    assert "restrat" in check_compose(path).stdout


def test_the_dockerfile_has_nothing_that_hadolint_objects_to() -> None:
    linted = tool("hadolint", ROOT / "Dockerfile")
    assert linted.returncode == 0, linted.stdout


def test_a_dockerfile_whose_command_is_a_shell_that_keeps_the_signals_is_objected_to(tmp_path: Path) -> None:
    path = tmp_path / "Dockerfile"
    path.write_text(re.sub(r"^CMD .*", "CMD nightshift worker", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE))
    linted = tool("hadolint", path)
    assert linted.returncode != 0
    assert "DL3025" in linted.stdout


@pytest.mark.parametrize("path", MANIFESTS, ids=by_stem)
def test_the_kubernetes_manifests_are_valid_by_the_schemas_of_kubernetes(path: Path) -> None:
    for found in objects(path):
        kubernetes_validate.validate(found, KUBERNETES, strict=True)


def test_a_kubernetes_manifest_with_a_misspelt_field_is_refused() -> None:
    deployment = next(found for path in MANIFESTS for found in objects(path) if found["kind"] == "Deployment")
    bad = mutated(deployment, lambda found: found["spec"].update(replica=2))
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(bad, KUBERNETES, strict=True)


# Work pools


class Rendered(BaseJobConfiguration, extra="allow"):
    """The configuration of a worker whose package is not installed here: what its fields are is not looked at."""


def read_pool(kind: str) -> dict[str, Any]:
    template: dict[str, Any] = json.loads((DEPLOYMENTS / "work-pools" / f"gpu-{kind}.json").read_text())
    return template


def render(kind: str, **values: Any) -> Any:
    """A job as the pool's worker prepares it, with the job variables of a deployment."""
    configuration = ProcessJobConfiguration if kind == "process" else Rendered
    job = asyncio.run(configuration.from_template_and_values(read_pool(kind), values, client=Mock()))
    job.prepare_for_flow_run(FLOW_RUN)
    return job


def kubernetes_job(**values: Any) -> dict[str, Any]:
    """The manifest as prefect-kubernetes sends it."""
    job = render("kubernetes", **values)
    manifest: dict[str, Any] = job.job_manifest
    pod = manifest["spec"]["template"]["spec"]
    # Prefect's worker insists on these two, as 1, in the wrong place too, where Kubernetes drops them.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    pod["containers"][0]["env"] = [{"name": name, "value": value} for name, value in job.env.items()]
    return manifest


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
    assert (
        start_pod(0, nodes=3, command="python -m another.engine 'a word'").program == "python -m another.engine a word"
    )


@pytest.mark.parametrize("index", [0, 1])
def test_every_pod_is_told_how_many_there_are_and_that_they_meet_at_the_first(
    index: int, start_pod: Callable[..., Started], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in start_pod(index, nodes=2, s3_bucket="bucket").settings.items():
        monkeypatch.setenv(name, value)
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
    assert namespaces == {read_pool("kubernetes")["variables"]["properties"]["namespace"]["default"]}


# What all of them promise


def images() -> Iterator[tuple[str, str]]:
    """Every image that is named anywhere, and where."""
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("FROM "):
            yield "Dockerfile", line.split()[1]
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        yield name, service["image"]
    for path in MANIFESTS:
        for found in objects(path):
            if found["kind"] == "Deployment":
                yield from ((path.name, c["image"]) for c in found["spec"]["template"]["spec"]["containers"])
    for kind in ("docker", "kubernetes"):
        yield f"gpu-{kind}", read_pool(kind)["variables"]["properties"]["image"]["default"]


def is_pinned(image: str) -> bool:
    return bool(re.search(r":\d+(\.\d+)+[\w.-]*$|@sha256:[0-9a-f]{64}$", image))


def test_every_image_is_pinned() -> None:
    assert len(dict(images())) >= 10
    assert [(where, image) for where, image in images() if not is_pinned(image)] == []
    assert not any(is_pinned(image) for image in ("postgres", "postgres:latest", "postgres:17", "prefect:3-latest"))


def test_one_version_of_prefect_is_used_everywhere() -> None:
    tags = {image.split(":")[1].split("-")[0] for _, image in images() if "/prefect:" in image}
    assert tags == {version("prefect")}


def test_the_dockerfile_installs_the_uv_of_the_lock_and_the_makefile() -> None:
    names = {
        "Dockerfile": r"UV_VERSION=(\S+)",
        "Makefile": r"UV_VERSION := (\S+)",
        "requirements.lock": r"(?m)^uv==(\S+)",
    }
    found = {name: re.findall(pattern, (ROOT / name).read_text()) for name, pattern in names.items()}
    assert len({tuple(versions) for versions in found.values()}) == 1, found


SECRET = re.compile(r"(PASSWORD|AUTH_STRING|TOKEN|(AWS|S3)_\w*KEY(_ID)?)$")


def secrets_in_the_clear(value: Any, name: str = "") -> Iterator[str]:
    """Names whose value stands in a manifest instead of being taken from outside."""
    if isinstance(value, dict):
        if "name" in value and "value" in value:  # an environment variable of Kubernetes
            yield from secrets_in_the_clear(value["value"], value["name"])
        for key, inner in value.items():
            yield from secrets_in_the_clear(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from secrets_in_the_clear(inner, name)
    elif SECRET.search(name) and value and not re.fullmatch(r"\$\{\w+:\?[^}]*\}", str(value)):
        yield name


def everything() -> Iterator[Any]:
    yield yaml.safe_load(COMPOSE.read_text())
    for path in MANIFESTS:
        yield from objects(path)
    yield from (json.loads(path.read_text()) for path in POOLS)
    yield dict(re.findall(r"(?m)^#?(\w+)=(.*)$", (DEPLOYMENTS / "compose.env.example").read_text()))


def test_no_secret_stands_in_a_manifest() -> None:
    assert [name for found in everything() for name in secrets_in_the_clear(found)] == []
    assert list(secrets_in_the_clear({"environment": {"POSTGRES_PASSWORD": "prefect"}})) == ["POSTGRES_PASSWORD"]
    assert list(secrets_in_the_clear([{"name": "AWS_SECRET_ACCESS_KEY", "value": "x"}])) == ["AWS_SECRET_ACCESS_KEY"]
    assert list(secrets_in_the_clear({"S3_SECRET_KEY": "${S3_SECRET_KEY:-chosen}"})) == ["S3_SECRET_KEY"]


def test_every_variable_of_the_compose_file_is_explained_in_its_example() -> None:
    asked_for = set(re.findall(r"\$\{(\w+)", COMPOSE.read_text()))
    explained = set(re.findall(r"(?m)^#?(\w+)=", (DEPLOYMENTS / "compose.env.example").read_text()))
    assert asked_for == explained


def graces() -> dict[str, float]:
    """How long each that runs a trainer leaves it after SIGTERM, in seconds."""
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    found = {
        name: float(service["stop_grace_period"].removesuffix("s"))
        for name, service in services.items()
        if "gpu" in str(service.get("deploy"))
    }
    found["gpu-kubernetes"] = kubernetes_job()["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    return found


def test_whatever_runs_a_trainer_leaves_it_the_time_in_which_it_tries_to_save() -> None:
    assert len(graces()) == 2
    needed = Settings.model_fields["save_retry_seconds"].default + 30
    assert {name: seconds for name, seconds in graces().items() if seconds < max(needed, 30)} == {}


def test_no_deployment_may_leave_a_pod_less_than_thirty_seconds_to_save() -> None:
    schema = read_pool("kubernetes")["variables"]
    with pytest.raises(ValidationError, match="less than the minimum"):
        Draft202012Validator(schema).validate({"termination_grace_period_seconds": 10})


# The rights in the bucket

# What IAM asks for where that is not called like the operation.
_RIGHTS = {
    "HeadObject": "GetObject",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "ListObjectsV2": "ListBucket",
    "ListMultipartUploads": "ListBucketMultipartUploads",
}
Request = tuple[str, str]  # a right, and the key or nothing


@pytest.fixture
def asked(workspace: Workspace) -> set[Request]:
    """What the workspace's store is asked for from now on."""
    seen: set[Request] = set()

    def note(params: dict[str, Any], model: Any, **_: Any) -> None:
        key = params.get("Key", "").removeprefix(workspace.store.prefix)
        seen.add(("s3:" + _RIGHTS.get(model.name, model.name), key))

    workspace.store._client.meta.events.register("provide-client-params.s3", note)
    return seen


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def refused(requests: set[Request], policy: dict[str, Any]) -> set[Request]:
    """Those that the policy does not allow."""

    def allows(statement: dict[str, Any], right: str, key: str) -> bool:
        name = f"arn:aws:s3:::EXAMPLE-BUCKET/nightshift/{key}" if key else "arn:aws:s3:::EXAMPLE-BUCKET"
        assert statement["Effect"] == "Allow"
        return right in listed(statement["Action"]) and any(
            fnmatch.fnmatchcase(name, pattern) for pattern in listed(statement["Resource"])
        )

    return {
        (right, key)
        for right, key in requests
        if not any(allows(statement, right, key) for statement in policy["Statement"])
    }


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, cifar10: DatasetRef, home: Path) -> None:
    """A data set of a few images and one outside source, so that it is stored and read in no time."""
    whole = load_file(home / "datasets" / f"{cifar10.digest}.safetensors")
    few: Arrays = {name: array[:20].copy() for name, array in whole.items()}
    sums = {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in few.items()}
    monkeypatch.setitem(SPECS, "tiny", Spec("tiny", SPECS["cifar10"].classes, sums))
    monkeypatch.setattr(sources, "OUTSIDE_SOURCES", {"elsewhere": lambda scratch: dict(few)})


def live(workspace: Workspace, cifar10: DatasetRef, tmp_path: Path) -> None:
    """All that a run, its publication, `doctor` and `gc` do to the store, and each way to do it."""
    store: S3 = workspace.store
    elsewhere = Workspace(store, tmp_path / "a new machine", workspace.lease_seconds, workspace.save_retry_seconds)
    first = pack(elsewhere, fetch(elsewhere, "tiny"))
    (elsewhere.home / "datasets" / f"{first.digest}.safetensors").unlink()
    pack(elsewhere, fetch(elsewhere, "tiny"))
    store.put(first.key, b"damaged")
    (elsewhere.home / "datasets" / f"{first.digest}.safetensors").unlink()
    pack(elsewhere, fetch(elsewhere, "tiny"))

    checkpoint = train_alone(workspace, "run", small_config(checkpoint_every_steps=10, keep_last=1), cifar10)
    evaluation = evaluate(workspace, checkpoint, cifar10)
    model = publish_model(workspace, checkpoint, cifar10, evaluation)
    verdict = gate.promote(store, model, GateSettings())
    publish_report(workspace, checkpoint, evaluation, model, verdict, price_per_hour=None)
    store.put("reports/no-such-run/html", b"")

    store.upload("checkpoints/run/large-0.pt", io.BytesIO(bytes(17 * MIB)))
    store.download_bytes("checkpoints/run/large-0.pt")
    store.put("models/tiny/unfinished/weights.pth", b"a version without its card")
    store.put("probe/left-behind", b"")
    begin_upload(store, "checkpoints/run/unfinished-0.pt")
    orphans.collect(store, orphans.find(store, timedelta(0)))


@pytest.mark.usefixtures("tiny")
def test_the_example_policy_allows_what_nightshift_asks_of_the_bucket_and_no_other_right(
    workspace: Workspace, cifar10: DatasetRef, asked: set[Request], tmp_path: Path
) -> None:
    live(workspace, cifar10, tmp_path)
    policy = json.loads(POLICY.read_text())
    assert refused(asked, policy) == set()
    granted = {right for statement in policy["Statement"] for right in listed(statement["Action"])}
    assert granted == {right for right, _ in asked}


def test_a_policy_that_lacks_a_right_is_found_out() -> None:
    policy = json.loads(POLICY.read_text())
    assert refused({("s3:DeleteObject", "runs/run.json")}, policy)
    assert refused({("s3:GetObject", "somebody-elses/key")}, policy)
    assert refused({("s3:DeleteBucket", "")}, policy)
    assert not refused({("s3:DeleteObject", "checkpoints/run/1-1.pt"), ("s3:ListBucket", "")}, policy)
