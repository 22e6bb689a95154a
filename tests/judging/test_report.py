"""One page in the morning, whole in itself."""

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt

from nightshift.errors import TrainingInterrupted
from nightshift.judging import evaluation, gate, report
from nightshift.judging.drift import (
    MOST_MOVED,
    MOST_PROBLEMS,
    MOST_SHOWN,
    CameIn,
    Drift,
    LabelErrors,
    LabelShift,
    Looked,
    Moved,
    Suspect,
    Unusual,
    drift_key,
)
from nightshift.judging.evaluation import ClassMetrics, Metrics
from nightshift.judging.goodput import account
from nightshift.judging.paired import compare
from nightshift.judging.report import Report, build_report, publish_report
from nightshift.records import orphans
from nightshift.records.lease import RunSpec
from nightshift.records.lease import hold as hold_run
from nightshift.records.parents import Parent
from nightshift.records.run import Origin, Result, read_record
from nightshift.refs import MOST_GUARDS, DatasetRef, Guard, ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.storage import documents
from nightshift.storage.memory import MemoryStore
from nightshift.training.run import train_alone
from nightshift.values import LONGEST_CLASS_NAME
from nightshift.workspace import Workspace
from tests.conftest import small_config
from tests.hostile import HOSTILE, is_harmless
from tests.judging.test_evaluation import answers_of, metrics_of
from tests.judging.test_goodput import Night
from tests.made_up import known
from tests.records.test_lease import DATASET, RESULT, spec

Candidates = tuple[Workspace, dict[int, ModelRef]]


@pytest.fixture(scope="module")
def page(candidates: Candidates, cifar10: DatasetRef) -> Report:
    """Of a candidate that met a champion."""
    workspace, models = candidates
    gate.promote(workspace.store, models[2], GateSettings())
    verdict = gate.promote(workspace.store, models[1], GateSettings())
    record, _ = read_record(workspace.store, models[1].run_id)
    checkpoint = record.ref(record.checkpoints[-1])
    evaluated = evaluation.evaluate(workspace, checkpoint, cifar10)
    return publish_report(workspace, checkpoint, evaluated, models[1], verdict, price_per_hour=2.5)


