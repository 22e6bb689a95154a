"""Published versions: their cards, of any format, and their files."""

import json
import re
from datetime import UTC, datetime
from typing import Any

import pytest
from safetensors.numpy import load

from nightshift.data.names import check_classes
from nightshift.errors import DocumentDamagedError, DocumentNewerError, ModelNotFoundError, StorageError
from nightshift.records.versions import ModelCard, card_key, publish_version, read_card, read_file, read_tensors
from nightshift.storage import documents
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from nightshift.values import LONGEST_CLASS_NAME, LONGEST_CLASS_NAMES, MOST_CLASSES
from tests.conftest import small_config
from tests.hostile import HOSTILE


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


def replace_card(store: Store, card: ModelCard) -> None:
    """What whoever may write to the bucket can do."""
    store.put(card_key(card.name, card.version), documents.encoded(card))


def test_a_version_is_what_was_published(store: Store) -> None:
    publish_version(store, card_of("v"), {"weights.pth": b"weights"})
    card = read_card(store, "cifar10", "v")
    assert card.changed(files={}, sha256=None) == card_of("v")
    assert card.sha256 == json.loads(store.get(card_key("cifar10", "v"))[0])["sha256"]
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


def test_a_card_of_before_images_had_sizes_is_of_images_of_32_by_32_that_are_stretched() -> None:
    store = MemoryStore()
    fields = card_of("v").model_dump(mode="json", exclude={"sha256", "image_size", "resize"}) | {"format": 3}
    store.put(card_key("cifar10", "v"), json.dumps({**fields, "sha256": documents._digest(fields)}).encode())
    card = read_card(store, "cifar10", "v")
    assert (card.image_size, card.resize, card.sha256) == (32, "stretch", documents._digest(fields))
    assert card.changed(sha256=None) == card_of("v")


def test_a_card_holds_the_most_classes_and_any_names() -> None:
    longest = LONGEST_CLASS_NAMES // MOST_CLASSES - 4
    hostile = tuple(text for text in HOSTILE.values() if len(text) <= LONGEST_CLASS_NAME)
    for names in (hostile, tuple(f"{number:0{longest}}" for number in range(MOST_CLASSES))):
        check_classes(names)
        store = MemoryStore()
        publish_version(store, card_of("v", classes=names), {})
        assert read_card(store, "cifar10", "v").classes == names


@pytest.mark.parametrize("number", [{}, {"format": 2}])
def test_a_card_of_before_cards_were_sealed_is_read_with_what_others_added_to_it(number: dict[str, int]) -> None:
    store = MemoryStore()
    publish_version(store, card_of("v"), {"weights.pth": b"weights"})
    fields = json.loads(store.get(card_key("cifar10", "v"))[0])
    del fields["format"], fields["sha256"]
    fields |= {"trained_at": "2026-11-25T00:00:00+00:00", "approved_by": "somebody", **number}
    store.put(card_key("cifar10", "v"), json.dumps(fields, indent=1).encode())
    assert read_card(store, "cifar10", "v").changed(files={}, sha256=None) == card_of("v")


def test_every_flipped_byte_of_a_card_is_noticed() -> None:
    store = MemoryStore()
    publish_version(store, card_of("v"), {})
    key = card_key("cifar10", "v")
    body = store.get(key)[0]
    for place in range(0, len(body), 7):
        store.put(key, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :])
        try:
            assert read_card(store, "cifar10", "v").changed(sha256=None) == card_of("v")  # other space between fields
        except DocumentDamagedError:
            continue


def test_a_card_under_another_versions_key_is_not_believed() -> None:
    store = MemoryStore()
    publish_version(store, card_of("v"), {})
    store.put(card_key("cifar10", "w"), store.get(card_key("cifar10", "v"))[0])
    with pytest.raises(DocumentDamagedError, match="it is the card of cifar10/v, copied from elsewhere"):
        read_card(store, "cifar10", "w")


@pytest.mark.parametrize(
    "changed",
    [
        {"classes": ()},
        {"mean": (125.0, 123.0)},
        {"std": (63.0, 0.0, 66.5)},
        {"mean": (1e308, 0.0, 0.0)},
        {"test_accuracy": 1.5},
        {"version": "../../runs"},
        {"name": "a/b"},
        {"architecture": "\x1b[2J"},
        {"image_size": 15},
        {"image_size": 513},
        {"resize": "tile"},
        {"classes": ["x"] * 100_001},
        {"classes": ["x" * 1001]},
        {"config": {"recipe": [[[[[[[[[[[[[[[[[["deep"]]]]]]]]]]]]]]]]]]}},
    ],
)
def test_a_card_with_a_value_that_no_card_has_is_not_believed(changed: dict[str, Any]) -> None:
    store = MemoryStore()
    fields = card_of("v").model_dump(mode="json", exclude={"sha256"}) | changed
    store.put(card_key("cifar10", "v"), json.dumps({**fields, "sha256": documents._digest(fields)}).encode())
    with pytest.raises(DocumentDamagedError, match=r"v/card\.json is damaged"):
        read_card(store, "cifar10", "v")


def test_a_card_of_a_newer_nightshift_says_so() -> None:
    store = MemoryStore()
    fields = {"format": 5}
    store.put(card_key("cifar10", "v"), json.dumps({**fields, "sha256": documents._digest(fields)}).encode())
    with pytest.raises(DocumentNewerError, match=r"format 5; this one reads up to 4\): update nightshift$"):
        read_card(store, "cifar10", "v")


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b"{}", b'{"format": 2, "name": "cifar10"}'])
def test_a_damaged_card_is_one_sentence_with_its_url(body: bytes) -> None:
    store = MemoryStore()
    key = card_key("cifar10", "v")
    store.put(key, body)
    with pytest.raises(DocumentDamagedError, match=re.escape(f"{store.url(key)} is damaged")) as refused:
        read_card(store, "cifar10", "v")
    assert "\n" not in str(refused.value)


def test_a_file_of_a_hundred_thousand_empty_tensors_is_not_even_listed() -> None:
    """A million and a half in 84 MB took 1.9 GB and 16 s."""
    tensors = ",".join(f'"{number}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for number in range(100_000))
    header = f"{{{tensors}}}".encode()
    store = MemoryStore()
    publish_version(store, card_of("v"), {"weights.safetensors": len(header).to_bytes(8, "little") + header})
    card = read_card(store, "cifar10", "v")
    with pytest.raises(DocumentDamagedError, match="its header is too long"):
        read_tensors(store, card, "weights.safetensors", load)


@pytest.mark.parametrize("body", [b"Weights", b"weights and more", b"w", b""])
@pytest.mark.parametrize("name", ["weights.pth", "unlisted.pth"])
def test_a_file_that_is_not_what_was_published_is_not_used(name: str, body: bytes) -> None:
    store = MemoryStore()
    publish_version(store, card_of("v"), {"weights.pth": b"weights"})
    store.put(f"models/cifar10/v/{name}", body)
    with pytest.raises(StorageError, match=f"v/{name} is not what was published"):
        read_file(store, read_card(store, "cifar10", "v"), name)
