"""What a container may do beyond its work: nothing. The pods by Kubernetes' own standard, Docker's by ours."""

import re
from typing import Any

import pytest
import yaml

from tests.deployments.manifests import (
    COMPOSE,
    KUBERNETES_FOLDER,
    Mutation,
    kubernetes_job,
    mutated,
    objects,
    read_pool,
)

WORKER = {
    found["kind"]: found for found in objects(KUBERNETES_FOLDER / "worker.yaml") if found["kind"] != "ServiceAccount"
}
NAMES = {"nightshift-worker", "nightshift-trainer"}
ALLOWED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret")
}


def violations(pod: dict[str, Any]) -> set[str]:
    """What the policy `restricted` has against a pod's spec, as https://kubernetes.io/docs/concepts/security/pod-security-standards/
    lists it; a field of the container counts more than the pod's."""
    of_pod, found = pod.get("securityContext", {}), set()
    containers = [*pod["containers"], *pod.get("initContainers", []), *pod.get("ephemeralContainers", [])]
    if any(pod.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")):
        found.add("host namespaces")
    if of_pod.get("sysctls"):
        found.add("sysctls")
    if any({*volume} - {"name"} - ALLOWED_VOLUMES for volume in pod.get("volumes", [])):
        found.add("volume types")
    for container in containers:
        own = container.get("securityContext", {})
        effective = {**of_pod, **own}
        capabilities = own.get("capabilities", {})
        checks = {
            "privileged": not own.get("privileged"),
            "privilege escalation": own.get("allowPrivilegeEscalation") is False,
            "running as non-root": effective.get("runAsNonRoot") is True and effective.get("runAsUser") != 0,
            "seccomp": effective.get("seccompProfile", {}).get("type") in ("RuntimeDefault", "Localhost"),
            "capabilities": "ALL" in capabilities.get("drop", [])
            and {*capabilities.get("add", [])} <= {"NET_BIND_SERVICE"},
            "host ports": not any(port.get("hostPort") for port in container.get("ports", [])),
            "proc mount": own.get("procMount", "Default") == "Default",
            "SELinux, AppArmor": not {"seLinuxOptions", "appArmorProfile", "windowsOptions"} & {*effective},
        }
        found |= {name for name, holds in checks.items() if not holds}
    return found


def pods() -> dict[str, dict[str, Any]]:
    deployed = WORKER["Deployment"]["spec"]["template"]["spec"]
    return {"worker": deployed, **{f"{n} nodes": kubernetes_job(nodes=n)["spec"]["template"]["spec"] for n in (1, 2)}}


def test_the_namespace_lets_no_pod_in_that_is_not_restricted_and_ours_are() -> None:
    assert WORKER["Namespace"]["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}
    assert {name: violations(pod) for name, pod in pods().items()} == {name: set() for name in pods()}


@pytest.mark.parametrize(
    ("change", "violation"),
    [
        (lambda pod: pod.update(hostNetwork=True), "host namespaces"),
        (lambda pod: pod["volumes"].append({"name": "host", "hostPath": {"path": "/"}}), "volume types"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccomp"),
        (lambda pod: pod["securityContext"].update(runAsUser=0), "running as non-root"),
        (lambda pod: pod["containers"][0].pop("securityContext"), "capabilities"),
        (
            lambda pod: pod["containers"][0]["securityContext"].update(allowPrivilegeEscalation=True),
            "privilege escalation",
        ),
        (
            lambda pod: pod["containers"][0]["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]),
            "capabilities",
        ),
        (lambda pod: pod["containers"][0]["securityContext"].update(privileged=True), "privileged"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pod_that_is_not_restricted_is_found_out(change: Mutation, violation: str) -> None:
    assert violation in violations(mutated(pods()["1 nodes"], change))


# HOME (Prefect's results, matplotlib's fonts, Triton's and CUDA's caches), /tmp (inductor's cache) and NIGHTSHIFT_HOME
# of the Dockerfile; with all else read-only, a night ran to its end.
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("worker", {"/home/prefect", "/tmp"}),
        ("1 nodes", {"/dev/shm", "/home/nightshift", "/tmp", "/var/lib/nightshift"}),
    ],
)
def test_a_pod_writes_to_volumes_that_go_with_it_and_nowhere_else(name: str, written: set[str]) -> None:
    pod = pods()[name]
    container = pod["containers"][0]
    volumes = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == written
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    subfolders = [mount["subPath"] for mount in container["volumeMounts"] if mount["name"] == "scratch"]
    assert len({*subfolders}) == len(subfolders)
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_only_the_worker_has_a_token_of_kubernetes_and_may_start_jobs_with_it() -> None:
    accounts = [found for found in objects(KUBERNETES_FOLDER / "worker.yaml") if found["kind"] == "ServiceAccount"]
    assert {
        account["metadata"]["name"]: account["automountServiceAccountToken"] for account in accounts
    } == dict.fromkeys(NAMES, False)
    assert {name: pod["automountServiceAccountToken"] for name, pod in pods().items()} == {
        "worker": True,
        "1 nodes": False,
        "2 nodes": False,
    }
    rights = {(r, verb) for rule in WORKER["Role"]["rules"] for r in rule["resources"] for verb in rule["verbs"]}
    writing = {right for right in rights if right[1] not in ("get", "list", "watch")}
    assert writing == {("jobs", "create"), ("jobs", "delete")}
    assert {resource for resource, _ in rights} == {"jobs", "pods", "pods/log"}


def test_nobody_reaches_the_worker_and_it_reaches_dns_prefect_and_kubernetes_only() -> None:
    policy, deployed = WORKER["NetworkPolicy"]["spec"], WORKER["Deployment"]["spec"]["template"]
    assert policy["podSelector"]["matchLabels"].items() <= deployed["metadata"]["labels"].items()
    assert (policy["policyTypes"], policy["ingress"]) == (["Ingress", "Egress"], [])
    reached = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
    assert reached == {53, 443, 4200, 6443}
    api_url = next(e["value"] for e in deployed["spec"]["containers"][0]["env"] if e["name"] == "PREFECT_API_URL")
    port = re.search(r":(\d+)/", api_url)
    assert port
    assert int(port[1]) in reached


def confinement(container: dict[str, Any]) -> tuple[bool, bool]:
    """Whether it can gain no privileges and has no capability of its own."""
    return any("no-new-privileges" in option for option in container["security_opt"]), container["cap_drop"] == ["ALL"]


def test_no_container_of_docker_can_gain_privileges_and_only_one_begins_with_some() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    containers = {**services, "gpu-docker": read_pool("docker")["job_configuration"]["container_create_kwargs"]}
    assert {name: confinement(container) for name, container in containers.items()} == dict.fromkeys(
        containers, (True, True)
    )
    added = {name: container["cap_add"] for name, container in containers.items() if "cap_add" in container}
    assert added == {"s3": ["CHOWN", "SETGID", "SETUID"]}
    assert not any(service.get("privileged") for service in containers.values())
