"""What a flow run that is typed at a terminal owes to a Prefect server whose automations watch it."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

AUTOMATIONS = Path(__file__).parents[2] / "deployments" / "automations.yaml"
PROGRAM = """
from nightshift.cli.in_process import flow_runner
with flow_runner(verbose=False):
    from prefect.settings import get_current_settings
    print(get_current_settings().flows.heartbeat_frequency)
"""


def test_a_run_at_a_terminal_shows_that_it_lives_three_times_before_the_automations_take_it_for_lost(
    tmp_path: Path,
) -> None:
    silent = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "NIGHTSHIFT_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **silent}, capture_output=True, text=True, check=True
    )
    [lost] = [
        automation["trigger"]
        for automation in yaml.safe_load(AUTOMATIONS.read_text())["automations"]
        if automation["trigger"]["after"] == ["prefect.flow-run.heartbeat"]
    ]
    assert 3 * int(done.stdout) <= lost["within"]
