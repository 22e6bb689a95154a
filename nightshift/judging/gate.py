"""The champion gate: is the candidate better than what is live, on the same test images?

Two models that see the same images are compared image by image (paired). Both classify most images alike, and those
say nothing of the difference: so half a point can be found that two separate intervals would hide.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load as load_safetensors

from nightshift import progress
from nightshift.errors import DocumentDamagedError, DocumentNewerError, HistoryLostError, RunNotFoundError
from nightshift.records import champions
from nightshift.records.history import History, Transition
from nightshift.records.rebuild import check_explained
from nightshift.records.run import read_record
from nightshift.records.versions import ModelCard, read_card, read_tensors
from nightshift.refs import Comparison, ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.storage.store import Store

SIGNIFICANCE = 0.05
PREDICTIONS = "predictions.safetensors"
"""A file of each version: `predicted` and `labels` of the test images in the data set's order.

Both are uint8 (N,), or int32 (N,) where there are more than 256 classes.
"""
_UNDECIDABLE = (DocumentDamagedError, DocumentNewerError, HistoryLostError)
"""What keeps the gate from deciding, however often it is asked: a person has to mend something first."""


def promote(store: Store, candidate: ModelRef, settings: GateSettings) -> Verdict:
    """Compare a published version with the champion, and make it the champion if it passes.

    The champion that is compared with is the one that is replaced: if another candidate was promoted meanwhile, the
    comparison is made again, with that one. The verdict on a finished run stands, and a run that passed before is not
    promoted a second time. Where it cannot be decided, since the history or a published file is damaged or missing,
    nothing is promoted, and the verdict says what to do.

    Raises:
        ModelNotFoundError: the candidate is not published.
        StorageError: the store fails, or the candidate's own card is damaged.
    """
    if earlier := _recorded_verdict(store, candidate.run_id):
        return earlier
    decision = f"gate/{candidate.version}"
    card = read_card(store, candidate.name, candidate.version)
    verdict: Verdict

    def decide(history: History) -> Transition | None:
        nonlocal verdict
        try:
            verdict = _held_by_pin(_judge(store, card, history, settings), card, history)
        except _UNDECIDABLE as error:
            verdict = _undecided(card, error, history)
        if not verdict.promoted or (history.champion and history.champion.version == candidate.version):
            return None
        return history.next(
            card,
            id=decision,
            at=store.now(),
            what="promoted",
            reason=verdict.reason,
            comparison=verdict.comparison,
        )

    try:
        history = champions.change_champion(store, candidate.name, decision, decide)
    except _UNDECIDABLE as error:
        return _undecided(card, error, None)
    made = history.find(decision)
    if made:  # by this call or by an earlier one
        return Verdict(promoted=True, reason=made.reason, comparison=made.comparison, champion=history.champion)
    return verdict


def compare(candidate: np.ndarray, champion: np.ndarray, name: str) -> Comparison:
    """Compare two classifiers on the same images.

    The test is McNemar's (1947) in its exact form, a binomial test on the images that only one of them has right. The
    interval is that of Bonett and Price (2012) for the difference of paired proportions, which also holds where the
    two hardly differ.

    Args:
        candidate, champion: bool (N,), whether each image was classified correctly.
        name: the champion's version.
    """
    from scipy.stats import binomtest, norm  # here, because it costs every start half a second

    images = len(candidate)
    gained, lost = int((candidate & ~champion).sum()), int((champion & ~candidate).sum())
    p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    share_gained, share_lost = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    middle = share_gained - share_lost
    half = norm.ppf(1 - SIGNIFICANCE / 2) * math.sqrt((share_gained + share_lost - middle**2) / (images + 2))
    return Comparison(
        champion=name,
        images=images,
        only_candidate=gained,
        only_champion=lost,
        difference=(gained - lost) / images,
        low=float(middle - half),
        high=float(middle + half),
        p_value=float(p_value),
    )


def _recorded_verdict(store: Store, run_id: str) -> Verdict | None:
    """What the record of a finished run says that the gate has said; None if it was not asked, or is about to be."""
    with suppress(RunNotFoundError):
        result = read_record(store, run_id)[0].result
        return result.verdict if result else None
    return None


def _undecided(card: ModelCard, error: Exception, history: History | None) -> Verdict:
    return Verdict(
        promoted=False,
        reason=f"it cannot be compared with what is live: {error}. To promote it all the same, once that is mended: "
        f"nightshift promote {card.version}",
        comparison=None,
        champion=history.champion if history else None,
    )


def _held_by_pin(verdict: Verdict, card: ModelCard, history: History) -> Verdict:
    pin = history.pin
    if not pin or not verdict.promoted or (history.champion and history.champion.version == card.version):
        return verdict
    held = (
        f"{verdict.reason}: it would go live, but {pin.who} has pinned the champion on {pin.at:%Y-%m-%d} "
        f"({pin.reason}). To promote it all the same: nightshift promote {card.version}. To let the gate decide again: "
        "nightshift unpin"
    )
    return verdict.model_copy(update={"promoted": False, "reason": held})


def _judge(store: Store, card: ModelCard, history: History, settings: GateSettings) -> Verdict:
    champion = history.champion
    if champion and champion.version == card.version:
        return Verdict(promoted=True, reason="it is the champion already", comparison=None, champion=champion)
    if not champion:
        check_explained(store, card.name, card.version)
    theirs = champions.read_card_of(store, history, champion.version) if champion else None
    comparison = None
    reason = _reason_to_refuse(store, card, theirs, history, settings)
    if reason or not theirs:
        promoted, reason = not reason, reason or f"{card.test_accuracy:.2%}, and there was no champion"
    else:
        ours = _read_answers(store, card)
        comparison = compare(*_correct(store, ours, theirs), theirs.version)
        promoted, reason = _weigh(comparison, settings)
        if promoted and (slide := _slide(store, ours, theirs, history, settings)):
            promoted, reason = False, f"{reason}: {slide}"
    return Verdict(promoted=promoted, reason=reason, comparison=comparison, champion=champion)


def _reason_to_refuse(
    store: Store, card: ModelCard, champion: ModelCard | None, history: History, settings: GateSettings
) -> str | None:
    """Why a candidate is not even compared with the champion; None if it is, or if there is no champion."""
    if champion and champion.weights_sha256 == card.weights_sha256:
        return f"it has the same weights as champion {champion.version}: nothing changes"
    for version in history.rejected_by_hand:
        if card.weights_sha256 == _weights_of(store, history, version):
            return (
                f"it has the weights of {version}, from which somebody rolled back. "
                f"To promote it all the same: nightshift promote {card.version}"
            )
    if card.test_accuracy < settings.min_accuracy:
        return f"{card.test_accuracy:.2%} is below min_accuracy ({settings.min_accuracy:.2%})"
    if champion and champion.dataset_digest != card.dataset_digest:
        return (
            f"champion {champion.version} was tested on other images, so the two cannot be compared. "
            f"To promote it all the same: nightshift promote {card.version}"
        )
    return None


def _weights_of(store: Store, history: History, version: str) -> str | None:
    """The sha256 of a former champion's weights; None if neither the history nor its card says it."""
    recorded = {entry.version: entry.weights_sha256 for entry in history.transitions}
    with _past_left_out(version):
        return recorded.get(version) or champions.read_card_of(store, history, version).weights_sha256
    return None


