"""Published versions: their cards, of any format, and their files."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest

from nightshift.errors import DocumentDamagedError, DocumentNewerError, ModelNotFoundError, StorageError
from nightshift.records.versions import ModelCard, card_key, publish_version, read_card, read_file
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from tests.conftest import small_config


def card_of(version: str, **changed: Any) -> ModelCard:
    """A card of a version that never was trained."""
    fields: dict[str, Any] = {
        "name": "cifar10",
        "version": version,
        "run_id": version,
        "architecture": "quick_cnn",
        "classes": ["cat", "dog"],
        "input": "float32 (batch, 3, 32, 32)",
        "output": "logits",
        "mean": [125.0, 123.0, 114.0],
        "std": [63.0, 62.0, 66.5],
        "tta": "off",
        "test_accuracy": 0.5,
        "test_loss": 1.0,
        "weights_sha256": "0" * 64,
        "config": small_config("quick").model_dump(),
        "dataset_digest": "1" * 64,
        "environment": {"device": "cpu"},
        "trained_at": datetime(2026, 11, 25, tzinfo=UTC),
    }
    return ModelCard(**{**fields, **changed})


def test_a_version_is_what_was_published(store: Store) -> None:
    publish_version(store, card_of("v"), {"weights.pth": b"weights"})
    card = read_card(store, "cifar10", "v")
    assert card.changed(files={}) == card_of("v")
    assert card.train_config() == small_config("quick")
    assert read_file(store, card, "weights.pth") == b"weights"
    assert [item.key for item in store.list(card.ref().key)] == [
        card_key("cifar10", "v"),
        card.ref().key + "weights.pth",
    ]


def test_a_card_that_is_there_is_never_written_over(store: Store) -> None:
    publish_version(store, card_of("v"), {"weights.pth": b"weights"})
    publish_version(store, card_of("v", weights_sha256="2" * 64), {"weights.pth": b"weights"})
    assert read_card(store, "cifar10", "v").weights_sha256 == "0" * 64


def test_a_version_without_its_card_is_not_published(store: Store) -> None:
    store.put("models/cifar10/half/weights.pth", b"weights")
    with pytest.raises(ModelNotFoundError, match="nightshift runs"):
        read_card(store, "cifar10", "half")


def test_a_card_of_before_cards_had_formats_is_read_with_what_others_added_to_it() -> None:
    store = MemoryStore()
    publish_version(store, card_of("v"), {"weights.pth": b"weights"})
    fields = json.loads(store.get(card_key("cifar10", "v"))[0])
    del fields["format"]
    fields |= {"trained_at": "2026-11-25T00:00:00+00:00", "approved_by": "somebody"}
    store.put(card_key("cifar10", "v"), json.dumps(fields, indent=1).encode())
    assert read_card(store, "cifar10", "v").changed(files={}) == card_of("v")


def test_a_card_of_a_newer_nightshift_says_so() -> None:
    store = MemoryStore()
    store.put(card_key("cifar10", "v"), b'{"format": 3}')
    with pytest.raises(DocumentNewerError, match=r"format 3; this one reads up to 2\): update nightshift$"):
        read_card(store, "cifar10", "v")


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{}", b'{"format": 2, "name": "cifar10"}'])
def test_a_damaged_card_is_one_sentence_with_its_url(body: bytes) -> None:
    store = MemoryStore()
    key = card_key("cifar10", "v")
    store.put(key, body)
    with pytest.raises(DocumentDamagedError, match=re.escape(f"{store.url(key)} is damaged")) as refused:
        read_card(store, "cifar10", "v")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["weights.pth", "unlisted.pth"])
def test_a_file_that_is_not_what_was_published_is_not_used(name: str) -> None:
    store = MemoryStore()
    publish_version(store, card_of("v"), {"weights.pth": b"weights"})
    store.put(f"models/cifar10/v/{name}", b"Weights")
    with pytest.raises(StorageError, match=f"v/{name} is not what was published"):
        read_file(store, read_card(store, "cifar10", "v"), name)
