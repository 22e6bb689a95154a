"""The morning's page says whether the model is better, and whether it is live.

It is one HTML file that needs no network, and the same as Markdown.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from itertools import islice
from typing import Self

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from nightshift import progress
from nightshift.data.specs import is_same_data
from nightshift.judging import evaluation
from nightshift.judging.drift import read_drift
from nightshift.judging.evaluation import ClassMetrics, Metrics
from nightshift.judging.goodput import Goodput, account
from nightshift.judging.pictures import Picture, pictures
from nightshift.records.curve import best_of, is_enough, kept_of
from nightshift.records.keys import report_key
from nightshift.records.lease import attached
from nightshift.records.run import READERS, Result, RunRecord, newest_records
from nightshift.records.times import cost
from nightshift.refs import CheckpointRef, Evaluation, ModelRef, Verdict
from nightshift.storage.store import Store
from nightshift.text import markdown, plain
from nightshift.tracking.metrics import CheckpointLine, Line, read_lines
from nightshift.workspace import Workspace

_NIGHTS = 30
_WORST = 20
"""If more classes exist than fit into a confusion matrix, only this many are shown: those recognized worst."""
_NAMED = 10
_EVENTS = 200
"""A run may be started again thousands of times. Only so many events are shown: the last ones."""


@dataclass(frozen=True)
class Report:
    """A run on one page."""

    html: str
    markdown: str
    plots: dict[str, str]
    """Figures by name, as SVG text. The HTML contains them, and `pictures`, too."""
    pictures: dict[str, list[Picture]]
    url: str
    """The address of the HTML, where it is stored."""


@dataclass(frozen=True)
class Night:
    """A finished run of the same model; trials of sweeps are left out."""

    run_id: str
    at: datetime
    accuracy: float
    promoted: bool
    began: str
    """With which weights: the kind of its parent."""
    goodput: float | None
    """None if an older nightshift has not noted its time."""

    @classmethod
    def of(cls, record: RunRecord, accuracy: float, verdict: Verdict | None, spent: Goodput | None) -> Self:
        return cls(
            run_id=record.run_id,
            at=record.created_at,
            accuracy=accuracy,
            promoted=bool(verdict and verdict.promoted),
            began=record.parent.kind if record.parent else "scratch",
            goodput=spent.goodput if spent else None,
        )


@dataclass(frozen=True)
class Classes:
    """The classes that a report shows."""

    shown: list[ClassMetrics]
    count: int
    """How many there are, shown or not."""
    untested: int
    """How many have no test images."""
    named: list[str]
    """Some of these."""

    @classmethod
    def of(cls, found: Metrics) -> Self:
        untested = [metric.name for metric in found.classes if not metric.images]
        shown = found.classes
        if len(shown) > evaluation.MATRIX_CLASSES:
            tested = [metric for metric in shown if metric.recall is not None]
            shown = sorted(tested, key=lambda metric: (metric.recall, -metric.images))[:_WORST]
        return cls(shown, len(found.classes), len(untested), untested[:_NAMED])


def publish_report(
    workspace: Workspace,
    checkpoint: CheckpointRef,
    evaluated: Evaluation,
    model: ModelRef,
    verdict: Verdict | None,
    price_per_hour: float | None,
) -> Report:
    """Store a run's report under `reports/<run_id>/`, and mark the run finished, as nothing is left to do.

    Raises:
        LeaseLostError: another trainer has taken the run over since.
        StorageError: it cannot be stored.
    """
    with attached(workspace.store, checkpoint, workspace.lease_seconds) as run:
        report = build_report(workspace, run.record, verdict, price_per_hour)
        for name, svg in report.plots.items():
            workspace.store.put(report_key(run.run_id, f"plots/{name}.svg"), svg.encode())
        workspace.store.put(report_key(run.run_id, "report.html"), report.html.encode())
        if run.record.status != "finished":
            run.end(
                "finished",
                verdict.reason if verdict else "",
                Result(
                    test_accuracy=evaluated.accuracy,
                    test_loss=evaluated.loss,
                    weights_sha256=evaluated.weights_sha256,
                    model=model.key,
                    verdict=verdict,
                ),
            )
    progress.current().say(f"report in {report.url}")
    return report


def build_report(
    workspace: Workspace, record: RunRecord, verdict: Verdict | None, price_per_hour: float | None
) -> Report:
    """The report of a run as it stands. If the run was not evaluated yet, there are no results in it.

    Args:
        price_per_hour: what an hour of a machine costs, in any currency; None leaves the cost out.

    Raises:
        StorageError, DataUnavailableError: something it needs cannot be read.
    """
    store = workspace.store
    url = store.url(report_key(record.run_id, "report.html"))
    found, lines = evaluation.read_metrics(store, record.run_id), read_lines(store, record.run_id)
    champion = _metrics_of_champion(store, record.dataset.name, verdict, found)
    spent = account(record, lines)
    nights = _nights(store, record, [Night.of(record, found.accuracy, verdict, spent)] if found else [])
    drift = read_drift(store, record.run_id)
    plots = _plots(record, found, lines, nights, spent)
    shown = pictures(workspace, record.dataset, found, drift)
    config = record.train_config()
    images = record.step * config.data.batch_size
    context = {
        "record": record,
        "config": config,
        "verdict": verdict,
        "metrics": found,
        "classes": Classes.of(found) if found else None,
        "champion": champion,
        "nights": nights,
        "control": _control(nights, record) if found else None,
        "kept": kept_of(record.curve, config.evaluation),
        "best": best_of(record.curve, config.evaluation),
        "stopped_early": is_enough(record.curve, config.evaluation),
        "events": record.events[-_EVENTS:],
        "earlier_events": max(0, len(record.events) - _EVENTS),
        "images_per_second": images / record.train_seconds if record.train_seconds else None,
        "cost": cost(record, price_per_hour),
        "price_per_hour": price_per_hour,
        "goodput": spent,
        "drift": drift,
        "stalls": [line.stall_seconds for line in lines if isinstance(line, CheckpointLine)],
        "url": url,
    }
    sources = {
        name: "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode() for name, svg in plots.items()
    }
    return Report(
        html=html_template().render(context, plots=sources, pictures=shown),
        markdown=markdown_template().render(context),
        plots=plots,
        pictures=shown,
        url=url,
    )


def _metrics_of_champion(store: Store, name: str, verdict: Verdict | None, found: Metrics | None) -> Metrics | None:
    """What was measured of the champion, if it was on the same images: else the two columns would not compare."""
    if not verdict or not verdict.comparison:
        return None
    # A version is named after its run; its card may be gone by now.
    champion = evaluation.read_metrics(store, verdict.comparison.champion)
    if champion and found and is_same_data(name, champion.dataset_digest, found.dataset_digest):
        return champion
    return None


def _nights(store: Store, record: RunRecord, this: list[Night]) -> list[Night]:
    """The last finished runs of this model before this one, oldest first, and `this`."""

    def night(other: RunRecord) -> Night:
        assert other.result
        spent = account(other, read_lines(store, other.run_id))
        return Night.of(other, other.result.test_accuracy, other.result.verdict, spent)

    # However many trials a sweep has left among them.
    others = (
        other
        for other in newest_records(store)
        if other.result and other.dataset.name == record.dataset.name and other.origin.promote
        if other.run_id != record.run_id and other.created_at <= record.created_at
    )
    before = progress.in_threads(night, islice(others, _NIGHTS - len(this)), READERS)
    return sorted([*before, *this], key=lambda night: night.at)


def _control(nights: list[Night], record: RunRecord) -> tuple[Night, Night] | None:
    """The last night that began with a parent, up to this one, and the last that began from scratch.

    None if this night was to begin from scratch, and so is not to be compared, or if either night is missing.
    """
    tuned = [night for night in nights if night.began != "scratch"]
    scratch = [night for night in nights if night.began == "scratch"]
    return (tuned[-1], scratch[-1]) if record.parent and tuned and scratch else None


def _plots(
    record: RunRecord, found: Metrics | None, lines: list[Line], nights: list[Night], spent: Goodput | None
) -> dict[str, str]:
    from nightshift.judging import plots  # here, because matplotlib takes half a second to import

    figures = plots.learning_curves(record, lines, found.accuracy if found else None) | plots.night(record, lines)
    if spent:
        figures["goodput"] = plots.goodput(spent)
    if nights:
        figures["nights"] = plots.nights(
            [night.at for night in nights], [night.accuracy for night in nights], [night.promoted for night in nights]
        )
        if any(night.goodput is not None for night in nights):
            figures["goodputs"] = plots.goodputs([night.at for night in nights], [night.goodput for night in nights])
    if found and found.confusion:
        figures["confusion"] = plots.confusion(found.confusion, [metric.name for metric in found.classes])
    if found:
        figures["reliability"] = plots.reliability(found.reliability)
    return figures


def _span(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _environment(shown: Callable[[object], str]) -> Environment:
    """Templates in which every value passes through `shown`, which no template can forget."""
    environment = Environment(
        loader=PackageLoader("nightshift.judging"),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: "–" if share is None else f"{100 * share:.2f} %"
    environment.filters["points"] = lambda share: f"{100 * share:+.2f}"
    environment.filters["number"] = lambda count: f"{count:,}"
    environment.filters["money"] = lambda amount: f"{amount:,.2f}" if amount >= 1 else f"{amount:.4f}"
    environment.filters["span"] = _span
    return environment


@cache
def html_template() -> Template:
    """Compiled once in a process, which takes 0.1 s."""
    return _environment(lambda value: value if isinstance(value, Markup) else plain(value)).get_template("report.html")


@cache
def markdown_template() -> Template:
    """As `html_template`."""
    return _environment(lambda value: Markup(markdown(value))).get_template("report.md")  # noqa: S704
