"""What a notification says of a run, it only says."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tests.hostile import HOSTILE

FILE = Path(__file__).parents[2] / "deployments" / "notifications.yaml"
SLACK = "<!channel> <https://evil|the report>"


@pytest.mark.parametrize("text", [*HOSTILE.values(), SLACK], ids=[*HOSTILE, "Slack's own"])
def test_slack_takes_no_message_for_a_link_or_a_call(text: str) -> None:
    templates = ImmutableSandboxedEnvironment()  # which Prefect's server renders them in
    templates.filters["ui_url"] = lambda _: "https://ui"
    run = SimpleNamespace(name="night", state=SimpleNamespace(message=text))
    event = SimpleNamespace(payload={"reason": text}, resource=SimpleNamespace(name="night"))
    for automation in yaml.safe_load(FILE.read_text())["automations"]:
        (action,) = automation["actions"]
        said = templates.from_string(action["body"]).render(flow_run=run, event=event)
        assert not set("<>") & set(said)
        assert said.endswith("https://ui")
