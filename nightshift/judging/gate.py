"""The champion gate: is the candidate better than what is live, on tonight's test images?

champion:     what is live; its predictions are stored, or it is tested on tonight's images
on the whole: not worse than max_regression allows
guards:       not worse than chance explains on the known classes, on a class, on a slice
slide:        not below the best champion of the last nights by more than max_slide
all passed:   the candidate becomes champion; if the champion has changed meanwhile, it is compared again
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import numpy as np

from nightshift import progress
from nightshift.errors import (
    DataCorruptError,
    DocumentDamagedError,
    DocumentNewerError,
    HistoryLostError,
    NotComparableError,
    RunNotFoundError,
    SourceError,
)
from nightshift.judging.answers import Answer, Pair, Predictions, not_at_hand, pair, read_predictions, slices
from nightshift.judging.paired import SIGNIFICANCE, Division, Guarded, compare, guard, of_whole
from nightshift.records import champions
from nightshift.records.history import History, Transition
from nightshift.records.rebuild import check_explained
from nightshift.records.run import read_record
from nightshift.records.versions import ModelCard, read_card
from nightshift.refs import Comparison, Guard, ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.storage.store import Store
from nightshift.text import plain

_UNDECIDABLE = (
    DataCorruptError,
    DocumentDamagedError,
    DocumentNewerError,
    HistoryLostError,
    NotComparableError,
    SourceError,
)
"""What keeps the gate from deciding, however often it is asked: a person has to mend something first."""
_NIGHTS = timedelta(days=30)
_NAMED = 5
"""How many classes, and how many broken guards, a reason names."""


def promote(store: Store, candidate: ModelRef, settings: GateSettings, answer: Answer = not_at_hand) -> Verdict:
    """Compare a published version with the champion, and make it the champion if it passes.

    The candidate only replaces the champion it was compared with. If another one was promoted meanwhile, the
    comparison is made again, with that one. The verdict on a finished run stands. A run that passed before is not
    promoted a second time, and its guards are not tested again. If the history or a published file is damaged or
    missing, nothing is promoted, and the verdict says what to do.

    Args:
        answer: tests a version on tonight's images if its stored predictions are for others. It may raise anything that
            `Tonight.predicted` does.

    Raises:
        ModelNotFoundError: the candidate is not published.
        StorageError: the store fails, or the candidate's own card is damaged.
    """
    if earlier := _recorded_verdict(store, candidate.run_id):
        return earlier
    decision = f"gate/{candidate.version}"
    card = read_card(store, candidate.name, candidate.version)
    verdict: Verdict | None = None

    def decide(history: History) -> Transition | None:
        nonlocal verdict
        try:
            verdict = _held_by_pin(_judge(store, card, history, settings, answer), card, history)
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
        guards = verdict.model_dump(include={"guards", "guarded"}) if verdict else {}
        return Verdict(
            promoted=True, reason=made.reason, comparison=made.comparison, champion=history.champion, **guards
        )
    assert verdict is not None
    return verdict


def _recorded_verdict(store: Store, run_id: str) -> Verdict | None:
    """The gate's verdict in the record of a finished run; None if the gate was not asked, or is about to be."""
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


def _judge(store: Store, card: ModelCard, history: History, settings: GateSettings, answer: Answer) -> Verdict:
    champion = history.champion
    if champion and champion.version == card.version:
        return Verdict(promoted=True, reason="it is the champion already", comparison=None, champion=champion)
    if not champion:
        check_explained(store, card.name, card.version)
    theirs = champions.read_card_of(store, history, champion.version) if champion else None
    reason = _reason_to_refuse(store, card, theirs, history, settings)
    if reason or not theirs:
        reason, promoted = reason or f"{card.test_accuracy:.2%}, and there was no champion", not reason
        return Verdict(promoted=promoted, reason=reason, comparison=None, champion=champion)
    ours = read_predictions(store, card)
    found = pair(store, ours, theirs, answer)
    comparison = compare(found.candidate, found.other, theirs.version)
    guarded = _guarded(store, ours, theirs, found, settings)
    on_the_whole, on_parts = _objection(comparison, settings), _objection_of_guards(guarded, settings)
    objections = [text for text in (on_the_whole, on_parts) if text]
    if not objections and (slide := _slide(store, ours, theirs, history, settings, answer)):
        objections = [slide]
    said = [f"{_points(comparison)} against champion {theirs.version} {_certainty(comparison)}"]
    said += [found.note] if found.note else []
    said += _changed_classes(ours, theirs, found)
    return Verdict(
        promoted=not objections,
        reason=": ".join(["; ".join(said), *(["; ".join(objections)] if objections else [])]),
        comparison=comparison,
        champion=champion,
        guards=[of_whole(comparison, is_ok=not on_the_whole), *guarded.worst],
        guarded=guarded.parts,
    )


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
    return None


