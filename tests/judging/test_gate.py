"""What may go live: a candidate meets the champion on the same images, and only one of two ever wins."""

import hashlib
import json
import threading
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import save

from nightshift.errors import DocumentNewerError
from nightshift.judging import gate
from nightshift.judging.answers import PREDICTIONS
from nightshift.records import champions
from nightshift.records.history import History
from nightshift.records.keys import record_key
from nightshift.records.run import Result, RunRecord
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


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def result_of(model: ModelRef, verdict: Verdict | None) -> Result:
    """What the record of its run says once it is finished."""
    return Result(
        test_accuracy=model.test_accuracy,
        test_loss=1.0,
        weights_sha256=model.weights_sha256,
        model=model.key,
        verdict=verdict,
    )


def finish(store: Store, model: ModelRef, verdict: Verdict | None) -> None:
    """Write the record of its run, finished with this verdict."""
    with hold(store, model.run_id) as run:
        run.end("finished", result=result_of(model, verdict))


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
@pytest.mark.parametrize("races", [20, pytest.param(100, marks=pytest.mark.soak)])
def test_two_promotions_at_once_leave_the_pointer_right_every_time(races: int, workspace: Workspace) -> None:
    store = workspace.store
    orders = set()
    for number in range(races):
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


class RecordOfYesterday(RunRecord):
    """Of a nightshift that knows no guards."""

    format: Literal[3] = 3  # type: ignore[assignment]


def test_a_verdict_of_before_there_were_guards_is_read_and_a_nightshift_of_then_refuses_one_of_now() -> None:
    store = MemoryStore()
    promote(store, published(store, 0.50, "champion"))
    candidate = published(store, 0.40, "candidate")
    rejected = promote(store, candidate)
    finish(store, candidate, rejected)
    key = record_key("candidate")
    with pytest.raises(DocumentNewerError, match=r"format 4; this one reads up to 3\): update nightshift"):
        documents.read(store, key, RecordOfYesterday)
    fields = json.loads(store.get(key)[0])
    for name in ("guards", "guarded"):
        assert fields["result"]["verdict"].pop(name)
    del fields["sha256"]
    fields["format"] = 3
    store.put(key, json.dumps({**fields, "sha256": documents._digest(fields)}).encode())
    assert promote(store, candidate) == rejected.model_copy(update={"guards": [], "guarded": 0})


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
