"""Small frozen values that cross task boundaries in place of tensors.

Each names something in the store. A reference that is read from a stored result is validated again.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nightshift.ids import DatasetName, RunId, Sha256
from nightshift.values import FROZEN, MOST_CLASSES, Count, ImageSize, Line, Loss, Number, Seconds, Share, Text

MOST_GUARDS = 20
"""How many guards a verdict names beside the whole: there may be one for each of 100,000 classes."""


class _Ref(BaseModel):
    model_config = FROZEN | ConfigDict(extra="forbid")


class Finding(_Ref):
    """What a rule found in a night's images."""

    rule: Line
    ok: bool
    """False: the rule is broken, and the night trains nothing."""
    detail: Text


class SnapshotRef(_Ref):
    """A snapshot of a data set, and how it differs from the one before."""

    name: DatasetName
    digest: Sha256
    images: Count
    added: Count
    removed: Count
    relabelled: Count
    refused: Count
    """Images that are left out: unreadable ones, and those under several labels."""
    read: Count
    """How many images were read to make it."""
    seconds: Seconds
    findings: list[Finding]

    @property
    def ok(self) -> bool:
        return all(finding.ok for finding in self.findings)


class DatasetRef(_Ref):
    """A packed data set in the store, named by the sha256 of its content."""

    name: Line
    digest: Sha256
    key: Line
    source: Line
    classes: int = Field(10, ge=1, le=MOST_CLASSES)
    """The number of classes. References from before this field are of CIFAR-10; the same holds for `image_size`."""
    image_size: ImageSize = 32


class CheckpointRef(_Ref):
    """A committed checkpoint of a run, and the fencing token under which the run is held."""

    run_id: RunId
    step: Count
    epoch: Count
    key: Line
    bytes: Count
    sha256: Sha256
    token: Count
    clock: Text = ""
    """Why the clock has ended the training there; empty if it did not."""


class Evaluation(_Ref):
    """How well a model does on the test images, in brief. The rest is stored under `key`."""

    accuracy: Share
    loss: Loss
    images: Count
    weights_sha256: Sha256
    key: Line


class ModelRef(_Ref):
    """A published version of a model."""

    name: RunId
    version: RunId
    run_id: RunId
    key: Line
    test_accuracy: Share
    weights_sha256: Sha256


class PredictionsRef(_Ref):
    """Where predictions were written, by which version, and what could not be read."""

    out: str
    version: str
    predicted: int
    bad: list[str]
    """The images that could not be read, each with its reason."""


class Comparison(_Ref):
    """A candidate and the champion on the same test images, image by image.

    `difference` is the candidate's accuracy minus the champion's, `low` and `high` its 95 % interval, `p_value`
    that of McNemar's test.
    """

    champion: RunId
    images: Count
    only_candidate: Count
    """How many images only the candidate classifies correctly."""
    only_champion: Count
    difference: Number
    low: Number
    high: Number
    p_value: Number


class ChampionRef(_Ref):
    """The version of a model that is live."""

    name: RunId
    version: RunId
    run_id: RunId
    test_accuracy: Share
    previous: RunId | None
    """The version that was live before it."""


class Guard(_Ref):
    """A candidate and the champion on a part of tonight's test images.

    `difference` is the candidate's accuracy there minus the champion's, `low` and `high` its 95 % interval.
    """

    name: Text
    """The class, COLUMN=VALUE of a slice, or what else the part is called."""
    kind: Literal["whole", "known", "class", "slice"]
    """known: the images of all classes that the champion knows, where there are others too."""
    images: Count
    difference: Number
    low: Number
    high: Number
    p_value: Share
    """For the whole: McNemar's test. For a part: a one-sided test of being worse, corrected for their number (Holm)."""
    ok: bool
    """False: the candidate is refused for it."""


class Verdict(_Ref):
    """What the gate decided about a candidate, and which version is champion afterwards."""

    promoted: bool
    reason: Text
    comparison: Comparison | None
    """None if there was no champion, or if the candidate was the champion already."""
    champion: ChampionRef | None
    guards: list[Guard] = Field(default_factory=list, max_length=MOST_GUARDS + 1)
    """The whole, then the guards broken or closest to it. Empty if nothing was compared, and in old verdicts."""
    guarded: Count = 0
    """How many guards there were beside the whole, shown or not."""


class TrialResult(_Ref):
    """How a trial of a sweep ended."""

    run_id: RunId
    overrides: dict[str, Any]
    """The values of the swept fields."""
    status: Literal["finished", "pruned", "cancelled", "failed"]
    test_accuracy: Share | None
    validation_accuracy: Share | None = None
    """Of the weights that were kept so far; None if it has not looked at validation images."""
    train_seconds: Seconds
    reason: Text
    """Why it did not finish; empty if it did."""


class SweepResult(_Ref):
    """How a sweep ended: its trials, in the order in which they were asked for."""

    sweep_id: RunId
    trials: list[TrialResult]
    best: ModelRef | None
    """None if no trial finished."""
    verdict: Verdict | None
    """The gate's verdict on the best; None if the gate was not asked."""
