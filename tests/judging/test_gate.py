"""What may go live: a candidate meets the champion on the same images, and only one of two ever wins."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from nightshift.errors import ModelNotFoundError, PreconditionFailedError, StorageError
from nightshift.judging import gate
from nightshift.records import champions
from nightshift.records.versions import publish_version, read_card, read_file
from nightshift.refs import ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.storage.s3 import S3
from nightshift.workspace import Workspace

Candidates = tuple[Workspace, dict[int, ModelRef]]


@pytest.fixture
def published(workspace: Workspace, candidates: Candidates) -> Callable[..., ModelRef]:
    """Publish a copy of a candidate in this test's own store, as a version of any name."""
    there, models = candidates

    def publish(epochs: int, version: str, **changed: Any) -> ModelRef:
        model = models[epochs]
        card = read_card(there.store, model.name, model.version)
        files = {gate.PREDICTIONS: read_file(there.store, card, gate.PREDICTIONS)}
        publish_version(workspace.store, model.name, version, files, {**card, "run_id": version, **changed})
        return model.model_copy(update={"version": version, "run_id": version})

    return publish


def promote(workspace: Workspace, model: ModelRef, **settings: Any) -> Verdict:
    return gate.promote(workspace.store, model, GateSettings(**settings))


def transitions(workspace: Workspace) -> list[tuple[str, str, str | None]]:
    history, _ = champions.read_history(workspace.store, "cifar10")
    return [(entry.what, entry.version, entry.previous) for entry in history.transitions]


def test_a_better_candidate_is_promoted_an_equal_one_by_setting_and_a_worse_one_rejected(
    workspace: Workspace, published: Callable[..., ModelRef]
) -> None:
    first = promote(workspace, published(2, "first"))
    assert (first.promoted, first.comparison) == (True, None)

    better = promote(workspace, published(3, "better"), require_significance=True)
    assert better.promoted
    assert better.comparison
    assert better.comparison.champion == "first"
    assert better.comparison.low > 0
    assert better.champion
    assert (better.champion.version, better.champion.previous) == ("better", "first")

    equal = published(3, "equal")
    strict = promote(workspace, equal, require_significance=True)
    assert not strict.promoted
    assert "require_significance" in strict.reason
    assert promote(workspace, equal).promoted

    worse = promote(workspace, published(1, "worse"), max_regression=0.01)
    assert not worse.promoted
    assert "max_regression (1.00 points)" in worse.reason
    assert worse.champion
    assert worse.champion.version == "equal"
    assert promote(workspace, published(1, "tolerated"), max_regression=0.5).promoted

    assert champions.roll_back(workspace.store, "cifar10").version == "equal"
    assert champions.roll_back(workspace.store, "cifar10").version == "better"
    assert transitions(workspace) == [
        ("promoted", "first", None),
        ("promoted", "better", "first"),
        ("promoted", "equal", "better"),
        ("promoted", "tolerated", "equal"),
        ("rolled back", "equal", "tolerated"),
        ("rolled back", "better", "equal"),
    ]


def test_below_the_lowest_accuracy_nothing_is_promoted_not_even_the_first(
    workspace: Workspace, published: Callable[..., ModelRef]
) -> None:
    model = published(1, "first", test_accuracy=0.7)
    verdict = promote(workspace, model, min_accuracy=0.7001)
    assert (verdict.promoted, verdict.champion) == (False, None)
    assert "70.01%" in verdict.reason
    assert promote(workspace, model, min_accuracy=0.7).promoted


def test_a_run_that_is_repeated_is_not_promoted_twice(workspace: Workspace, published: Callable[..., ModelRef]) -> None:
    promote(workspace, published(1, "first"))
    verdict = promote(workspace, published(2, "second"))
    assert promote(workspace, published(2, "second")) == verdict
    promote(workspace, published(3, "third"))
    again = promote(workspace, published(2, "second"))
    assert (again.promoted, again.reason, again.comparison) == (True, verdict.reason, verdict.comparison)
    assert [version for _, version, _ in transitions(workspace)] == ["first", "second", "third"]


