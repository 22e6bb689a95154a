"""What may go live: a candidate meets the champion on the same images, and only one of two ever wins."""

import hashlib
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from nightshift.judging import gate
from nightshift.judging.answers import PREDICTIONS
from nightshift.judging.paired import compare
from nightshift.records import champions
from nightshift.records.history import History
from nightshift.records.run import Result
from nightshift.records.versions import ModelCard, publish_version
from nightshift.refs import ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.storage import documents
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from nightshift.workspace import Workspace
from tests.records.test_champions import transitions
from tests.records.test_lease import hold
from tests.records.test_versions import card_of
from tests.stores import Faulty

IMAGES = 10_000


def published(store: Store, accuracy: float, version: str, **changed: Any) -> ModelRef:
    """A version that has the first images right, as many as its accuracy says, and the others wrong."""
    labels = np.zeros(IMAGES, np.uint8)
    predicted = (np.arange(IMAGES) >= round(accuracy * IMAGES)).astype(np.uint8)
    card = card_of(version, **{"test_accuracy": accuracy, "weights_sha256": sha256(version), **changed})
    publish_version(store, card, {PREDICTIONS: save({"predicted": predicted, "labels": labels})})
    return card.ref()


def save_images(count: int) -> bytes:
    return save({"predicted": np.zeros(count, np.uint8), "labels": np.zeros(count, np.uint8)})


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def finish(store: Store, model: ModelRef, verdict: Verdict | None) -> None:
    """Write the record of its run, finished with this verdict."""
    result = Result(
        test_accuracy=model.test_accuracy,
        test_loss=1.0,
        weights_sha256=model.weights_sha256,
        model=model.key,
        verdict=verdict,
    )
    with hold(store, model.run_id) as run:
        run.end("finished", result=result)


def promote(store: Store, model: ModelRef, **settings: Any) -> Verdict:
    return gate.promote(store, model, GateSettings(**settings))


def test_a_better_candidate_is_promoted_an_equal_one_by_setting_and_a_worse_one_rejected(store: Store) -> None:
    first = promote(store, published(store, 0.45, "first"))
    assert (first.promoted, first.comparison) == (True, None)

    better = promote(store, published(store, 0.50, "better"), require_significance=True)
    assert better.promoted
    assert better.comparison
    assert better.comparison.champion == "first"
    assert better.comparison.low > 0
    assert better.champion
    assert (better.champion.version, better.champion.previous) == ("better", "first")

    equal = published(store, 0.50, "equal")
    strict = promote(store, equal, require_significance=True)
    assert not strict.promoted
    assert "require_significance" in strict.reason
    assert promote(store, equal).promoted

    worse = promote(store, published(store, 0.30, "worse"), max_regression=0.01)
    assert not worse.promoted
    assert "max_regression (1.00 points)" in worse.reason
    assert worse.champion
    assert worse.champion.version == "equal"
    assert promote(store, published(store, 0.30, "tolerated"), max_regression=0.5).promoted

    assert champions.roll_back(store, "cifar10").version == "equal"
    assert champions.roll_back(store, "cifar10").version == "better"
    assert transitions(store) == [
        ("promoted", "first", None),
        ("promoted", "better", "first"),
        ("promoted", "equal", "better"),
        ("promoted", "tolerated", "equal"),
        ("rolled back", "equal", "tolerated"),
        ("rolled back", "better", "equal"),
    ]


def test_below_the_lowest_accuracy_nothing_is_promoted_not_even_the_first(store: Store) -> None:
    model = published(store, 0.7, "first")
    verdict = promote(store, model, min_accuracy=0.7001)
    assert (verdict.promoted, verdict.champion) == (False, None)
    assert "70.01%" in verdict.reason
    assert promote(store, model, min_accuracy=0.7).promoted


