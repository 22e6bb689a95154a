"""A night with an end: its verdict is there in time, and it does not count as trained."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from nightshift.records.run import read_record
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.own_images import DATASET, write_images

MINUTES = 2
NIGHT = ("--recipe=parts", "--set=epochs=10000", "--set=checkpoint_every_steps=100", f"--set=max_hours={MINUTES / 60}")


@pytest.mark.soak
def test_a_night_has_its_verdict_before_its_time_is_up_and_the_next_one_trains_though_nothing_has_changed(
    nightshift: Callable[..., Finished], workspace: Workspace, tmp_path: Path, prefect_api: str
) -> None:
    (tmp_path / "nightshift.toml").write_text(DATASET)
    write_images(tmp_path, range(150))
    for run_id in ("first", "second"):
        done = nightshift("train", *NIGHT, f"--run-id={run_id}", "--json", PREFECT_API_URL=prefect_api)
        assert done.exit_code == 0, done.err
        assert f"the clock ends the training after step {done.json['last_step']:,} of 40,000" in done.err
        record, _ = read_record(workspace.store, run_id)
        assert record.step == record.last_step == done.json["last_step"]
        began = record.attempts[0].began_at
        assert began
        assert record.events[-1].at < began + timedelta(minutes=MINUTES)
    nights = nightshift("nights", "--json").json["nights"]
    assert [night["run_id"] for night in nights] == ["second", "first"]
    assert nights[0]["last_step"] == record.last_step