def test_a_lost_answer_makes_no_second_transition(
    workspace: Workspace, published: Callable[..., ModelRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(workspace, published(1, "first"))
    promote(workspace, published(2, "second"))
    put, lost = S3.put, []

    def put_and_lose_the_answer(self: S3, key: str, body: bytes, **condition: Any) -> str:
        etag = put(self, key, body, **condition)
        if not lost:
            lost.append(key)
            raise PreconditionFailedError("what boto3's own retry sees after its first try has landed")
        return etag

    monkeypatch.setattr(S3, "put", put_and_lose_the_answer)
    assert champions.roll_back(workspace.store, "cifar10").version == "first"
    assert lost
    assert len(transitions(workspace)) == 3


def test_two_promotions_raced_a_hundred_times_leave_the_pointer_right_every_time(
    workspace: Workspace, published: Callable[..., ModelRef]
) -> None:
    base, good, better = published(1, "base"), published(2, "good"), published(3, "better")
    orders = set()
    for _ in range(100):
        workspace.store.delete("models/cifar10/champion.json")
        promote(workspace, base)
        barrier, verdicts = threading.Barrier(2), {}

        def race(model: ModelRef, barrier: threading.Barrier, verdicts: dict[str, Verdict]) -> None:
            barrier.wait()
            verdicts[model.version] = promote(workspace, model)

        threads = [threading.Thread(target=race, args=(model, barrier, verdicts)) for model in (good, better)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        history = tuple(version for _, version, _ in transitions(workspace))
        orders.add(history)
        compared_with = verdicts["better"].comparison
        assert compared_with
        # Nobody wins on a comparison with one who was champion no more.
        assert (history, compared_with.champion, verdicts["good"].promoted) in (
            (("base", "good", "better"), "good", True),
            (("base", "better"), "base", False),
        )
    assert len(orders) == 2, "the two never met"


def test_a_person_may_promote_what_the_gate_would_not_and_roll_back_to_any_earlier_champion(
    workspace: Workspace, published: Callable[..., ModelRef]
) -> None:
    store = workspace.store
    for epochs, version in ((1, "a"), (2, "b"), (3, "c")):
        promote(workspace, published(epochs, version))
    assert champions.roll_back(store, "cifar10", "a").previous == "c"
    assert champions.promote_by_hand(store, "cifar10", "b").version == "b"
    assert champions.promote_by_hand(store, "cifar10", "b").version == "b"
    published(1, "never")
    with pytest.raises(ModelNotFoundError, match="Those that were: a, b, c"):
        champions.roll_back(store, "cifar10", "never")
    with pytest.raises(ModelNotFoundError, match="nightshift runs"):
        champions.promote_by_hand(store, "cifar10", "nobody")
    assert [what for what, _, _ in transitions(workspace)][3:] == ["rolled back", "promoted by hand"]


def test_the_first_champion_has_nothing_before_it(workspace: Workspace, published: Callable[..., ModelRef]) -> None:
    with pytest.raises(ModelNotFoundError, match="no champion yet"):
        champions.roll_back(workspace.store, "cifar10")
    promote(workspace, published(1, "first"))
    with pytest.raises(ModelNotFoundError, match="first was the first champion"):
        champions.roll_back(workspace.store, "cifar10")


def test_versions_tested_on_different_images_are_not_compared(
    workspace: Workspace, published: Callable[..., ModelRef]
) -> None:
    promote(workspace, published(1, "old", dataset_digest="0" * 64))
    verdict = promote(workspace, published(3, "new"))
    assert not verdict.promoted
    assert "nightshift promote new" in verdict.reason


@pytest.mark.parametrize("key", ["champion.json", "first/predictions.safetensors"])
def test_what_is_damaged_is_not_decided_upon(
    workspace: Workspace, published: Callable[..., ModelRef], key: str
) -> None:
    promote(workspace, published(1, "first"))
    body = workspace.store.get(f"models/cifar10/{key}")[0]
    workspace.store.put(f"models/cifar10/{key}", body[:-20] + bytes([body[-20] ^ 1]) + body[-19:])
    with pytest.raises(StorageError, match=key):
        promote(workspace, published(3, "second"))


def test_mcnemars_test_and_its_interval_are_the_published_ones() -> None:
    candidate = np.array([True] * 10 + [False] * 2 + [True] * 70 + [False] * 18)
    champion = np.array([False] * 10 + [True] * 2 + [True] * 70 + [False] * 18)
    found = gate.compare(candidate, champion, "champion")
    assert (found.only_candidate, found.only_champion, found.difference) == (10, 2, 0.08)
    # Twice the chance of at most 2 heads in 12 throws.
    assert found.p_value == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    # Bonett and Price (2012): (11 - 3) / 102, and 1.96 standard errors around it.
    assert (found.low, found.high) == pytest.approx((0.0081638, 0.1486990), abs=1e-6)


def test_two_that_do_not_differ_are_not_certain_to_be_equal() -> None:
    same = np.array([True, False] * 50)
    found = gate.compare(same, same, "champion")
    assert (found.difference, found.p_value) == (0, 1)
    assert found.low == -found.high < 0
