"""What a person looks at in the morning: the last nights, a line each."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nightshift.judging.nights import last_nights
from nightshift.progress import shown_by
from nightshift.records.champions import promote_by_hand
from nightshift.records.keys import report_key
from nightshift.records.lease import hold as hold_run
from nightshift.records.run import Origin
from nightshift.records.snapshots import Entry, append
from nightshift.refs import Finding
from nightshift.storage.memory import MemoryStore
from nightshift.workspace import Workspace
from tests.commands import Finished
from tests.data.conftest import Told
from tests.judging.test_gate import finish, promote, published, sha256
from tests.records.test_lease import spec


def three_nights(workspace: Workspace) -> None:
    """One that went live, one that did not, and one that failed; and a trial of a sweep."""
    store = workspace.store
    for name, accuracy in (("monday", 0.6), ("tuesday", 0.4)):
        model = published(store, accuracy, name)
        measured = {"weights_sha256": sha256(name), "images": 1000, "interval": [accuracy - 0.03, accuracy + 0.03]}
        store.put(report_key(name, "evaluation.json"), json.dumps(measured).encode())
        finish(store, model, promote(store, model))
    with hold_run(store, spec("wednesday"), 60) as run:
        run.end("failed", "the loss is not finite")
    with hold_run(store, replace(spec("trial"), origin=Origin(promote=False)), 60):
        pass


def test_the_last_nights_are_shown_with_verdict_accuracy_and_cost(
    workspace: Workspace, nightshift: Callable[..., Finished]
) -> None:
    three_nights(workspace)
    shown = nightshift("nights", NIGHTSHIFT_PRICE_PER_HOUR="3.6")
    assert shown.exit_code == 0, shown.err
    lines = {words[2]: line for line in shown.out.splitlines() if len(words := line.split()) > 3}
    assert [name for name in lines if name.endswith("day")] == ["wednesday", "tuesday", "monday"]
    assert "failed" in lines["wednesday"]
    assert "the loss is not finite" in lines["wednesday"]
    assert "kept back" in lines["tuesday"]
    assert "37.0 to 43.0" in lines["tuesday"]
    assert "went live" in lines["monday"]
    assert "60.00%" in lines["monday"]
    assert "1,000" in lines["monday"]

    found = nightshift("nights", "--json", "--limit", "2").json["nights"]
    assert [night["run_id"] for night in found] == ["wednesday", "tuesday"]
    assert (found[0]["promoted"], found[1]["promoted"], found[1]["cost"]) == (None, False, None)
    for name in ("photos", "../no name"):
        assert nightshift("nights", "--name", name, "--json").json == {"nights": [], "refused": []}


def test_a_night_that_the_gate_kept_back_and_somebody_promoted_went_live(
    workspace: Workspace, nightshift: Callable[..., Finished]
) -> None:
    three_nights(workspace)
    promote_by_hand(workspace.store, "cifar10", "tuesday", "better on the new images")
    shown = " ".join(nightshift("nights").out.split())
    assert " tuesday went live " in shown
    assert ": better on the new images)" in shown
    _, tuesday, monday = nightshift("nights", "--json").json["nights"]
    assert tuesday["promoted"] is False
    assert tuesday["promoted_by_hand"].endswith(": better on the new images")
    assert monday["promoted_by_hand"] is None


def test_what_is_damaged_or_of_other_weights_is_left_out_of_its_line(tmp_path: Path) -> None:
    store = MemoryStore()
    three_nights(Workspace(store, tmp_path, 60, 5))
    store.put(report_key("monday", "evaluation.json"), b'{"images": -1}')
    other = {"weights_sha256": "1" * 64, "images": 5, "interval": [0.1, 0.2]}
    store.put(report_key("tuesday", "evaluation.json"), json.dumps(other).encode())
    store.put(report_key("tuesday", "metrics.jsonl"), b"{}")
    with shown_by(told := Told()):
        nights = last_nights(store, "cifar10", 30, None)
    assert told.warnings == ["metrics.jsonl of run tuesday is damaged: 1 of its lines are left out"]
    assert [(night.run_id, night.interval) for night in nights] == [
        ("wednesday", None),
        ("tuesday", None),
        ("monday", None),
    ]
    assert nights[-1].test_accuracy == 0.6


def test_images_that_were_refused_have_a_line_among_the_nights_and_those_after_them_none(
    workspace: Workspace, nightshift: Callable[..., Finished]
) -> None:
    store = workspace.store
    images = Entry(
        digest=sha256("whole"), at=store.now(), images=9, classes=2, added=9, removed=0, relabelled=0, refused=0, read=9
    )
    broken = Finding(rule="shrank", ok=False, detail="a tenth of the images is gone")
    warned = Finding(rule="near_duplicates", ok=True, detail="two images are alike")
    append(store, "cifar10", images.changed(findings=[warned]))
    append(store, "cifar10", images.changed(digest=sha256("less"), at=store.now(), findings=[broken, warned]))
    three_nights(workspace)
    lines = [line.split() for line in nightshift("nights").out.splitlines()]
    assert [words[2] for words in lines if len(words) > 3 and words[2].endswith("day")] == [
        "wednesday",
        "tuesday",
        "monday",
    ]
    oldest = next(words for words in reversed(lines) if len(words) > 9)
    assert oldest[2:4] == ["–", "refused"]
    assert " ".join(oldest).endswith("cifar10: a tenth of the images is gone")
    (refused,) = nightshift("nights", "--json").json["refused"]
    assert (refused["dataset"], refused["snapshot"]) == ("cifar10", sha256("less"))
    assert nightshift("nights", "--json", "--limit", "3").json["refused"] == []
