"""The report's figures, as SVG: legible on a phone, and for people who do not see all colours.

Colours are those of Okabe and Ito (2008); the confusion matrix has matplotlib's cividis. Nothing is shown by colour
alone.
"""

import io
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from nightshift.judging.evaluation import Bin
from nightshift.judging.goodput import Goodput
from nightshift.records.curve import kept_of
from nightshift.records.run import RunRecord
from nightshift.text import figure_label
from nightshift.tracking.metrics import CheckpointLine, Line, TrainingLine

_BLUE, _ORANGE, _GREEN, _VERMILION, _GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6b7280"
_STYLE: Any = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "svg.hashsalt": "nightshift",  # the same figure gives the same file
}
_MOST_LARGE, _MOST_MARKS = 60, 500
"""Above the first number, points have small marks. Above the second, they become an image of fixed size."""


_MOST_NAMED = 15
"""With more nights than this, only some are named below the axis."""


def learning_curves(record: RunRecord, lines: Sequence[Line], test_accuracy: float | None) -> dict[str, str]:
    """Loss, accuracy and learning rate over the epochs, at the ends of epochs and in between."""
    trained = [line for line in lines if isinstance(line, TrainingLine)]
    per_epoch = record.total_steps / record.train_config().schedule.epochs
    ends = [point.step / per_epoch for point in record.curve]
    between = [line.step / per_epoch for line in trained]
    figures = {}
    kept = kept_of(record.curve, record.train_config().evaluation)
    for name, scale, unit in (("loss", 1, "loss"), ("accuracy", 100, "accuracy (%)")):
        figure, axes = _figure("epoch", unit)
        so_far = [scale * getattr(line, name) for line in trained]
        axes.plot(between, so_far, ".", color=_GREY, label="epoch so far", zorder=1)
        whole = [scale * getattr(point, name) for point in record.curve]
        axes.plot(ends, whole, "o-", color=_BLUE, label="whole epoch")
        validated = [
            (point.step / per_epoch, scale * value)
            for point in record.curve
            if (value := getattr(point, f"validation_{name}")) is not None
        ]
        if validated:
            axes.plot(*zip(*validated, strict=True), "s--", color=_ORANGE, label="validation images")
        if kept:
            axes.axvline(kept.step / per_epoch, color=_GREY, linestyle=":", label="kept epoch")
        if name == "accuracy" and test_accuracy is not None:
            axes.axhline(100 * test_accuracy, color=_VERMILION, linestyle="--", label="test images, at the end")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
        figures[name] = _svg(figure)
    figure, axes = _figure("epoch", "learning rate")
    axes.plot(between, [line.learning_rate for line in trained], "o-", color=_GREEN, markersize=4)
    axes.set_ylim(bottom=0)
    return figures | {"learning-rate": _svg(figure)}


def night(record: RunRecord, lines: Sequence[Line]) -> dict[str, str]:
    """Throughput, and the stalls of checkpoints, over the time since the start, with the run's events."""
    start = record.events[0].at

    def minutes(at: datetime) -> float:
        return (at - start).total_seconds() / 60

    rates = [(line.at, line.images_per_second) for line in lines if isinstance(line, TrainingLine)]
    stalls = [(line.at, 1000 * line.stall_seconds) for line in lines if isinstance(line, CheckpointLine)]
    figures = {}
    for name, chosen, unit, mark in (
        ("throughput", rates, "images per second", "."),
        ("stalls", stalls, "training stood still (ms)", "s"),
    ):
        figure, axes = _figure("minutes since the start", unit)
        x, y = [minutes(at) for at, _ in chosen], [value for _, value in chosen]
        if name == "stalls":
            axes.vlines(x, 0, y, color=_BLUE, linewidth=min(2, 200 / max(len(x), 1)))
        axes.plot(x, y, mark, color=_BLUE, label="checkpoint" if name == "stalls" else "measured")
        _mark_events(axes, record, minutes)
        axes.set_ylim(0, 1.1 * max(y, default=0) or 1)
        axes.set_xlim(0, 1.02 * max((minutes(line.at) for line in lines), default=1))
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=10)
        figures[name] = _svg(figure)
    return figures


