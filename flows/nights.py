"""Which night a flow run belongs to: the date in the zone of the schedule that has started it."""

from datetime import UTC, datetime
from functools import lru_cache
from uuid import UUID
from zoneinfo import ZoneInfo

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run


@lru_cache(maxsize=1)
def scheduled_start(flow_run_id: str) -> datetime:
    """When a flow run was to start, as `start_in_zone` has it; now, if it was not scheduled at all."""
    with get_client(sync_client=True) as client:
        return start_in_zone(client, client.read_flow_run(UUID(flow_run_id)))


def this_start() -> datetime:
    """`scheduled_start` of the flow run that is running here."""
    return scheduled_start(str(flow_run.get_id()))


def start_in_zone(client: SyncPrefectClient, run: FlowRun) -> datetime:
    """When a flow run was to start, in the zone of its schedule.

    In UTC the date would be the day before's in Tokyo, and the same one twice in Helsinki when the clocks change. A
    flow run that nobody scheduled belongs to the zone in which its deployment is scheduled, if that is one.
    """
    start = run.expected_start_time or datetime.now(UTC)
    zones = {}
    if run.deployment_id:
        try:
            schedules = client.read_deployment(run.deployment_id).schedules
        except ObjectNotFound:  # deleted since
            schedules = []
        zones = {schedule.id: getattr(schedule.schedule, "timezone", None) or "UTC" for schedule in schedules}
    creator = run.created_by.id if run.created_by else None
    distinct = {zones[creator]} if creator in zones else set(zones.values())
    return start.astimezone(ZoneInfo(distinct.pop()) if len(distinct) == 1 else UTC)