def test_a_run_that_is_repeated_is_not_promoted_twice(store: Store) -> None:
    promote(store, published(store, 0.30, "first"))
    verdict = promote(store, published(store, 0.45, "second"))
    repeated = promote(store, published(store, 0.45, "second"))
    assert repeated == verdict.model_copy(update={"guards": [], "guarded": 0})
    promote(store, published(store, 0.50, "third"))
    again = promote(store, published(store, 0.45, "second"))
    assert (again.promoted, again.reason, again.comparison) == (True, verdict.reason, verdict.comparison)
    assert [version for _, version, _ in transitions(store)] == ["first", "second", "third"]


@pytest.mark.slow
def test_two_promotions_raced_a_hundred_times_leave_the_pointer_right_every_time(workspace: Workspace) -> None:
    store = workspace.store
    orders = set()
    for number in range(100):
        name = f"model-{number}"
        base = published(store, 0.30, "base", name=name)
        promote(store, base)
        good, better = published(store, 0.45, "good", name=name), published(store, 0.50, "better", name=name)
        barrier = threading.Barrier(2)
        verdicts: dict[str, Verdict] = {}

        def race(model: ModelRef, barrier: threading.Barrier, verdicts: dict[str, Verdict]) -> None:
            barrier.wait()
            verdicts[model.version] = promote(store, model)

        threads = [threading.Thread(target=race, args=(model, barrier, verdicts)) for model in (good, better)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        history = tuple(version for _, version, _ in transitions(store, name))
        orders.add(history)
        compared_with = verdicts["better"].comparison
        assert compared_with
        # Nobody wins on a comparison with one who was champion no more.
        assert (history, compared_with.champion, verdicts["good"].promoted) in [
            (("base", "good", "better"), "good", True),
            (("base", "better"), "base", False),
        ]
    assert len(orders) == 2, "the two never met"


def test_of_the_same_images_no_model_is_loaded(store: Store) -> None:
    """So a night on CIFAR-10 costs no more than it did."""

    def never(card: ModelCard) -> np.ndarray:
        raise AssertionError(f"{card.version} was loaded")

    for version, accuracy in (("first", 0.50), ("second", 0.60), ("third", 0.60)):
        verdict = gate.promote(store, published(store, accuracy, version), GateSettings(), never)
        assert verdict.promoted


def test_if_another_was_promoted_meanwhile_the_candidate_is_compared_with_that_one(store: Store) -> None:
    promote(store, published(store, 0.30, "old", dataset_digest="0" * 64))
    published(store, 0.40, "meanwhile", dataset_digest="2" * 64)
    asked = []

    def answer(card: ModelCard) -> np.ndarray:
        asked.append(card.version)
        if card.version == "old":
            champions.promote_by_hand(store, "cifar10", "meanwhile")
        return (np.arange(IMAGES) >= round(card.test_accuracy * IMAGES)).astype(np.int64)

    verdict = gate.promote(store, published(store, 0.50, "new"), GateSettings(), answer)
    assert verdict.promoted
    assert verdict.comparison
    assert (asked, verdict.comparison.champion) == (["old", "meanwhile"], "meanwhile")
    assert verdict.comparison.difference == pytest.approx(0.1)
    assert [version for _, version, _ in transitions(store)] == ["old", "meanwhile", "new"]


def seen(store: Store, version: str, images: range, right: int, **changed: Any) -> ModelRef:
    """A version with predictions of these images, of which it has the first ones right."""
    labels = np.zeros(len(images), np.uint8)
    predicted = (np.arange(len(images)) >= right).astype(np.uint8)
    content = np.array([list(hashlib.sha256(str(number).encode()).digest()) for number in images], np.uint8)
    card = card_of(version, **{"weights_sha256": sha256(version), **changed})
    body = save({"predicted": predicted, "labels": labels, "content": content})
    publish_version(store, card, {PREDICTIONS: body})
    return card.ref()


def test_a_champion_that_cannot_be_built_is_compared_on_the_images_that_both_have_seen(store: Store) -> None:
    old = {"dataset_digest": "0" * 64, "classes": ["dog", "cat"]}  # 0 is a dog there, and here a cat
    promote(store, seen(store, "old", range(200), right=0, **old))
    verdict = promote(store, seen(store, "new", range(50, 300), right=120))
    assert not verdict.promoted
    assert verdict.comparison
    # It has said "cat" of all images, which they are, and the candidate of the first 120.
    assert (verdict.comparison.images, verdict.comparison.only_champion) == (150, 30)
    assert "150 of tonight's 250 test images" in verdict.reason


@pytest.mark.parametrize("shared", [0, 99])
def test_with_too_few_images_in_common_it_is_not_compared_and_the_verdict_says_what_to_do(
    store: Store, shared: int
) -> None:
    promote(store, seen(store, "old", range(200), right=0, dataset_digest="0" * 64))
    verdict = promote(store, seen(store, "new", range(200 - shared, 400), right=200))
    assert not verdict.promoted
    for part in (f"predictions of {shared} of tonight's", "old can no longer be built here", "nightshift promote new"):
        assert part in verdict.reason


LABELS = np.zeros(IMAGES, np.uint8)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "is damaged"),
        (b"\xff" * 100, "is damaged"),
        (save({"labels": LABELS}), "is damaged: 'predicted'"),
        (save({"predicted": LABELS[:7], "labels": LABELS}), "of one length"),
        (save({"predicted": LABELS.astype(np.float32), "labels": LABELS}), "uint8"),
        (save({"predicted": LABELS.astype(np.int32), "labels": LABELS}), "both int32"),
        (save({"predicted": LABELS[None], "labels": LABELS[None]}), "of one length"),
        (save({"predicted": LABELS[:7], "labels": LABELS[:7]}), "of other images"),
        (save({"predicted": LABELS, "labels": LABELS + 1}), "of other images"),
        (save({"predicted": LABELS, "labels": LABELS + 2}), "a class that the card does not have"),
        (save({"predicted": LABELS.astype(np.int32) - 1, "labels": LABELS.astype(np.int32)}), "the card does not have"),
        (save({"predicted": LABELS, "labels": LABELS, "content": np.zeros((7, 32), np.uint8)}), "no sha256 of each"),
    ],
)
def test_predictions_that_are_none_are_one_sentence_with_the_versions_name(body: bytes, reason: str) -> None:
    """Whoever can write to the bucket can write the sha256 of anything."""
    store = MemoryStore()
    promote(store, published(store, 0.45, "first"))
    card = card_of("strange", test_accuracy=0.5, weights_sha256=sha256("strange"))
    publish_version(store, card, {PREDICTIONS: body})
    refused = promote(store, card.ref())
    assert not refused.promoted
    assert reason in refused.reason
    assert "strange" in refused.reason
    assert champions.read_champion(store, "cifar10").version == "first"