def goodput(found: Goodput) -> str:
    """Where the time went: a bar for each part of it."""
    figure, axes = _figure("minutes", "")
    names, shares = list(found.shares), list(found.shares.values())
    minutes = [share * found.wall / 60 for share in shares]
    colours = [_BLUE if name == "training" else _ORANGE for name in names]
    bars = axes.barh(names, minutes, color=colours)
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], padding=4, fontsize=10)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    return _svg(figure)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """How many images of each class (rows) were classified as which (columns)."""
    counts, names = np.asarray(matrix), [figure_label(name) for name in classes]
    figure, axes = _figure("predicted", "true", size=(6.4, 6.0))
    axes.grid(visible=False)
    axes.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="cividis", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    for (row, column), count in np.ndenumerate(counts):
        bright = count > counts[row].sum() / 2
        # In its cell it needs no room of its own, for which each would be measured.
        text = axes.text(column, row, str(count), ha="center", va="center", fontsize=10, in_layout=False)
        text.set_color("black" if bright else "white")
    return _svg(figure)


def reliability(bins: Sequence[Bin]) -> str:
    """Accuracy over confidence. On the diagonal, a confidence of 80 % is right 80 times in 100."""
    figure, axes = _figure("confidence (%)", "of these correct (%)")
    axes.plot([0, 100], [0, 100], "--", color=_GREY, label="perfectly calibrated")
    axes.plot(
        [100 * bin.confidence for bin in bins],
        [100 * bin.accuracy for bin in bins],
        "o-",
        color=_BLUE,
        label="measured",
    )
    axes.legend(frameon=False, loc="upper left")
    return _svg(figure)


def nights(began: Sequence[datetime], accuracies: Sequence[float], promoted: Sequence[bool]) -> str:
    """Test accuracy of earlier runs and of this one, oldest first."""
    figure, axes = _figure("", "test accuracy (%)")
    x, y = np.arange(len(began)), 100 * np.asarray(accuracies)
    axes.plot(x, y, "-", color=_GREY, linewidth=1)
    for chosen, colour, marker, label in (
        (np.asarray(promoted), _BLUE, "o", "promoted"),
        (~np.asarray(promoted), _ORANGE, "X", "not promoted"),
    ):
        if chosen.any():
            axes.plot(x[chosen], y[chosen], marker, color=colour, label=label, markersize=8, linestyle="none")
    _name_nights(axes, began)
    axes.margins(y=0.2)
    axes.legend(frameon=False)
    return _svg(figure)


def goodputs(began: Sequence[datetime], shares: Sequence[float | None]) -> str:
    """The goodput of the same nights, as far as it is known."""
    figure, axes = _figure("", "goodput (%)")
    axes.bar(range(len(began)), [100 * (share or 0) for share in shares], color=_BLUE)
    _name_nights(axes, began)
    axes.set_ylim(0, 100)
    return _svg(figure)


def _name_nights(axes: Axes, began: Sequence[datetime]) -> None:
    """Name as many nights below the axis as there is room for, the last among them."""
    every = -(-len(began) // _MOST_NAMED)
    named = range(len(began))[::-every]
    labels = [f"{began[number]:%m-%d %H:%M}" for number in named]
    axes.set_xticks(named, labels, rotation=45, ha="right", rotation_mode="anchor", fontsize=10)


def _mark_events(axes: Axes, record: RunRecord, minutes: Any) -> None:
    """Shade the time in which nobody trained, and mark what happened when."""
    stopped, labelled = None, set()
    for event in record.events:
        if event.what in ("interrupted", "failed"):
            stopped = event.at
        elif event.what == "resumed":
            # A killed trainer leaves no event: its last sign of life is the checkpoint before.
            known = [checkpoint.written_at for checkpoint in record.checkpoints if checkpoint.written_at < event.at]
            since = stopped or max(known, default=record.events[0].at)
            label = None if "gap" in labelled else "interrupted"
            axes.axvspan(minutes(since), minutes(event.at), fc=_ORANGE, ec=_GREY, alpha=0.4, hatch="//", label=label)
            labelled.add("gap")
            stopped = None
        elif event.what in ("skipped", "unprotected"):
            label = None if event.what in labelled else event.what
            axes.axvline(minutes(event.at), color=_VERMILION, linestyle=":", label=label)
            labelled.add(event.what)


def _figure(x: str, y: str, size: tuple[float, float] = (5.6, 3.4)) -> tuple[Figure, Axes]:
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    for axes in figure.axes:
        for line in axes.lines:
            line.set_rasterized(len(line.get_path()) > _MOST_MARKS)
            if len(line.get_path()) > _MOST_LARGE:
                line.set_markersize(2)
        for marks in axes.collections:
            marks.set_rasterized(len(marks.get_paths()) > _MOST_MARKS)
    figure.dpi = 200  # of what is an image
    with mpl.rc_context(_STYLE):
        # `Figure.savefig` draws it twice, for the same file.
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})  # type: ignore[no-untyped-call]
    return buffer.getvalue()
