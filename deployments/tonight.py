"""Whether a Prefect server will do tonight what it was deployed for. Nothing here imports Prefect, which takes seconds.

What should be there is what `nightshift deploy` makes of the project file, `prefect.yaml` and `automations.yaml`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import httpx
import yaml

from deployments.planned import Deployments
from nightshift.local.prefect import PrefectServer, ask, online_workers

_HERE = Path(__file__).parent
_RECOVER = "recover/every-5-minutes"
_LONGEST_SILENCE = timedelta(minutes=16)
"""`recover` starts every five minutes: so long without one, and three have been left out."""


@dataclass(frozen=True)
class Finding:
    """One thing that a night needs, whether it is so, and what is there or what to do."""

    name: str
    ok: bool
    detail: str


def examine(server: PrefectServer, wanted: Deployments, deploy: str) -> Iterator[Finding]:
    """What the coming night needs of this server.

    Args:
        wanted: what should be deployed.
        deploy: the command that mends what is missing.

    Raises:
        PrefectServerError: the server does not answer as one does, or asks for a login, and this is not it.
        httpx.HTTPError, ValueError: as `ask`.
    """
    there = {name: found for name in wanted if (found := _named(server, f"deployments/name/{name}"))}
    missing = sorted(wanted.keys() - there.keys())
    what = f"missing: {', '.join(missing)}. Make them: {deploy}"
    yield Finding("deployments", not missing, what if missing else f"{len(there)}, none missing")
    for name, deployment in there.items():
        if wanted[name]["schedules"]:
            yield _schedule(server, name, deployment)
    if _RECOVER in there:
        yield _last_recovery(server, there[_RECOVER])
    yield _automations(server, deploy)
    for pool in sorted({deployment["work_pool"]["name"] for deployment in wanted.values()}):
        yield _pool(server, pool, deploy)


def _named(server: PrefectServer, path: str) -> Any:
    """What is at a path; None if the server has no such thing."""
    try:
        return ask(server, path)
    except httpx.HTTPStatusError as error:
        if error.response.status_code == httpx.codes.NOT_FOUND:
            return None
        raise


def _schedule(server: PrefectServer, name: str, deployment: Mapping[str, Any]) -> Finding:
    active = [entry for entry in deployment["schedules"] if entry["active"]]
    if deployment["paused"] or not active:
        schedule_id = next((entry["id"] for entry in deployment["schedules"]), "ID")
        return Finding(
            f"schedule of {name}",
            False,
            "paused, so nothing starts: switch it on in the UI; or, after the exports that `nightshift up` prints, by "
            f"`prefect deployment schedule resume {name} {schedule_id}`",
        )
    zone = ZoneInfo(active[0]["schedule"].get("timezone") or "UTC")
    planned = _newest(server, deployment, "EXPECTED_START_TIME_ASC", expected_start_time={"after_": _text(_now())})
    if not planned:
        return Finding(
            f"schedule of {name}",
            False,
            "active, but the server plans no start: give it a minute, then look at its log, prefect/server.log",
        )
    start = datetime.fromisoformat(planned["expected_start_time"]).astimezone(zone)
    return Finding(f"schedule of {name}", True, f"next start {start:%Y-%m-%d %H:%M} {zone}")


def _last_recovery(server: PrefectServer, deployment: Mapping[str, Any]) -> Finding:
    name, done = "last recover", _newest(server, deployment, "END_TIME_DESC", state={"type": {"any_": ["COMPLETED"]}})
    ago = _now() - datetime.fromisoformat(done["end_time"] if done else deployment["created"])
    minutes = f"{ago.total_seconds() / 60:,.0f} min ago"
    detail = minutes if done else f"none yet, deployed {minutes}"
    if ago < _LONGEST_SILENCE:
        return Finding(name, True, detail)
    return Finding(name, False, f"{detail}: lost runs are not started again. Is there a worker in cpu-process?")


def _automations(server: PrefectServer, deploy: str) -> Finding:
    wanted = {entry["name"] for entry in yaml.safe_load((_HERE / "automations.yaml").read_text())["automations"]}
    enabled = {entry["name"] for entry in ask(server, "automations/filter", {"limit": 200}) if entry["enabled"]}
    if missing := sorted(wanted - enabled):
        return Finding("automations", False, f"missing or switched off: {', '.join(missing)}. Make them: {deploy}")
    return Finding("automations", True, f"{len(wanted)}, none missing")


def _pool(server: PrefectServer, pool: str, deploy: str) -> Finding:
    found, name = _named(server, f"work_pools/{pool}"), f"pool {pool}"
    if not found:
        return Finding(name, False, f"there is none. Make it: {deploy}")
    if found["is_paused"]:
        return Finding(name, False, f"paused: prefect work-pool resume {pool}")
    workers = online_workers(server, pool)
    start = deploy if deploy.endswith(" up") else f"nightshift worker --pool {pool}"
    detail = f"online: {', '.join(workers)}" if workers else f"no worker is online. Start one: {start}"
    return Finding(name, bool(workers), detail)


def _newest(server: PrefectServer, deployment: Mapping[str, Any], sort: str, **flow_runs: Any) -> Any:
    body = {"deployments": {"id": {"any_": [deployment["id"]]}}, "flow_runs": flow_runs, "sort": sort, "limit": 1}
    return next(iter(ask(server, "flow_runs/filter", body)), None)


def _now() -> datetime:
    return datetime.now(UTC)


def _text(moment: datetime) -> str:
    return moment.isoformat()
