"""What came in since the champion was trained: a document of the run's report. `came_in` makes it."""

from typing import ClassVar, Literal

from pydantic import Field

from nightshift import progress
from nightshift.errors import DocumentDamagedError, DocumentNewerError, ObjectNotFoundError
from nightshift.ids import RunId, Sha256
from nightshift.records.keys import report_key
from nightshift.records.snapshots import Split
from nightshift.storage import documents
from nightshift.storage.documents import MIB, Document, Part
from nightshift.storage.store import Store
from nightshift.values import ClassName, Count, Number, Seconds, Share, Text

MOST_SHOWN = 20
"""How many unusual images and how many likely wrong labels are named."""
MOST_MOVED = 10
MOST_PROBLEMS = 10


class Moved(Part):
    """How many images to train on a class had when the champion was trained, and has tonight."""

    name: ClassName
    before: Count
    tonight: Count
    moved: Number
    """By how much its share has grown."""


class LabelShift(Part):
    """How the classes of the images to train on have moved."""

    before: Count
    tonight: Count
    """How many there are."""
    came: Count
    went: Count
    """How many of them are new, gone, or relabelled, which is both."""
    distance: Share
    """Which share of the images would have to change its class to make the shares equal (total variation)."""
    p_value: Share | None
    """Of Pearson's chi-squared test that those that stayed, came and went are of the same classes; None: too few."""
    moved: list[Moved] = Field(max_length=MOST_MOVED)
    """The classes that moved most."""


class Looked(Part):
    """What the champion says of some images that it was not trained on."""

    images: Count
    known: Count
    """How many are of classes that it knows."""
    accuracy: Share | None
    """On these; None if there are none."""
    interval: tuple[Share, Share] | None
    """95 %, by Wilson (1927)."""
    confidence: Share
    """The mean probability of the predicted class, over all."""


class Unusual(Part):
    """A new image that is far from all old ones in the champion's eyes."""

    id: Text
    split: Split
    number: Count
    """In its split."""
    label: ClassName
    predicted: ClassName
    confidence: Share
    distance: Number
    """To the tenth nearest old image, between vectors of length 1."""


class CameIn(Part):
    """The images that are new since the champion was trained, in its eyes."""

    images: Count
    """How many; each counts once, whatever copies of it there are."""
    new: Looked | None = None
    """Some of them; None if there are none, or if they could not be shown to it."""
    old: Looked | None = None
    """Some of the test images that were there before."""
    confidence_p: Share | None = None
    """Of Mann and Whitney's test that it is as sure of the new as of the old; None: too few to test."""
    discrepancy: Number | None = None
    """The squared maximum mean discrepancy between what its last layer sees of the new and of the old."""
    p_value: Share | None = None
    """Of a permutation test that they differ in that."""
    unusual: list[Unusual] = Field(default_factory=list, max_length=MOST_SHOWN)
    """Those that are furthest first."""


class Suspect(Part):
    """An image whose label is likely wrong."""

    by: Literal["candidate", "champion"]
    """Who says so."""
    id: Text
    split: Split
    number: Count
    label: ClassName
    suggested: ClassName
    given: Share
    """The probability of its label."""
    probability: Share
    """That of the other class."""


class LabelErrors(Part):
    """Labels that are likely wrong, by models that were not trained on these images."""

    images: Count
    """How many were looked at."""
    found: Count
    suspects: list[Suspect] = Field(max_length=MOST_SHOWN)
    """Those that look most wrong first."""


class Drift(Document):
    """What came in since the champion was trained; `reports/<run_id>/drift.json`."""

    title: ClassVar[str] = "account of what came in"
    if_damaged: ClassVar[str] = "Delete it: nothing depends on it"
    max_bytes: ClassVar[int] = 4 * MIB

    format: Literal[1] = 1
    run_id: RunId
    weights_sha256: Sha256
    """The candidate's."""
    champion: RunId | None = None
    """None if there was none."""
    champion_sha256: Sha256 | None = None
    """Of its weights."""
    labels: LabelShift | None = None
    came_in: CameIn | None = None
    label_errors: LabelErrors | None = None
    """None where cleanlab is not installed."""
    problems: list[Text] = Field(default_factory=list, max_length=MOST_PROBLEMS)
    """What could not be told, and why."""
    seconds: Seconds = 0
    """How long it took."""
    sha256: Sha256 | None = None

    def check(self, key: str) -> None:
        if key != drift_key(self.run_id):
            raise ValueError("it is that of another run")


def drift_key(run_id: str) -> str:
    return report_key(run_id, "drift.json")


def read_drift(store: Store, run_id: str) -> Drift | None:
    """What is stored for a run, or None if there is nothing. If it is damaged or newer, also None, with a warning.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        return documents.read(store, drift_key(run_id), Drift)[0]
    except ObjectNotFoundError:
        return None
    except (DocumentDamagedError, DocumentNewerError) as error:
        progress.current().warn(f"what came in is not shown: {error}")
        return None
