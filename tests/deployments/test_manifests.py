"""The image and the manifests: each by its own schema or tool, and by what they promise together."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from nightshift.settings import Settings
from tests.deployments.manifests import (
    COMPOSE,
    DEPLOYMENTS,
    KUBERNETES,
    MANIFESTS,
    POOLS,
    ROOT,
    by_stem,
    kubernetes_job,
    mutated,
    objects,
    read_pool,
)


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).with_name(name))
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


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
    yield "gpu-docker", read_pool("docker")["job_configuration"]["image"]
    yield "gpu-kubernetes", kubernetes_job()["spec"]["template"]["spec"]["containers"][0]["image"]


def is_pinned(image: str) -> bool:
    return bool(re.search(r":\d+(\.\d+)+[\w.-]*$|@sha256:[0-9a-f]{64}$", image))


def test_every_image_is_pinned() -> None:
    assert len(dict(images())) >= 10
    assert [(where, image) for where, image in images() if not is_pinned(image)] == []
    assert not any(is_pinned(image) for image in ("postgres", "postgres:latest", "postgres:17", "prefect:3-latest"))


def test_every_image_is_named_by_its_digest_as_well_but_our_own_and_prefects() -> None:
    by_tag = {image.split(":")[0] for _, image in images() if "@sha256:" not in image}
    # The first has none before it is built. Those of the second could not be looked up where this was written.
    assert by_tag == {"nightshift", "prefecthq/prefect"}


def test_one_version_of_prefect_is_used_everywhere() -> None:
    tags = {image.split(":")[1].split("-")[0] for _, image in images() if "/prefect:" in image}
    assert tags == {version("prefect")}


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
