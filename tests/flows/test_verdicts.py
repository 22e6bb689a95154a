"""What Prefect and Slack get to read of a verdict."""

from flows.verdicts import verdict_message
from nightshift.refs import Verdict
from tests.hostile import HOSTILE, is_harmless


def test_the_message_of_a_verdict_is_one_harmless_line() -> None:
    for text in HOSTILE.values():
        message = verdict_message("run", Verdict(promoted=True, reason=text, comparison=None, champion=None))
        assert message.startswith("run is promoted: ")
        assert is_harmless(message)
        assert "\n" not in message