def cut(body: bytes) -> bytes:
    return body[: len(body) // 2]


def flipped(body: bytes) -> bytes:
    return body[:-20] + bytes([body[-20] ^ 1]) + body[-19:]


@pytest.mark.parametrize("damage", [cut, flipped, None])
@pytest.mark.parametrize("key", ["champion.json", "first/card.json", "first/predictions.safetensors"])
def test_what_is_damaged_or_deleted_is_not_decided_upon_and_the_night_is_told_what_to_do(
    store: Store, key: str, damage: Callable[[bytes], bytes] | None
) -> None:
    promote(store, published(store, 0.55, "first"))
    place = f"models/cifar10/{key}"
    if damage:
        store.put(place, damage(store.get(place)[0]))
    else:
        store.delete(place)
    for version, accuracy in (("worse", 0.37), ("better", 0.60)):
        verdict = promote(store, published(store, accuracy, version))
        assert not verdict.promoted
        assert store.url(place) in verdict.reason
        advice = "champion --rebuild" if key == "champion.json" else "republish"
        assert f"nightshift {advice}" in verdict.reason
        assert f"nightshift promote {version}" in verdict.reason
    assert bool(store.head(place)) is bool(damage)


@pytest.mark.parametrize("file", ["card.json", "predictions.safetensors"])
def test_a_former_champion_that_is_damaged_keeps_nobody_from_going_live(store: Store, file: str) -> None:
    for version, accuracy in (("best", 0.50), ("worse", 0.49)):
        assert promote(store, published(store, accuracy, version), max_regression=0.01).promoted
    store.put(f"models/cifar10/best/{file}", b"damaged")
    assert promote(store, published(store, 0.48, "third"), max_regression=0.01).promoted


@pytest.mark.parametrize("predictions", [b"none", save({"labels": np.zeros(5, np.uint8)}), save_images(7)])
def test_predictions_that_are_none_do_not_go_live_though_a_card_vouches_for_them(
    store: Store, predictions: bytes
) -> None:
    promote(store, published(store, 0.50, "first"))
    card = card_of("second", test_accuracy=0.6, weights_sha256=sha256("second"))
    publish_version(store, card, {PREDICTIONS: predictions})
    verdict = promote(store, card.ref())
    assert not verdict.promoted
    assert re.search(r"/predictions\.safetensors is damaged|of other images", verdict.reason)


def test_classes_beyond_a_byte_are_told_apart(store: Store) -> None:
    """256 more is another class."""
    labels = np.arange(1000, dtype=np.int32)
    for version, predicted in (("right", labels), ("wrong", labels ^ 256)):
        card = card_of(version, weights_sha256=sha256(version), classes=[f"class {number}" for number in range(1024)])
        publish_version(store, card, {PREDICTIONS: save({"predicted": predicted, "labels": labels})})
        verdict = promote(store, card.ref())
    assert not verdict.promoted
    assert verdict.comparison
    assert (verdict.comparison.only_champion, verdict.comparison.only_candidate) == (1000, 0)


def test_mcnemars_test_and_its_interval_are_the_published_ones() -> None:
    candidate = np.array([True] * 10 + [False] * 2 + [True] * 70 + [False] * 18)
    champion = np.array([False] * 10 + [True] * 2 + [True] * 70 + [False] * 18)
    found = compare(candidate, champion, "champion")
    assert (found.only_candidate, found.only_champion, found.difference) == (10, 2, 0.08)
    # Twice the chance of at most 2 heads in 12 throws.
    assert found.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    # Bonett and Price (2012): (11 - 3) / 102, and 1.96 standard errors around it.
    assert (found.low, found.high) == pytest.approx((0.0081638, 0.1486990), abs=1e-6)


def test_two_that_do_not_differ_are_not_certain_to_be_equal() -> None:
    same = np.array([True, False] * 50)
    found = compare(same, same, "champion")
    assert (found.difference, found.p_value) == (0, 1)
    assert found.low == -found.high < 0


def test_the_same_weights_change_nothing(store: Store) -> None:
    weights = sha256("the same seed on the same data")
    promote(store, published(store, 0.50, "monday", weights_sha256=weights))
    tuesday = promote(store, published(store, 0.50, "tuesday", weights_sha256=weights))
    assert not tuesday.promoted
    assert "same weights as champion monday" in tuesday.reason
    assert [version for _, version, _ in transitions(store)] == ["monday"]


def test_weights_that_somebody_rolled_back_from_do_not_come_back_by_themselves(store: Store) -> None:
    promote(store, published(store, 0.40, "good"))
    promote(store, published(store, 0.50, "bad"))
    champions.roll_back(store, "cifar10")
    again = published(store, 0.50, "again", weights_sha256=sha256("bad"))
    refused = promote(store, again)
    assert not refused.promoted
    assert "the weights of bad, from which somebody rolled back" in refused.reason
    assert promote(store, published(store, 0.45, "other")).promoted
    champions.promote_by_hand(store, "cifar10", "bad")
    champions.promote_by_hand(store, "cifar10", "other")
    assert promote(store, again).promoted


def test_a_rollback_in_a_history_that_names_no_weights_is_remembered_by_the_card(store: Store) -> None:
    promote(store, published(store, 0.40, "good"))
    promote(store, published(store, 0.50, "bad"))
    champions.roll_back(store, "cifar10")
    key = "models/cifar10/champion.json"
    history, etag = documents.read(store, key, History)
    nameless = [entry.changed(weights_sha256=None) for entry in history.transitions]
    documents.write(store, key, history.changed(transitions=nameless), etag)
    assert not promote(store, published(store, 0.50, "again", weights_sha256=sha256("bad"))).promoted


def test_the_verdict_on_a_finished_run_stands(store: Store) -> None:
    promote(store, published(store, 0.50, "champion"))
    candidate = published(store, 0.40, "candidate")
    rejected = promote(store, candidate)
    assert not rejected.promoted
    finish(store, candidate, rejected)
    assert promote(store, candidate, max_regression=0.5) == rejected
    assert [version for _, version, _ in transitions(store)] == ["champion"]


def test_small_steps_down_do_not_add_up(store: Store) -> None:
    """A model that loses 0.3 points a night, each of which max_regression allows: it slid to 91.6 % in 60 nights."""
    live = []
    for night in range(12):
        verdict = promote(store, published(store, 0.94 - 0.003 * night, f"night-{night:02}"), max_regression=0.003)
        assert verdict.champion
        live.append(verdict.champion.test_accuracy)
    assert min(live) >= 0.94 - 0.003 - 1e-9
    assert "max_slide allows 0.30" in verdict.reason or "max_regression" in verdict.reason


def test_each_versions_predictions_are_read_once_in_a_night(store: Store) -> None:
    for version, accuracy in (("best", 0.50), ("worse", 0.49)):
        assert promote(store, published(store, accuracy, version), max_regression=0.01).promoted
    third = published(store, 0.495, "third")
    counting = Faulty(store)
    gate.promote(counting, third, GateSettings(max_regression=0.01))
    assert counting.calls["download_bytes", "models"] == len(["third", "worse", "best"])


def test_max_slide_is_measured_from_the_best_champion_since_the_last_change_by_hand(store: Store) -> None:
    gate_of_the_team = {"max_regression": 0.01, "max_slide": 0.015}
    for version, accuracy in (("best", 0.90), ("lower", 0.89)):
        assert promote(store, published(store, accuracy, version), **gate_of_the_team).promoted
    too_low = promote(store, published(store, 0.884, "too-low"), **gate_of_the_team)
    assert not too_low.promoted
    assert "1.60 points below best, the best champion since" in too_low.reason
    champions.promote_by_hand(store, "cifar10", published(store, 0.885, "wanted").version)
    assert promote(store, published(store, 0.88, "after"), **gate_of_the_team).promoted


def test_a_pinned_champion_stays_until_it_is_unpinned_and_the_verdict_says_who_pinned_it_and_why(store: Store) -> None:
    promote(store, published(store, 0.50, "first"))
    pin = champions.pin(store, "cifar10", "the demo is on Friday").pin
    assert pin
    better = published(store, 0.60, "better")
    held = promote(store, better)
    assert not held.promoted
    assert held.comparison
    assert held.champion
    assert held.champion.version == "first"
    for part in ("+10.00 points", pin.who, "the demo is on Friday", "promote better", "nightshift unpin"):
        assert part in held.reason
    assert "pinned" not in promote(store, published(store, 0.40, "worse")).reason
    champions.unpin(store, "cifar10")
    assert promote(store, better).promoted


def test_versions_that_were_never_live_do_not_stand_in_the_way_of_the_first_champion(store: Store) -> None:
    """As the trials of a sweep, and what was below min_accuracy."""
    rejected = promote(store, published(store, 0.20, "too-low"), min_accuracy=0.3)
    for run_id, verdict in (("too-low", rejected), ("trial", None)):
        model = published(store, 0.40, run_id)
        finish(store, model, verdict)
    assert promote(store, published(store, 0.45, "first"), min_accuracy=0.3).promoted


def test_a_published_version_of_which_no_record_says_whether_it_was_live_keeps_the_first_from_going_live(
    store: Store,
) -> None:
    published(store, 0.55, "unexplained")
    verdict = promote(store, published(store, 0.37, "first"))
    assert not verdict.promoted
    assert "unexplained is published, and no readable record" in verdict.reason
    assert champions.promote_by_hand(store, "cifar10", "unexplained").version == "unexplained"
