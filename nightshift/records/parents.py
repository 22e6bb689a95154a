"""What a run's first weights came from: its parent. It stands in the record before the first step, and never changes.

A run that is started again before its first checkpoint begins with the same weights, whatever went live meanwhile.
"""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Literal, Self

from pydantic import model_validator

from nightshift.ids import Sha256, parse_run_id
from nightshift.storage.documents import Part
from nightshift.values import Count, Line

if TYPE_CHECKING:
    from nightshift.records.run import RunRecord

_LOOKED_AT = 200
"""So many of the newest runs are asked what earlier nights began with."""


class Parent(Part):
    """The weights that a run begins with. Only their numbers are used, after their sha256 was found right."""

    kind: Literal["scratch", "pretrained", "champion", "shrink"]
    """scratch: random ones, although the config says otherwise; `detail` says why."""
    source: Line = ""
    """The version that was champion, or the place of a file as the config names it."""
    sha256: Sha256 | None = None
    """Of the file: `weights/<sha256>`, or `weights.safetensors` of the version."""
    bytes: Count = 0
    card_sha256: Sha256 | None = None
    """In the card of the version: it says which classes the weights are for."""
    detail: Line = ""
    """What was left out or made anew, for people."""

    @model_validator(mode="after")
    def _says_enough(self) -> Self:
        if self.kind != "scratch" and not self.sha256:
            raise ValueError("a parent says the sha256 of its weights")
        if self.kind in ("champion", "shrink"):
            parse_run_id(self.source)
        return self

    def __str__(self) -> str:
        if not self.sha256:
            return f"random weights: {self.detail}"
        whose = {"champion": "the weights of champion ", "shrink": "the shrunk weights of champion "}.get(self.kind, "")
        return f"{whose or 'the weights '}{self.source}, sha256 {self.sha256[:12]}"


def known_sha256(records: "Iterator[RunRecord]", source: str) -> Parent | None:
    """The parent with which the newest run has begun whose pretrained weights came from the same place."""
    parents = (record.parent for record in islice(records, _LOOKED_AT))
    return next((found for found in parents if found and (found.kind, found.source) == ("pretrained", source)), None)


def is_control(records: "Iterator[RunRecord]", dataset: str, every: int) -> bool:
    """Whether tonight's run has to begin from scratch, as none of the `every` - 1 nights before it did.

    Args:
        records: those of all runs, newest first. The finished nights of this data set count, and no trials of sweeps.
    """
    nights = (
        record
        for record in islice(records, _LOOKED_AT)
        if record.dataset.name == dataset and record.status == "finished" and record.origin.promote
    )
    last = list(islice(nights, every - 1))
    return len(last) == every - 1 and all(night.parent and night.parent.kind != "scratch" for night in last)
