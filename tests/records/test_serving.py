"""What a Triton server finds in the bucket is the champion, whoever changes that."""

from datetime import timedelta
from typing import Any

import pytest

from nightshift.errors import DocumentDamagedError
from nightshift.publishing.verify import verify_published
from nightshift.records import champions, orphans, retention, serving
from nightshift.records.serving import FOR_TRITON, config_key, model_key
from nightshift.records.versions import publish_version
from nightshift.settings import KeepSettings
from nightshift.storage.memory import MemoryStore
from nightshift.storage.store import Store
from tests.records.test_versions import card_of
from tests.stores import Faulty

NAME = "cifar10"


def publish(store: Store, version: str, for_triton: bool = True) -> None:
    publish_version(store, card_of(version), {FOR_TRITON: version.encode()} if for_triton else {"weights.pth": b"x"})


def live(store: Store, version: str) -> None:
    champions.promote_by_hand(store, NAME, version)
    serving.serve(store, NAME)


def served(store: Store) -> str:
    """The model that config.pbtxt names."""
    number = serving.served(store, NAME)
    assert number
    return store.get(model_key(NAME, number))[0].decode()


def test_each_change_of_the_champion_is_served_under_a_number_of_its_own(store: Store) -> None:
    for version in ("monday", "tuesday"):
        publish(store, version)
        live(store, version)
        assert served(store) == version
    champions.roll_back(store, NAME)
    serving.serve(store, NAME)
    assert (served(store), serving.served(store, NAME)) == ("monday", 3)
    assert serving.problem(store, NAME) is None


def test_what_is_served_already_is_not_written_again_unless_it_is_asked_for(store: Store) -> None:
    publish(store, "monday")
    live(store, "monday")
    faulty = Faulty(store)
    serving.serve(faulty, NAME)
    before = faulty.calls["put", "triton"]
    serving.serve(faulty, NAME, anew=True)
    assert (before, faulty.calls["put", "triton"]) == (0, 2)


def test_the_model_is_there_before_the_config_names_it(store: Store) -> None:
    publish(store, "monday")
    live(store, "monday")
    publish(store, "tuesday")
    champions.promote_by_hand(store, NAME, "tuesday")
    faulty = Faulty(store)
    faulty.fail("put", RuntimeError("killed"), config_key(NAME))
    with pytest.raises(RuntimeError):
        serving.serve(faulty, NAME)
    assert served(store) == "monday"
    assert store.get(model_key(NAME, 2))[0] == b"tuesday"
    serving.serve(store, NAME)
    assert served(store) == "tuesday"


def test_whoever_is_overtaken_by_a_rollback_does_not_have_the_last_word(store: Store) -> None:
    for version in ("monday", "tuesday"):
        publish(store, version)
    live(store, "monday")
    champions.promote_by_hand(store, NAME, "tuesday")

    class Overtaken(Faulty):
        def __getattr__(self, name: str) -> Any:
            method = super().__getattr__(name)

            def put(key: str, body: bytes) -> None:
                if key == config_key(NAME) and serving.served(store, NAME) == 1:
                    champions.roll_back(store, NAME)
                    serving.serve(store, NAME)
                    assert served(store) == "monday"
                method(key, body)

            return put if name == "put" else method

    serving.serve(Overtaken(store), NAME)
    assert (served(store), serving.served(store, NAME)) == ("monday", 3)


def test_a_champion_that_was_not_published_for_triton_leaves_what_is_served(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store, "monday", for_triton=False)
    live(store, "monday")
    assert not list(store.list("triton/"))
    publish(store, "tuesday")
    live(store, "tuesday")
    publish(store, "wednesday", for_triton=False)
    live(store, "wednesday")
    assert served(store) == "tuesday"
    assert "Triton goes on with the version before it" in caplog.text
    assert "wednesday has no triton.onnx" in str(serving.problem(store, NAME))
    kept = orphans.collect(store, orphans.find(store, timedelta(0)))
    assert not kept.keys


def test_gc_deletes_what_is_served_no_longer_and_never_what_is() -> None:
    store = MemoryStore()
    for version in ("monday", "tuesday", "wednesday"):
        publish(store, version)
        live(store, version)
    _, gone = retention.tidy(store, KeepSettings(), timedelta(0))
    assert set(gone.keys) == {model_key(NAME, 1), model_key(NAME, 2)}
    assert served(store) == "wednesday"


def test_damage_is_found_and_promoting_the_champion_writes_it_anew(store: Store) -> None:
    publish(store, "monday")
    live(store, "monday")
    for key in (model_key(NAME, 1), config_key(NAME)):
        body = store.get(key)[0]
        store.put(key, body[:-1] + b"!")
        bad = [checked.problem for checked in verify_published(store) if checked.problem]
        assert len(bad) == 1
        assert "nightshift promote monday" in bad[0]
        serving.serve(store, NAME, anew=True)
        assert store.get(key)[0] == body
    assert not [checked.problem for checked in verify_published(store) if checked.problem]


def test_a_damaged_model_is_never_served(store: Store) -> None:
    publish(store, "monday")
    live(store, "monday")
    publish(store, "tuesday")
    store.put(f"models/{NAME}/tuesday/{FOR_TRITON}", b"damaged")
    champions.promote_by_hand(store, NAME, "tuesday")
    with pytest.raises(DocumentDamagedError, match="nightshift republish tuesday"):
        serving.serve(store, NAME)
    assert served(store) == "monday"


def test_a_repository_of_somebody_elses_is_left_alone(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    theirs = {config_key(NAME): b'name: "cifar10"', model_key(NAME, 1): b"their model"}
    for key, body in theirs.items():
        store.put(key, body)
    publish(store, "monday")
    live(store, "monday")
    assert "somebody else's" in caplog.text
    assert not orphans.find(store, timedelta(0)).keys
    assert {key: store.get(key)[0] for key in theirs} == theirs
    assert not [checked.problem for checked in verify_published(store) if checked.problem]