class Links(HTMLParser):
    """All that a page would have to load."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_the_report_is_one_file_that_loads_nothing(page: Report) -> None:
    links = Links()
    links.feed(page.html)
    assert [link.startswith("data:image/svg+xml;base64,") for link in links.found].count(True) == len(page.plots) == 10
    assert [link.startswith("data:image/webp;base64,") for link in links.found].count(True) == 10  # the mistakes
    assert len(links.found) == 20
    assert not links.tags & {"script", "link", "iframe"}
    assert "url(" not in re.sub(r'src="[^"]*"', "", page.html)
    for svg in page.plots.values():
        ElementTree.fromstring(svg)


def test_the_report_has_the_verdict_the_comparison_and_what_it_was_made_of(
    page: Report, candidates: Candidates
) -> None:
    workspace, models = candidates
    record, _ = read_record(workspace.store, models[1].run_id)
    assert record.status == "finished"
    assert record.result
    assert record.result.verdict
    assert not record.result.verdict.promoted
    assert record.result.verdict.champion
    champion = record.result.verdict.champion.version
    shown = evaluation.read_metrics(workspace.store, models[1].run_id)
    assert shown
    for text in (page.html, page.markdown):
        for fact in (
            *("✗ Not promoted", record.result.verdict.reason, f"{100 * shown.accuracy:.2f} %", champion),
            *("label_smoothing", "torch", "cat", "at 2.5 an hour", f"{100 * (shown.classes[3].recall or 0):.2f} %"),
        ):
            assert fact in unescape(text), fact
    assert workspace.store.get("reports/epochs-1/report.html")[0].decode() == page.html
    assert workspace.store.get("reports/epochs-1/plots/confusion.svg")[0].decode() == page.plots["confusion"]


def test_a_report_of_a_run_that_is_not_evaluated_has_its_course_so_far(
    workspace: Workspace, cifar10: DatasetRef
) -> None:
    config = small_config(max_train_images=320)
    with pytest.raises(TrainingInterrupted):
        train_alone(workspace, "half", config, cifar10, should_stop=lambda step: step == 12)
    record, _ = read_record(workspace.store, "half")
    page = build_report(workspace, record, None, None)
    assert set(page.plots) == {"loss", "accuracy", "learning-rate", "goodput", "throughput", "stalls"}
    assert "no verdict yet" in page.html


def drift_of(run_id: str, texts: list[str]) -> Drift:
    """What came in, in which everything has these names, as far as a class may have them."""
    texts = [text[:LONGEST_CLASS_NAME] for text in texts]
    image: dict[str, Any] = {"split": "train", "number": 0}
    some = Looked(images=9, known=8, accuracy=0.5, interval=(0.4, 0.6), confidence=0.7)
    unusual = [
        Unusual(**image, id=text, label=text, predicted=text, confidence=0.5, distance=1.0)
        for text in texts[:MOST_SHOWN]
    ]
    suspects = [
        Suspect(**image, by="champion", id=text, label=text, suggested=text, given=0.1, probability=0.8)
        for text in texts[:MOST_SHOWN]
    ]
    moved = [Moved(name=text, before=1, tonight=2, moved=0.1) for text in texts[:MOST_MOVED]]
    return Drift(
        run_id=run_id,
        weights_sha256="0" * 64,
        champion="champion",
        labels=LabelShift(before=9, tonight=18, came=9, went=0, distance=0.1, p_value=0.01, moved=moved),
        came_in=CameIn(images=9, new=some, old=some, confidence_p=0.5, discrepancy=0.1, p_value=0.001, unusual=unusual),
        label_errors=LabelErrors(images=99, found=9, suspects=suspects),
        problems=texts[:MOST_PROBLEMS],
    )


@pytest.fixture(scope="module")
def hostile_page(home: Path) -> Report:
    """Of a run in which everything that has a name of somebody's has each of the hostile ones."""
    store, texts = MemoryStore(), list(HOSTILE.values())
    dataset = known(Workspace(store, home, 60, 5), 32, 2)
    # In some places a record holds no control characters, and no long text.
    lines = [text for text in texts if re.fullmatch(r"[^\x00-\x1f\x7f-\x9f]{0,1000}", text)]
    environment = {text: text for text in lines}
    parent = Parent(kind="pretrained", source=lines[0], sha256="0" * 64, detail=lines[-1])
    with hold_run(store, RunSpec("run", small_config(), dataset, environment, 40, parent=parent), 60) as run:
        run.end("failed", texts[0])
        record = run.record
    for text in texts:
        record = record.with_event(text if text in lines else "failed", datetime.now(UTC), text)
    metrics = Metrics(
        **dict.fromkeys(("checkpoint", "dataset_digest", "weights_sha256", "predictions_sha256"), "0" * 64),
        **dict.fromkeys(("accuracy", "top5", "loss", "calibration_error"), 0.5),
        tta=texts[0],
        predictions=texts[0],
        images=len(texts),
        interval=(0.4, 0.6),
        reliability=[],
        classes=[ClassMetrics(name=text, images=1, precision=0.5, recall=0.5, f1=0.5) for text in texts],
        confusion=np.eye(len(texts), dtype=int).tolist(),
        mistakes=[],
    )
    store.put("reports/run/evaluation.json", metrics.model_dump_json().encode())
    store.put(drift_key("run"), documents.encoded(drift_of("run", texts)))
    measured = {"images": 9, "difference": -0.5, "low": -0.7, "high": -0.3, "p_value": 0.01, "ok": False}
    guards = [Guard(name=text, kind="class", **measured) for text in texts[: MOST_GUARDS + 1]]
    verdict = Verdict(promoted=False, reason=" ".join(texts), comparison=None, champion=None, guards=guards, guarded=99)
    return build_report(Workspace(store, home, 60, 5), record, verdict, None)


