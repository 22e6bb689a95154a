"""What lies in deployments/: where it is, and jobs as the workers prepare them."""

import asyncio
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import kubernetes_validate
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.workers.base import BaseJobConfiguration
from prefect.workers.process import ProcessJobConfiguration

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = ROOT / "deployments"
COMPOSE = DEPLOYMENTS / "compose.yaml"
POOLS = sorted((DEPLOYMENTS / "work-pools").glob("*.json"))
KUBERNETES_FOLDER = DEPLOYMENTS / "kubernetes"
MANIFESTS = sorted(KUBERNETES_FOLDER.glob("*.yaml"))
KUBERNETES = kubernetes_validate.latest_version()
FLOW_RUN = FlowRun(id=UUID(int=1), flow_id=UUID(int=2), name="a flow run")

Mutation = Callable[[Any], object]


def by_stem(path: Path) -> str:
    return path.stem


def objects(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def mutated(value: Any, change: Mutation) -> Any:
    copy = deepcopy(value)
    change(copy)
    return copy


class Rendered(BaseJobConfiguration, extra="allow"):
    """The configuration of a worker whose package is not installed here: what its fields are is not looked at."""


def read_pool(kind: str) -> dict[str, Any]:
    template: dict[str, Any] = json.loads((DEPLOYMENTS / "work-pools" / f"gpu-{kind}.json").read_text())
    return template


def render(kind: str, **values: Any) -> Any:
    """A job as the pool's worker prepares it, with the job variables of a deployment."""
    configuration: type[BaseJobConfiguration] = ProcessJobConfiguration if kind == "process" else Rendered
    job: Any = asyncio.run(configuration.from_template_and_values(read_pool(kind), values, client=Mock()))
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