def _weights_of(store: Store, history: History, version: str) -> str | None:
    """The sha256 of a former champion's weights; None if neither the history nor its card says it."""
    recorded = {entry.version: entry.weights_sha256 for entry in history.transitions}
    with _past_left_out(version):
        return recorded.get(version) or champions.read_card_of(store, history, version).weights_sha256
    return None


@contextmanager
def _past_left_out(version: str) -> Iterator[None]:
    """Skip a former champion, with a warning, if it is damaged or not comparable: the next may still go live."""
    try:
        yield
    except (DocumentDamagedError, NotComparableError) as error:
        progress.current().warn(f"nothing is compared with {version}, which was champion: {error}")


def _slide(
    store: Store, candidate: Predictions, champion: ModelCard, history: History, settings: GateSettings, answer: Answer
) -> str | None:
    """How far the candidate is below the best champion of the last nights, if that is too far; None otherwise.

    Each night may be a little worse than the one before. Without this check, small steps down would add up. The best
    champion is the one that was best on the test images of its own night.
    """
    recent = history.live_since(store.now() - _NIGHTS)
    best = max(recent, key=lambda entry: entry.test_accuracy, default=None)
    if not best or best.version == champion.version:
        return None
    with _past_left_out(best.version):
        theirs = champions.read_card_of(store, history, best.version)
        allowed = settings.max_regression if settings.max_slide is None else settings.max_slide
        found = pair(store, candidate, theirs, answer)
        lost, images = int(found.other.sum()) - int(found.candidate.sum()), len(found.images)
        if lost > allowed * images + 1e-6:
            below = f"{100 * lost / images:.2f} points below {best.version}"
            return f"{below}, the best champion since {best.at:%Y-%m-%d}; max_slide allows {100 * allowed:.2f}"
    return None


def _objection(found: Comparison, settings: GateSettings) -> str | None:
    # Counted in images: -0.005 and (120 - 170) / 10000 need not be the same floating-point number.
    if found.only_champion - found.only_candidate > settings.max_regression * found.images + 1e-6:
        return f"worse than max_regression ({100 * settings.max_regression:.2f} points) allows"
    if settings.require_significance and not (found.difference > 0 and found.p_value < SIGNIFICANCE):
        return "not significantly better, which require_significance asks for"
    return None


def _guarded(store: Store, ours: Predictions, theirs: ModelCard, found: Pair, settings: GateSettings) -> Guarded:
    divisions = [Division("class", ours.card.classes, np.where(found.known, found.labels, -1))]
    if not found.known.all():
        divisions.append(Division("known", [f"classes {theirs.version} knows"], np.where(found.known, 0, -1)))
    for division in slices(store, ours, settings.slice_columns):
        divisions.append(Division("slice", division.names, division.numbers[found.images]))
    return guard(found.candidate, found.other, divisions, settings.min_class_images, settings.class_regression)


def _objection_of_guards(guarded: Guarded, settings: GateSettings) -> str | None:
    if not guarded.broken:
        return None
    broken = [
        f"{plain(part.name)} ({_points(part)} on {part.images:,} images, p = {part.p_value:.2g} by Holm for "
        f"{guarded.parts:,} guard{'s' if guarded.parts > 1 else ''})"
        for part in guarded.worst[:_NAMED]
        if not part.ok
    ]
    return f"worse than max_class_regression ({100 * settings.class_regression:.2f} points) allows on " + _several(
        broken, guarded.broken
    )


def _changed_classes(ours: Predictions, theirs: ModelCard, found: Pair) -> list[str]:
    """Which classes are new or gone since the champion was trained, and how the two versions compare without them."""
    tonight, before = set(ours.card.classes), set(theirs.classes)
    tested = np.bincount(ours.labels, minlength=len(ours.card.classes))
    new = [name for name, images in zip(ours.card.classes, tested, strict=True) if images and name not in before]
    gone = [name for name in theirs.classes if name not in tonight]
    said = []
    if new:
        text = f"new since then, and so wrong for it: {_several(list(map(plain, new[:_NAMED])), len(new))}"
        if 0 < (known := int(found.known.sum())) < len(found.known):
            without = compare(found.candidate[found.known], found.other[found.known], theirs.version)
            text += f"; on the other {known:,} images {_points(without)} {_certainty(without)}"
        said.append(text)
    if gone:
        said.append(f"gone since then: {_several(list(map(plain, gone[:_NAMED])), len(gone))}")
    return said


def _several(named: list[str], count: int) -> str:
    """Some of several, and how many there are beside them."""
    return ", ".join(named) + (f" and {count - len(named):,} more" if count > len(named) else "")


def _points(found: Comparison | Guard) -> str:
    return f"{100 * found.difference:+.2f} points"


def _certainty(found: Comparison) -> str:
    return f"(95 % interval {100 * found.low:+.2f} to {100 * found.high:+.2f}, p = {found.p_value:.2g})"