def test_no_text_becomes_markup_on_the_page(hostile_page: Report) -> None:
    assert is_harmless(hostile_page.html)
    links = Links()
    links.feed(hostile_page.html)
    assert all(re.match(r"data:image/(svg\+xml|webp);base64,[A-Za-z0-9+/=]+$", link) for link in links.found)
    assert not links.tags & {"script", "a"}
    assert "&lt;script&gt;" in hostile_page.html


def test_no_text_becomes_markup_in_markdown_or_a_further_cell_of_a_table(hostile_page: Report) -> None:
    assert is_harmless(hostile_page.markdown)
    html = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(hostile_page.markdown)
    tables = {"table", "thead", "tbody", "tr", "th", "td"}
    assert set(re.findall(r"<(\w+)", html)) == {"h1", "h2", "p", "strong"} | tables
    assert html.count("<strong>") == 1  # our own "Not promoted"
    blocks = re.findall(r"(?:^\|.*\n)+", hostile_page.markdown, re.MULTILINE)
    assert len(blocks) == 11
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_figures_of_a_champion_that_was_measured_on_other_images_do_not_stand_beside_tonights() -> None:
    store, found = MemoryStore(), metrics_of(answers_of([0, 1], [0, 0]), ("cat", "dog"))
    compared = compare(np.array([True, False]), np.array([False, True]), "champion")
    verdict = Verdict(promoted=True, reason="", comparison=compared, champion=None)
    for digest, is_shown in (("0" * 64, True), ("1" * 64, False)):
        champion = found.model_copy(update={"dataset_digest": digest})
        store.put("reports/champion/evaluation.json", champion.model_dump_json().encode())
        assert bool(report._metrics_of_champion(store, "photos", verdict, found)) == is_shown


def test_of_thousands_of_events_the_last_are_shown(home: Path) -> None:
    store = MemoryStore()
    with hold_run(store, RunSpec("run", small_config(), DATASET, {"torch": "x"}, 40), 60) as run:
        record = run.record
    events = [
        record.events[0].changed(what="recovered", step=step, detail="it lived " * 20 + "and died again")
        for step in range(20_000)
    ]
    page = build_report(Workspace(store, home, 60, 5), record.changed(events=events), None, None)
    assert len(page.html.encode()) < 3_000_000
    for text in (page.html, page.markdown):
        assert "19,800 earlier events" in text
        assert text.count("and died again") == 200


@pytest.fixture(scope="module")
def crowded_page(home: Path) -> Report:
    """Of 300 classes, of which every tenth has no test images and one is always taken for the next."""
    store, count = MemoryStore(), 300
    with hold_run(store, RunSpec("run", small_config(), DATASET, {"torch": "x"}, 40), 60) as run:
        run.end("failed", "")
        record = run.record
    labels = torch.tensor([number for number in range(count) if number % 10] * 3)
    answers = evaluation.Answers(
        labels=labels,
        predicted=torch.where(labels == 77, 78, labels),
        confidence=torch.full((len(labels),), 0.5),
        in_top5=torch.ones(len(labels), dtype=torch.bool),
        loss=torch.ones(len(labels)),
    )
    measured = evaluation.measure(answers, tuple(f"kind {number}" for number in range(count)))
    digests = dict.fromkeys(("checkpoint", "dataset_digest", "weights_sha256", "predictions_sha256"), "0" * 64)
    metrics = Metrics(**digests, tta="off", predictions="none", **{**measured, "mistakes": []})
    store.put("reports/run/evaluation.json", metrics.model_dump_json().encode())
    return build_report(Workspace(store, home, 60, 5), record, None, None)


def test_of_many_classes_the_worst_and_the_most_confused_are_shown_and_no_picture(crowded_page: Report) -> None:
    assert "confusion" not in crowded_page.plots
    html = re.sub(r"<[^>]+>", " ", crowded_page.html)
    assert re.search(r"kind 77\s+kind 78\s+3\s", html)
    assert "| kind 77 | kind 78 | 3 |" in crowded_page.markdown
    for text in (html, crowded_page.markdown):
        assert "20 of 300" in text
        assert "nothing is known: 30: kind 0, kind 10, kind 20," in text
        assert text.index("kind 77") < text.index("kind 1 ")
        assert "kind 299" not in text


