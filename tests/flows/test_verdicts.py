"""What Prefect and Slack get to read of a verdict."""

from flows.verdicts import verdict_message
from nightshift.judging.table import guards_table
from nightshift.refs import Guard, Verdict
from tests.hostile import HOSTILE, is_harmless


def test_the_message_of_a_verdict_is_one_harmless_line() -> None:
    for text in HOSTILE.values():
        message = verdict_message("run", Verdict(promoted=True, reason=text, comparison=None, champion=None))
        assert message.startswith("run is promoted: ")
        assert is_harmless(message)
        assert "\n" not in message


def guard(name: str, points: float, ok: bool = True) -> Guard:
    difference = points / 100
    return Guard(
        name=name,
        kind="class",
        images=1234,
        difference=difference,
        low=difference - 0.02,
        high=difference + 0.02,
        p_value=0.01,
        ok=ok,
    )


def test_a_verdict_is_a_short_table_in_plain_text() -> None:
    guards = [guard("all images", 1), guard("owl", -12.5, ok=False), *(guard(f"kind {n}", -n) for n in range(9))]
    verdict = Verdict(promoted=False, reason="x", comparison=None, champion=None, guards=guards, guarded=40)
    assert verdict_message("run", verdict).splitlines() == [
        "run is not promoted: x",
        "            images  points     95 % interval",
        "all images   1,234   +1.00    -1.00 to +3.00",
        "owl          1,234  -12.50  -14.50 to -10.50  refused",
        "kind 0       1,234   +0.00    -2.00 to +2.00",
        "kind 1       1,234   -1.00    -3.00 to +1.00",
        "kind 2       1,234   -2.00    -4.00 to +0.00",
        "36 more guards, further from being broken",
    ]


def test_a_verdict_says_that_the_clock_has_ended_the_training() -> None:
    verdict = Verdict(promoted=True, reason="x", comparison=None, champion=None)
    assert verdict_message("run", verdict, "after step 5").splitlines() == [
        "run is promoted: x",
        "The clock has ended the training after step 5",
    ]
    assert all(is_harmless(verdict_message("run", verdict, text).replace("\n", "")) for text in HOSTILE.values())


def test_no_name_of_a_class_does_anything_in_the_table() -> None:
    for text in HOSTILE.values():
        verdict = Verdict(promoted=True, reason="", comparison=None, champion=None, guards=[guard(text, 1)])
        lines = guards_table(verdict)
        assert len(lines) == 2
        assert is_harmless("".join(lines))
