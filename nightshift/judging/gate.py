"""The champion gate: is the candidate better than what is live, on the same test images?

Two models that see the same images are compared image by image (paired). Both classify most images alike, and those
say nothing of the difference: so half a point can be found that two separate intervals would hide.
"""

import math

import numpy as np
from safetensors.numpy import load as load_safetensors

from nightshift.records import champions
from nightshift.records.champions import History, Transition
from nightshift.records.versions import ModelCard, read_card, read_file
from nightshift.refs import Comparison, ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.storage.store import Store

SIGNIFICANCE = 0.05
PREDICTIONS = "predictions.safetensors"
"""A file of each version: `predicted` and `labels`, uint8 (N,), of the test images in the data set's order."""


def promote(store: Store, candidate: ModelRef, settings: GateSettings) -> Verdict:
    """Compare a published version with the champion, and make it the champion if it passes.

    The champion that is compared with is the one that is replaced: if another candidate was promoted meanwhile, the
    comparison is made again, with that one. A run that passed before is not promoted a second time.

    Raises:
        StorageError: the store fails.
    """
    decision = f"gate/{candidate.version}"
    card = read_card(store, candidate.name, candidate.version)
    verdict: Verdict

    def decide(history: History) -> Transition | None:
        nonlocal verdict
        verdict = _judge(store, card, history, settings)
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

    history = champions.change_champion(store, candidate.name, decision, decide)
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


def _judge(store: Store, card: ModelCard, history: History, settings: GateSettings) -> Verdict:
    accuracy, champion, comparison = card.test_accuracy, history.champion, None
    if champion and champion.version == card.version:
        promoted, reason = True, "it is the champion already"
    elif accuracy < settings.min_accuracy:
        promoted, reason = False, f"{accuracy:.2%} is below min_accuracy ({settings.min_accuracy:.2%})"
    elif not champion:
        promoted, reason = True, f"{accuracy:.2%}, and there was no champion"
    else:
        theirs = read_card(store, champion.name, champion.version)
        if theirs.dataset_digest != card.dataset_digest:
            promoted, reason = (
                False,
                f"champion {champion.version} was tested on other images, so the two cannot be compared. "
                f"To promote it all the same: nightshift promote {card.version}",
            )
        else:
            comparison = compare(_correct(store, card), _correct(store, theirs), champion.version)
            promoted, reason = _weigh(comparison, settings)
    return Verdict(promoted=promoted, reason=reason, comparison=comparison, champion=champion)


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


def _correct(store: Store, card: ModelCard) -> np.ndarray:
    """Whether a version classified each test image correctly, bool (N,)."""
    stored = load_safetensors(read_file(store, card, PREDICTIONS))
    return np.asarray(stored["predicted"] == stored["labels"])