def test_a_page_of_many_classes_is_a_table_for_every_reader_of_markdown(crowded_page: Report) -> None:
    for block in re.findall(r"(?:^\|.*\n)+", crowded_page.markdown, re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_a_class_may_have_any_name_in_the_figures(hostile_page: Report) -> None:
    assert "confusion" in hostile_page.plots
    for figure in hostile_page.plots.values():
        ElementTree.fromstring(figure)
        assert is_harmless(figure)


def test_the_report_of_a_stored_run_is_no_orphan_and_that_of_no_run_is_one(
    candidates: Candidates, page: Report
) -> None:
    store = candidates[0].store
    store.put("reports/nobody/report.html", b"of a run without a record")
    found = orphans.find(store, timedelta(0)).keys
    store.delete("reports/nobody/report.html")
    assert found == ["reports/nobody/report.html"]


def test_the_last_nights_are_there_however_many_trials_came_after_them(workspace: Workspace) -> None:
    """The report read the 42 newest records: a sweep of as many trials hid all nights."""
    store = MemoryStore()
    for number in range(60):
        origin = Origin(promote=number < 3)
        spec = RunSpec(f"run-{number:02}", small_config(), DATASET, {"torch": "x"}, 40, origin)
        with hold_run(store, spec, 60) as run:
            result = Result(test_accuracy=0.5, test_loss=1, weights_sha256="0" * 64, model="models/cifar10/x/")
            run.end("finished", result=result)
    last = read_record(store, "run-02")[0].changed(created_at=store.now() + timedelta(days=1), run_id="this-one")
    nights = report._nights(store, last, [])
    assert [night.run_id for night in nights] == ["run-00", "run-01", "run-02"]


def test_thirty_nights_are_shown_with_their_goodput() -> None:
    night = Night()
    for number in range(31):
        night.seconds, began = 0, night.passes(3600)
        with hold_run(night.store, replace(spec(f"night-{number:02}"), origin=Origin(began_at=began)), 60) as run:
            night.passes(100)
            run.trains()
            night.passes(200 + number)
            night.seconds += 200 + number
            night.save(run)
            run.end("finished", result=RESULT)
    store, last = night.store, read_record(night.store, "night-30")[0]
    this = report.Night.of(last, 0.5, None, account(last, []))
    nights = report._nights(store, last, [this])
    assert [shown.run_id for shown in nights] == [f"night-{number:02}" for number in range(1, 31)]
    assert [shown.goodput for shown in nights] == pytest.approx([(200 + n) / (300 + n) for n in range(1, 31)])
    figures = report._plots(last, None, [], [replace(nights[0], goodput=None), *nights[1:]], None)
    assert {"nights", "goodputs"} <= set(figures)


def test_a_night_from_scratch_is_compared_with_the_last_that_had_a_parent_and_the_other_way_round() -> None:
    now = datetime.now(UTC)
    champion, scratch = Parent(kind="champion", source="x", sha256="0" * 64), Parent(kind="scratch", detail="why")
    kinds = ("champion", "scratch", "champion", "champion")
    nights = [report.Night(f"night-{number}", now, 0.5, False, kind, None) for number, kind in enumerate(kinds)]
    store = MemoryStore()
    with hold_run(store, RunSpec("run", small_config(), DATASET, {"torch": "x"}, 40, parent=champion), 60) as run:
        pass

    def compared(nights: list[report.Night], parent: Parent | None) -> list[str] | None:
        found = report._control(nights, run.record.changed(parent=parent))
        return found and [night.run_id for night in found]

    assert compared(nights, champion) == ["night-3", "night-1"]
    assert compared(nights[:2], scratch) == ["night-0", "night-1"]
    assert compared(nights[:1], champion) is None
    assert compared(nights, None) is None  # its config says scratch: it is no control
