"""What versions have predicted, as it lies in the store: damaged, of other images, of classes with other numbers."""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from nightshift.data.specs import SPECS
from nightshift.judging.answers import PREDICTIONS
from nightshift.records import champions
from nightshift.records.versions import publish_version
from nightshift.refs import ModelRef
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from tests.judging.test_gate import IMAGES, promote, published, sha256
from tests.records.test_versions import card_of


def save_images(count: int) -> bytes:
    return save({"predicted": np.zeros(count, np.uint8), "labels": np.zeros(count, np.uint8)})


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


@pytest.mark.parametrize("in_common", [0, 99])
def test_with_too_few_images_in_common_it_is_not_compared_and_the_verdict_says_what_to_do(
    store: Store, in_common: int
) -> None:
    promote(store, seen(store, "old", range(200), right=0, dataset_digest="0" * 64))
    verdict = promote(store, seen(store, "new", range(200 - in_common, 400), right=200))
    assert not verdict.promoted
    for part in (
        f"predictions of {in_common} of tonight's",
        "old can no longer be built here",
        "nightshift promote new",
    ):
        assert part in verdict.reason


def test_a_champion_of_before_cifar10_had_a_snapshot_is_compared_by_what_it_has_said(store: Store) -> None:
    """It was tested on the same images, and need not be built again."""
    promote(store, published(store, 0.50, "yesterday", dataset_digest=SPECS["cifar10"].digest))
    verdict = promote(store, published(store, 0.60, "tonight", dataset_digest="5" * 64))
    assert verdict.promoted
    assert verdict.comparison
    assert (verdict.comparison.champion, verdict.comparison.images) == ("yesterday", IMAGES)
    assert verdict.comparison.only_candidate == IMAGES // 10


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
