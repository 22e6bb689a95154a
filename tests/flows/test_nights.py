"""The name of a night: the date in the zone of its schedule, on a real Prefect server."""

from datetime import UTC, date, datetime, timedelta

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.schedules import CronSchedule

from flows.nights import start_in_zone
from nightshift.ids import durable_run_id
from nightshift.local.prefect import PrefectServer

ZONES = ["Europe/Helsinki", "Asia/Tokyo", "America/New_York"]
CHANGES_OF_THE_CLOCKS = [date(2027, 3, 14), date(2027, 3, 28), date(2027, 10, 31), date(2027, 11, 7)]


def at_two(zone: str, is_active: bool = True) -> DeploymentScheduleCreate:
    return DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *", timezone=zone), active=is_active)


def names(client: SyncPrefectClient, zone: str, first: date, last: date) -> list[str]:
    """The run ids of the nights that the server schedules at 02:00 of this zone, from one date to another."""
    deployment = client.create_deployment(
        client.create_flow_from_name("nights"),
        f"nights-{zone.replace('/', '-')}-{first}",
        schedules=[at_two(zone)],
    )
    start = datetime(first.year, first.month, first.day, tzinfo=UTC) - timedelta(hours=14)
    end = datetime(last.year, last.month, last.day, tzinfo=UTC) + timedelta(days=1, hours=14)
    window = {"start_time": start.isoformat(), "end_time": end.isoformat(), "min_runs": 12, "max_runs": 12}
    client._client.post(f"/deployments/{deployment}/schedule", json=window).raise_for_status()
    runs = client.read_flow_runs(deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])))
    starts = sorted(start_in_zone(client, run) for run in runs)
    client.delete_deployment(deployment)
    return [durable_run_id("nightly-{date}", "nightly", at, "") for at in starts if first <= at.date() <= last]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("change", CHANGES_OF_THE_CLOCKS, ids=str)
def test_every_night_has_a_name_of_its_own_which_is_its_date_where_it_is_scheduled(
    prefect_server: PrefectServer, zone: str, change: date
) -> None:
    """In UTC, 02:00 in Helsinki had one name twice when the clocks changed, and in Tokyo the day before's."""
    nights = [change + timedelta(days=number) for number in range(-2, 3)]
    with SyncPrefectClient(prefect_server.api_url, auth_string=prefect_server.login) as client:
        found = names(client, zone, nights[0], nights[-1])
    assert found == [f"nightly-{night}" for night in nights]


def test_a_run_that_is_started_by_hand_belongs_to_the_zone_of_its_deployment(prefect_server: PrefectServer) -> None:
    with SyncPrefectClient(prefect_server.api_url, auth_string=prefect_server.login) as client:
        deployment = client.create_deployment(
            client.create_flow_from_name("nights"),
            "by-hand",
            schedules=[
                DeploymentScheduleCreate(schedule=CronSchedule(cron="0 2 * * *", timezone=ZONES[1]), active=False)
            ],
        )
        run = client.create_flow_run_from_deployment(deployment)
        assert str(start_in_zone(client, run).tzinfo) == ZONES[1]
        client.delete_deployment(deployment)
        assert start_in_zone(client, run).tzinfo == UTC
