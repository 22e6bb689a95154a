"""Looks at what came in since the champion was trained. It informs, and decides nothing.

If a part fails, the document says so in a sentence. The verdict is given all the same.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from nightshift import progress
from nightshift.data.specs import SPECS
from nightshift.errors import LeaseLostError, StorageUnreachableError
from nightshift.judging import label_errors
from nightshift.judging.arrivals import Arrivals, Counts, Image, arrivals, judged
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
    read_drift,
)
from nightshift.judging.tonight import Tonight
from nightshift.records.champions import read_card_of
from nightshift.records.history import read_history
from nightshift.records.run import read_record
from nightshift.records.versions import ModelCard, read_card
from nightshift.refs import ModelRef
from nightshift.storage import documents
from nightshift.storage.store import Store
from nightshift.text import plain

if TYPE_CHECKING:
    from nightshift.judging.published import Seen

MOST_NEW = 2000
"""How many new images the champion is shown, and how many old ones beside them."""
MOST_JUDGED = 10_000
"""How many test and validation images the candidate is shown, to find wrong labels."""
_FEWEST = 20
"""With fewer new images, or fewer old ones, nothing is tested."""
_MOST_VALUES = 2**24
"""The most probabilities computed for a set of images: 64 MiB. With very many classes, fewer images are looked at."""


def note_drift(store: Store, candidate: ModelRef, tonight: Tonight) -> None:
    """Look at what came in since the champion was trained, and store it for the report, unless that was done before.

    A finished run is left as it is. A data set that is known by content never changes, so nothing is noted for it.

    Raises:
        StorageUnreachableError: the store does not answer. No other failure goes further than the document.
        LeaseLostError: another trainer has taken the run over since.
    """
    if candidate.name in SPECS:
        return
    started, attempt = time.monotonic(), _Attempts()
    drift = Drift(run_id=candidate.run_id, weights_sha256=candidate.weights_sha256)
    with attempt("the versions"):
        if read_record(store, candidate.run_id)[0].result:  # it is finished: its verdict stands, and so does this
            return
        ours, theirs = _cards(store, candidate)
        if theirs:
            drift = drift.changed(champion=theirs.version, champion_sha256=theirs.weights_sha256)
        if _is_noted(store, drift):
            return
        with progress.current().transfer("looking at what came in", None):
            drift = drift.changed(**_looked_at(store, ours, theirs, tonight, attempt))
    drift = drift.changed(problems=attempt.problems[:MOST_PROBLEMS], seconds=time.monotonic() - started)
    with attempt("the account"):
        store.put(drift_key(drift.run_id), documents.encoded(drift))


class _Attempts:
    """Goes on after what fails, and remembers why it did."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    @contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        try:
            yield
        except (StorageUnreachableError, LeaseLostError):  # the verdict itself would fail of these
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            self.problems.append(plain(f"{what}: {reason}")[:1000])
            progress.current().warn(f"what came in cannot be told in full: {self.problems[-1]}")


def _cards(store: Store, candidate: ModelRef) -> tuple[ModelCard, ModelCard | None]:
    """The candidate's, and that of the champion before it."""
    ours, history = read_card(store, candidate.name, candidate.version), read_history(store, candidate.name)
    live = history.champion
    version = live and (live.previous if live.version == ours.version else live.version)
    return ours, read_card_of(store, history, version) if version else None


def _is_noted(store: Store, drift: Drift) -> bool:
    found = read_drift(store, drift.run_id)
    if not found or found.problems:
        return False
    of = {"weights_sha256", "champion", "champion_sha256"}
    return found.model_dump(include=of) == drift.model_dump(include=of)


def _looked_at(
    store: Store, ours: ModelCard, theirs: ModelCard | None, tonight: Tonight, attempt: _Attempts
) -> dict[str, Any]:
    """The fields of the document, as far as they can be told."""
    fields: dict[str, Any] = {}
    labels = _Labels() if label_errors.is_installed() else None
    if labels:
        with attempt("likely wrong labels"):
            images = judged(store, ours.name, ours.dataset_digest, _as_many(MOST_JUDGED, ours))
            labels.ask("candidate", ours, images, tonight.seen(ours, images))
    if theirs and theirs.dataset_digest == ours.dataset_digest:
        fields["came_in"] = CameIn(images=0)
    elif theirs:
        with attempt("what came in"):
            most = _as_many(MOST_NEW, theirs)
            found = arrivals(store, ours.name, ours.dataset_digest, theirs.dataset_digest, most)
            with attempt("the classes"):
                fields["labels"] = label_shift(found.counts)
            fields["came_in"] = CameIn(images=found.came)
            if found.new:
                seen = tonight.seen(theirs, [*found.new, *found.old])
                fields["came_in"] = came_in(theirs, found, seen)
                if labels:
                    with attempt("likely wrong labels"):
                        labels.ask("champion", theirs, found.new, seen)
    if labels and labels.looked_at:
        fields["label_errors"] = labels.found()
    return fields


