"""What a person sees: a live bar while it runs, tables when it is done."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from nightshift.cli.screen import Screen, styled
from nightshift.judging.nights import Night, Refused
from nightshift.progress import StepReport
from nightshift.records.history import Pin, Transition
from nightshift.records.index import Overview
from nightshift.records.run import RunRecord
from nightshift.text import plain

_STATUS_COLOURS = {"finished": "green", "running": "cyan", "interrupted": "yellow", "lost": "yellow", "failed": "red"}


class TerminalProgress:
    """Progress as bars on a terminal; elsewhere as one line an event and one an epoch."""

    def __init__(self, console: Screen) -> None:
        self._console = console
        self._transfers = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._waiting = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._training = Progress(
            TextColumn("epoch {task.fields[epoch]}/{task.fields[epochs]}"),
            BarColumn(bar_width=None),
            TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[rate]:,.0f} images/s"),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("accuracy {task.fields[accuracy]:5.1%}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._trained: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:  # elsewhere rich would print an empty line
            self._training.stop()

    @contextmanager
    def transfer(self, what: str, size: int | None) -> Iterator[Callable[[int], object]]:
        if size is None:
            with self.waiting(what):
                yield lambda count: None
            return
        with self._transfers:
            task = self._transfers.add_task(plain(what), total=size)
            yield lambda count: self._transfers.advance(task, count)
            self._transfers.remove_task(task)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Something of unknown length goes on."""
        if not self._console.is_terminal:
            self.say(what)
            yield
            return
        with self._waiting:
            task = self._waiting.add_task(plain(what), total=None)
            yield
            self._waiting.remove_task(task)

    def trained(self, report: StepReport, epoch_ended: bool) -> None:
        fields: dict[str, Any] = {
            "epoch": report.epoch,
            "epochs": report.epochs,
            "rate": report.images_per_second,
            "loss": report.loss,
            "accuracy": report.accuracy,
        }
        if self._trained is None:
            self._training.start()
            self._trained = self._training.add_task(
                "training", total=report.total_steps, completed=report.step, **fields
            )
        else:
            self._training.update(self._trained, completed=report.step, **fields)
        if epoch_ended:
            width = len(str(report.epochs))
            self._console.print(
                f"  epoch {report.epoch:{width}}/{report.epochs}   loss {report.loss:.3f}   "
                f"training accuracy {report.accuracy:6.1%}{report.validation}   "
                f"{report.images_per_second:7,.0f} images/s",
                soft_wrap=True,
            )
        if report.step == report.total_steps:
            self.__exit__()

    def say(self, message: str) -> None:
        self._console.print(styled("·", "dim"), message, soft_wrap=True)

    def warn(self, message: str) -> None:
        self._console.print(styled("!", "yellow"), message, soft_wrap=True)


def status_text(status: str) -> Text:
    return styled(status, _STATUS_COLOURS.get(status, "white"))


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2%}"


def size_text(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def facts_table(facts: Mapping[str, str | Text]) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table


def lines_table(lines: list[dict[str, Any]]) -> Table:
    """A row a line; all lines have the same columns, and their values are printed as they are."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in lines[0]:
        table.add_column(name, overflow="fold")
    for line in lines:
        table.add_row(*("–" if value is None else str(value) for value in line.values()))
    return table


def runs_table(runs: Sequence[Overview]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("run", "status", "step", "accuracy", "updated (UTC)"):
        table.add_column(name, justify="right" if name in ("step", "accuracy") else "left", no_wrap=True)
    for run in runs:
        table.add_row(
            run.run_id,
            status_text(run.status),
            f"{run.step:,}/{run.total_steps:,}",
            percent(run.test_accuracy),
            f"{run.updated_at:%Y-%m-%d %H:%M}",
        )
    return table


def nights_table(nights: Sequence[Night], refused: Sequence[Refused]) -> Table:
    has_cost = any(night.cost is not None for night in nights)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    numbers = ["accuracy", "95 %", "images", "minutes", "goodput", *["cost"] * has_cost]
    for column in ("began (UTC)", "run", "verdict", *numbers, "why"):
        justify: Any = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column != "why")
    rows: list[Night | Refused] = [*nights, *refused]
    for row in sorted(rows, key=lambda row: row.at, reverse=True):
        cells = _night_cells(row, has_cost) if isinstance(row, Night) else _refused_cells(row, len(numbers))
        table.add_row(f"{row.at:%Y-%m-%d %H:%M}", *cells)
    return table


def _night_cells(night: Night, has_cost: bool) -> list[Text | str]:
    low, high = night.interval or (None, None)
    went_live = True if night.promoted_by_hand else night.promoted
    by_hand = f" (by hand, {night.promoted_by_hand})" if night.promoted_by_hand else ""
    by_the_clock = f" (ended by the clock, step {night.last_step:,})" if night.last_step else ""
    return [
        night.run_id,
        status_text(night.status) if went_live is None else verdict_text(went_live),
        percent(night.test_accuracy),
        "–" if low is None or high is None else f"{100 * low:.1f} to {100 * high:.1f}",
        "–" if night.test_images is None else f"{night.test_images:,}",
        f"{night.train_seconds / 60:,.1f}",
        "–" if night.goodput is None else f"{night.goodput:.0%}",
        *([f"{night.cost:,.2f}" if night.cost is not None else "–"] if has_cost else []),
        night.reason + by_the_clock + by_hand,
    ]


def _refused_cells(refused: Refused, numbers: int) -> list[Text | str]:
    return ["–", styled("refused", "red"), *["–"] * numbers, f"{refused.dataset}: {refused.reason}"]


def verdict_text(promoted: bool) -> Text:
    return styled("went live", "green") if promoted else styled("kept back", "yellow")


def transitions_table(transitions: list[Transition]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("when (UTC)", "what", "version", "accuracy", "who", "why"):
        table.add_column(name, justify="right" if name == "accuracy" else "left", overflow="fold")
    for entry in reversed(transitions):
        when = f"{entry.at:%Y-%m-%d %H:%M:%S}"
        table.add_row(when, entry.what, entry.version, percent(entry.test_accuracy), entry.author, entry.reason)
    return table


def pins_table(pins: list[Pin]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("when (UTC)", "what", "version", "who", "why"):
        table.add_column(name, overflow="fold")
    for entry in reversed(pins):
        table.add_row(f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.what, entry.version, entry.who, entry.reason)
    return table


def checkpoints_table(record: RunRecord) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for name in ("step", "epoch", "size", "sha256", "written (UTC)", "object"):
        table.add_column(name, justify="right" if name in ("step", "epoch", "size") else "left", overflow="fold")
    for checkpoint in record.checkpoints:
        table.add_row(
            f"{checkpoint.step:,}",
            str(checkpoint.epoch),
            size_text(checkpoint.bytes),
            checkpoint.sha256[:12],
            f"{checkpoint.written_at:%Y-%m-%d %H:%M:%S}",
            checkpoint.key.rpartition("/")[2],
        )
    return table


def curve_table(record: RunRecord) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="bold")
    is_validated = any(point.validation_accuracy is not None for point in record.curve)
    names = ("epoch", "step", "loss", "training accuracy", "validation loss", "validation accuracy")
    for name in names if is_validated else names[:4]:
        table.add_column(name, justify="right")
    for point in record.curve:
        row = [f"{point.epoch}", f"{point.step:,}", f"{point.loss:.4f}", percent(point.accuracy)]
        if is_validated:
            loss = "–" if point.validation_loss is None else f"{point.validation_loss:.4f}"
            row += [loss, percent(point.validation_accuracy)]
        table.add_row(*row)
    return table