@contextmanager
def _past_left_out(version: str) -> Iterator[None]:
    """What is left of a former champion, or what has become of it, does not keep the next one from going live."""
    try:
        yield
    except DocumentDamagedError as error:
        progress.current().warn(f"nothing is compared with {version}, which was champion: {error}")


def _slide(
    store: Store, candidate: "_Answers", champion: ModelCard, history: History, settings: GateSettings
) -> str | None:
    """How the candidate lies too far below the best champion since the last change by hand; None if it does not.

    Each night may be a little worse than the one before: without this, small steps down add up.
    """
    newest = history.since_last_change_by_hand
    best = max(newest, key=lambda entry: entry.test_accuracy, default=None)
    if not best or best.version == champion.version:
        return None
    with _past_left_out(best.version):
        theirs = champions.read_card_of(store, history, best.version)
        if theirs.dataset_digest == candidate.card.dataset_digest:
            allowed = settings.max_regression if settings.max_slide is None else settings.max_slide
            ours, best_of_all = _correct(store, candidate, theirs)
            lost, images = int(best_of_all.sum()) - int(ours.sum()), len(ours)
            if lost > allowed * images + 1e-6:
                below = f"{100 * lost / images:.2f} points below {best.version}"
                return f"{below}, the best champion since {best.at:%Y-%m-%d}; max_slide allows {100 * allowed:.2f}"
    return None


def _weigh(found: Comparison, settings: GateSettings) -> tuple[bool, str]:
    reason = (
        f"{100 * found.difference:+.2f} points against champion {found.champion} (95 % interval {100 * found.low:+.2f} "
        f"to {100 * found.high:+.2f}, p = {found.p_value:.2g})"
    )
    # Counted in images: -0.005 and (120 - 170) / 10000 need not be the same floating-point number.
    if found.only_champion - found.only_candidate > settings.max_regression * found.images + 1e-6:
        return False, f"{reason}: worse than max_regression ({100 * settings.max_regression:.2f} points) allows"
    if settings.require_significance and not (found.difference > 0 and found.p_value < SIGNIFICANCE):
        return False, f"{reason}: not significantly better, which require_significance asks for"
    return True, reason


@dataclass(frozen=True)
class _Answers:
    """What a version said of each test image, and what is right: uint8 or int32 (N,)."""

    card: ModelCard
    predicted: np.ndarray
    labels: np.ndarray


def _correct(store: Store, ours: _Answers, champion: ModelCard) -> tuple[np.ndarray, np.ndarray]:
    """Whether the candidate, and a version that is or was champion, classified each test image correctly, bool (N,).

    Raises:
        DocumentDamagedError: predictions are not what was published, or the two are not of the same images.
        StorageError: they cannot be read.
    """
    theirs = _read_answers(store, champion)
    if not np.array_equal(ours.labels, theirs.labels):
        raise DocumentDamagedError(
            f"the predictions of {ours.card.version} and {champion.version} are of other images, though both name the "
            "same data set. Promote by hand, or train and publish under another run id"
        )
    return ours.predicted == ours.labels, theirs.predicted == theirs.labels


def _read_answers(store: Store, card: ModelCard) -> _Answers:
    return _Answers(card, *read_tensors(store, card, PREDICTIONS, _predictions))


def _predictions(body: bytes) -> tuple[np.ndarray, np.ndarray]:
    stored = load_safetensors(body)
    predicted, labels = stored["predicted"], stored["labels"]
    if predicted.dtype not in (np.uint8, np.int32) or predicted.dtype != labels.dtype:
        raise ValueError("predicted and labels are not both uint8 or both int32")
    if not predicted.shape == labels.shape == (labels.size or 1,):
        raise ValueError("predicted and labels are not of one length")
    return predicted, labels