def _as_many(most: int, card: ModelCard) -> int:
    return max(min(most, _MOST_VALUES // len(card.classes)), 1)


def label_shift(counts: Counts) -> LabelShift:
    """How the classes of the images to train on have moved."""
    before, tonight, came, went = (
        sum(group.values()) for group in (counts.before, counts.tonight, counts.came, counts.went)
    )
    moved = counts.moved()
    return LabelShift(
        before=before,
        tonight=tonight,
        came=came,
        went=went,
        distance=min(sum(map(abs, moved.values())) / 2, 1.0),
        p_value=counts.p_value(),
        moved=[
            Moved(name=name, before=counts.before.get(name, 0), tonight=counts.tonight.get(name, 0), moved=share)
            for name, share in list(moved.items())[:MOST_MOVED]
        ],
    )


def came_in(card: ModelCard, found: Arrivals, seen: "Seen") -> CameIn:
    """What the champion says of the new images.

    Args:
        seen: what it says of the new images, and then of the old ones.
    """
    count = len(found.new)
    probabilities, features = seen.probabilities.numpy(), seen.features
    fields: dict[str, Any] = {}
    if min(count, len(found.old)) >= _FEWEST:
        from scipy.stats import mannwhitneyu  # here, because it costs every start half a second

        from nightshift.data.chance import generator_of  # these import torch
        from nightshift.judging.two_samples import discrepancy, distances

        confidence = probabilities.max(1)
        fields["confidence_p"] = float(mannwhitneyu(confidence[:count], confidence[count:], method="asymptotic").pvalue)
        found_p = discrepancy(features[:count], features[count:], generator_of(0, "drift"))
        fields["discrepancy"], fields["p_value"] = found_p
        far = distances(features[:count], features[count:])
        fields["unusual"] = [
            _unusual(card, found.new[at], probabilities[at], float(far[at]))
            for at in far.argsort(descending=True, stable=True)[:MOST_SHOWN].tolist()
        ]
    return CameIn(
        images=found.came,
        new=_looked(card, found.new, probabilities[:count]),
        old=_looked(card, found.old, probabilities[count:]),
        **fields,
    )


def _looked(card: ModelCard, images: Sequence[Image], probabilities: np.ndarray) -> Looked | None:
    if not images:
        return None
    known = set(card.classes)
    is_right = [
        card.classes[number] == image.label
        for number, image in zip(probabilities.argmax(1), images, strict=True)
        if image.label in known
    ]
    from scipy.stats import binomtest  # as above

    share = binomtest(sum(is_right), len(is_right)) if is_right else None
    return Looked(
        images=len(images),
        known=len(is_right),
        accuracy=share.statistic if share else None,
        interval=tuple(share.proportion_ci(0.95, method="wilson")) if share else None,
        confidence=float(probabilities.max(1).mean(dtype=np.float64)),
    )


def _unusual(card: ModelCard, image: Image, probabilities: np.ndarray, distance: float) -> Unusual:
    predicted = int(probabilities.argmax())
    return Unusual(
        **image._asdict(),
        predicted=card.classes[predicted],
        confidence=float(probabilities[predicted]),
        distance=distance,
    )


class _Labels:
    """The labels doubted by models that were not trained on these images. The first model to see an image judges it."""

    def __init__(self) -> None:
        self.looked_at: set[Image] = set()
        self._suspects: list[Suspect] = []

    def ask(self, by: Literal["candidate", "champion"], card: ModelCard, images: Sequence[Image], seen: "Seen") -> None:
        """`seen` begins with these images. Those of classes that the model does not know are left out."""
        numbers = {name: number for number, name in enumerate(card.classes)}
        known = [at for at, image in enumerate(images) if image.label in numbers]
        labels = np.array([numbers[images[at].label] for at in known], np.int64)
        probabilities = seen.probabilities.numpy()[known]
        for place in label_errors.suspects(labels, probabilities).tolist():
            image, given, others = images[known[place]], labels[place], probabilities[place].copy()
            others[given] = -1
            if image not in self.looked_at:
                self._suspects.append(
                    Suspect(
                        **image._asdict(),
                        by=by,
                        suggested=card.classes[others.argmax()],
                        given=float(probabilities[place, given]),
                        probability=float(others.max()),
                    )
                )
        self.looked_at.update(images[at] for at in known)

    def found(self) -> LabelErrors:
        worst = sorted(self._suspects, key=lambda suspect: suspect.given)[:MOST_SHOWN]
        return LabelErrors(images=len(self.looked_at), found=len(self._suspects), suspects=worst)
