"""When a verdict is due: a time of day becomes a moment once, when the run begins."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from nightshift.config.project import load_project
from nightshift.config.recipes import make_config
from nightshift.config.sections import BudgetConfig
from nightshift.errors import ConfigError


@pytest.mark.parametrize(
    ("start", "zone", "finish_by", "found", "in_utc"),
    [
        ("2026-11-27T02:00", "Europe/Berlin", "06:30", "2026-11-27T06:30+01:00", "2026-11-27T05:30"),
        ("2026-11-26T22:00", "Europe/Berlin", "6:30", "2026-11-27T06:30+01:00", "2026-11-27T05:30"),
        ("2026-11-27T06:30", "Europe/Berlin", "06:30", "2026-11-28T06:30+01:00", "2026-11-28T05:30"),
        ("2026-12-31T23:00", "Asia/Tokyo", "00:15", "2027-01-01T00:15+09:00", "2026-12-31T15:15"),
        # The nights in which the clocks change, of 23 and of 25 hours; and a time that one of them does not have.
        ("2026-03-28T22:00", "Europe/Berlin", "06:30", "2026-03-29T06:30+02:00", "2026-03-29T04:30"),
        ("2026-10-24T22:00", "Europe/Berlin", "06:30", "2026-10-25T06:30+01:00", "2026-10-25T05:30"),
        ("2026-03-28T22:00", "Europe/Berlin", "02:30", "2026-03-29T02:30+01:00", "2026-03-29T01:30"),
    ],
)
def test_a_time_of_day_is_the_first_such_moment_after_the_start_in_the_zone_of_the_start(
    start: str, zone: str, finish_by: str, found: str, in_utc: str
) -> None:
    night = datetime.fromisoformat(start).replace(tzinfo=ZoneInfo(zone))
    budget = make_config("quick", {"finish_by": finish_by}, night).budget
    assert budget.finish_by == found
    assert budget.finish_at == datetime.fromisoformat(in_utc).replace(tzinfo=UTC)
    assert budget.begun_at(night.replace(year=2030)) == budget  # once it is a moment, it stays that


@pytest.fixture
def in_new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "America/New_York")
        time.tzset()
        yield
    time.tzset()


def test_a_start_without_a_zone_is_one_of_this_machine(in_new_york: None) -> None:
    # The clocks are put back in that night.
    budget = BudgetConfig(finish_by="06:30").begun_at(datetime(2026, 10, 31, 23))
    assert budget.finish_by == "2026-11-01T06:30-05:00"


def test_a_config_that_is_of_no_night_keeps_the_time_of_day() -> None:
    assert make_config("quick", {"finish_by": "06:30"}).budget.finish_by == "06:30"
    assert make_config("quick").begun_at(datetime.now(UTC)) == make_config("quick")


@pytest.mark.parametrize(
    "text", ["25:00", "06:60", "6", "", "tomorrow", "2026-11-27", "2026-11-27T06:30", "1999-01-01T00:00Z"]
)
def test_what_is_neither_time_of_day_nor_moment_is_refused_with_an_example_of_each(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"should be a time of day such as 06:30, or a moment such as 2026-11-27T06:30"
    ):
        make_config("quick", {"finish_by": text})


@pytest.mark.parametrize("written", ['"06:30"', "06:30:00"])
def test_a_project_may_write_it_as_text_or_as_tomls_own_time(tmp_path: Path, written: str) -> None:
    path = tmp_path / "nightshift.toml"
    path.write_text(f"[recipes.parts]\nfinish_by = {written}\n")
    assert make_config("parts", project=load_project(path)).budget.finish_by == "06:30"


def test_hours_and_money_are_hours() -> None:
    assert BudgetConfig().hours(None) == {}
    assert BudgetConfig(max_hours=3, max_cost=5).hours(2.0) == {"budget.max_hours=3": 3, "budget.max_cost=5": 2.5}
    assert BudgetConfig(max_cost=5).hours(0.0) == {}
    with pytest.raises(ConfigError, match="set NIGHTSHIFT_PRICE_PER_HOUR"):
        BudgetConfig(max_cost=5).hours(None)
