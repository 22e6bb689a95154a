"""What came in since the champion was trained, in the eyes of one that really was, and on the page."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nightshift.data.packed import pack_snapshot
from nightshift.data.snapshot import make_snapshot
from nightshift.errors import StorageError, StorageUnreachableError
from nightshift.judging import evaluation, label_errors
from nightshift.judging.came_in import note_drift
from nightshift.judging.drift import CameIn, Drift, drift_key, read_drift
from nightshift.judging.report import Report, build_report
from nightshift.judging.tonight import Tonight
from nightshift.progress import shown_by
from nightshift.publishing.publish import publish_model
from nightshift.records import champions, snapshots
from nightshift.records.history import copy_key, history_key
from nightshift.records.keys import place_of
from nightshift.records.run import read_record
from nightshift.records.versions import card_key, read_card, version_key
from nightshift.refs import DatasetRef, ModelRef
from nightshift.storage import documents
from nightshift.storage.store import Store
from nightshift.training.run import train_alone
from nightshift.workspace import Workspace
from tests.data.conftest import Told
from tests.data.pictures import config
from tests.data.test_near import scene
from tests.judging.nights import HALVES, NAME, publish
from tests.made_up import config_of, in_memory
from tests.stores import Faulty

COLOURS = {"ant": (230, 40, 40), "bee": (40, 200, 40), "cow": (40, 40, 230)}
MONDAY = {f"{label}/{number}": (number, label) for number, label in zip(range(360), 120 * list(COLOURS), strict=True)}
needs_cleanlab = pytest.mark.skipif(not label_errors.is_installed(), reason="nightshift[cleanlab] is not installed")


@pytest.fixture
def told() -> Iterator[Told]:
    with shown_by(told := Told()):
        yield told


def photo(number: int, label: str) -> np.ndarray:
    """A scene in the light of its class, uint8 (32, 32, 3)."""
    return (0.4 * np.asarray(scene(number)) + 0.6 * np.array(COLOURS[label])).astype(np.uint8)


def night(
    workspace: Workspace,
    root: Path,
    new: Mapping[str, tuple[int, str]],
    change: Callable[[np.ndarray], np.ndarray] = lambda pixels: pixels,
) -> DatasetRef:
    """Monday's images and these: by folder and name, which scene of which class is in the file."""
    for name, (number, label) in {**MONDAY, **new}.items():
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = photo(number, label)
        Image.fromarray(change(pixels) if name in new else pixels).save(path)
    return pack_snapshot(workspace, make_snapshot(workspace.store, NAME, config(root, image_size=32, split=HALVES)))


def more(count: int, first: int = 1000) -> dict[str, tuple[int, str]]:
    """New images of the same kinds, as many of each as chance has it."""
    labels = np.random.default_rng(first).choice(list(COLOURS), count).tolist()
    return {f"{label}/{first + at}": (first + at, label) for at, label in enumerate(labels)}


@dataclass
class Live:
    """A champion that was trained on Monday's images."""

    workspace: Workspace
    card: ModelRef

    @property
    def store(self) -> Store:
        return self.workspace.store

    def look(self, tonight: DatasetRef, version: str) -> Drift:
        """What is noted for a candidate of a night, which has not learned anything."""
        model = publish(self.workspace, tonight, version, says="ant")
        note_drift(self.store, model, Tonight(self.workspace, version))
        found = read_drift(self.store, version)
        assert found
        return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Live:
    workspace = in_memory(tmp_path_factory.mktemp("home"))
    monday = night(workspace, tmp_path_factory.mktemp("monday"), {})
    checkpoint = train_alone(workspace, "monday", config_of(dataset=NAME, epochs=6), monday)
    evaluated = evaluation.evaluate(workspace, checkpoint, monday)
    assert evaluated.accuracy > 0.9
    return Live(workspace, publish_model(workspace, checkpoint, monday, evaluated))


@pytest.fixture
def live(trained: Live) -> Iterator[Live]:
    """With no candidate yet."""
    champions.promote_by_hand(trained.store, NAME, "monday")
    before = {item.key: trained.store.get(item.key)[0] for item in trained.store.list("")}
    yield trained
    for item in list(trained.store.list("")):
        if item.key not in before:
            trained.store.delete(item.key)
    for key, body in before.items():
        trained.store.put(key, body)


def came_in(drift: Drift) -> CameIn:
    assert drift.problems == []
    assert drift.came_in
    return drift.came_in


def test_new_images_of_another_kind_have_a_small_p_value_and_those_of_the_same_kind_by_chance_only(
    live: Live, tmp_path: Path
) -> None:
    """Of eight nights of the same kind, more than two are below 0.05 once in 170 times."""
    p_values = []
    for seed in range(8):
        same = came_in(live.look(night(live.workspace, tmp_path / f"same{seed}", more(90, 1000 * (seed + 1))), "same"))
        assert same.p_value is not None
        p_values.append(same.p_value)
        live.store.delete(drift_key("same"))
        for key in ("weights.safetensors", "predictions.safetensors", "card.json"):
            live.store.delete(version_key(NAME, "same") + key)
        live.store.delete("runs/same.json")
    assert sum(p_value < 0.05 for p_value in p_values) <= 2, p_values
    for number, change in enumerate([lambda pixels: 255 - pixels, lambda pixels: pixels // 3]):
        other = came_in(live.look(night(live.workspace, tmp_path / f"o{number}", more(90), change), f"other-{number}"))
        assert other.p_value is not None
        assert other.p_value < 0.01


def test_the_champion_is_as_good_on_new_images_of_the_same_kind_and_worse_on_others(live: Live, tmp_path: Path) -> None:
    same = came_in(live.look(night(live.workspace, tmp_path / "same", more(90)), "same"))
    inverted = more(90, 3000)
    other = came_in(live.look(night(live.workspace, tmp_path / "other", inverted, lambda image: 255 - image), "other"))
    assert same.images == other.images == 90
    assert same.new
    assert same.old
    assert other.new
    assert (same.new.images, same.new.known) == (90, 90)
    assert same.new.accuracy is not None
    assert other.new.accuracy is not None
    assert same.new.accuracy > 0.9 > 0.6 > other.new.accuracy
    assert same.new.interval
    assert same.new.interval[0] <= same.new.accuracy <= same.new.interval[1]
    assert other.confidence_p is not None
    assert other.confidence_p < 0.01


def test_the_most_unusual_of_the_new_images_are_those_that_look_like_no_old_one(live: Live, tmp_path: Path) -> None:
    odd = {f"bee/odd-{number}": (number, "bee") for number in range(5000, 5003)}
    ref = night(live.workspace, tmp_path, {**more(60), **odd}, lambda pixels: pixels)
    for name in odd:
        Image.fromarray(np.full((32, 32, 3), 255, np.uint8) - np.arange(3, dtype=np.uint8) * int(name[-1])).save(
            tmp_path / f"{name}.png"
        )
    ref = pack_snapshot(live.workspace, make_snapshot(live.store, NAME, config(tmp_path, image_size=32, split=HALVES)))
    found = came_in(live.look(ref, "odd")).unusual
    assert len(found) == 20
    assert {image.id for image in found[:3]} == {f"{name}.png" for name in odd}
    assert [image.distance for image in found] == sorted((image.distance for image in found), reverse=True)


def test_images_of_a_class_that_the_champion_does_not_know_are_told_apart(live: Live, tmp_path: Path) -> None:
    strange = {f"dog/{number}": (number, "ant") for number in range(6000, 6040)}
    found = came_in(live.look(night(live.workspace, tmp_path, {**more(30), **strange}), "strange"))
    assert found.new
    assert (found.new.images, found.new.known) == (70, 30)


def test_of_few_new_images_the_accuracy_is_told_and_nothing_tested(live: Live, tmp_path: Path) -> None:
    found = came_in(live.look(night(live.workspace, tmp_path, more(5)), "few"))
    assert found.new
    assert found.new.images == 5
    assert (found.p_value, found.confidence_p, found.unusual) == (None, None, [])


def test_where_nothing_came_no_network_is_asked(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_errors, "is_installed", lambda: False)
    record, _ = read_record(live.store, "monday")
    model = publish(live.workspace, record.dataset, "same", says="ant")

    class Never(Tonight):
        def seen(self, *asked: object) -> object:  # type: ignore[override]
            raise AssertionError

    note_drift(live.store, model, Never(live.workspace, "same"))
    found = read_drift(live.store, "same")
    assert found
    assert came_in(found).images == 0
    assert "No image is new since the champion monday was trained" in page(live, "same").html


def test_on_the_first_night_there_is_no_champion_to_compare_with(live: Live) -> None:
    live.store.delete(history_key(NAME))
    live.store.delete(copy_key(NAME))
    drift = live.look(read_record(live.store, "monday")[0].dataset, "first")
    assert (drift.champion, drift.came_in, drift.problems) == (None, None, [])
    assert "There was no champion" in page(live, "first").html


def page(live: Live, run_id: str) -> Report:
    return build_report(live.workspace, read_record(live.store, run_id)[0], None, None)


def test_the_page_shows_what_came_in(live: Live, tmp_path: Path) -> None:
    ref = night(live.workspace, tmp_path, more(90), lambda pixels: 255 - pixels)
    drift = live.look(ref, "night")
    shown = page(live, "night")
    for text in (shown.html, shown.markdown):
        for fact in ("What came in", "90", "hardly by chance", "p = 0.001", f"{drift.seconds:.1f} s", "chi-squared"):
            assert fact in text, fact
    assert len(shown.pictures["unusual"]) == 20
    if not label_errors.is_installed():
        assert "nightshift[cleanlab]" in shown.html


@needs_cleanlab
def test_shuffled_labels_of_one_class_are_found_and_shown(live: Live, tmp_path: Path) -> None:
    shuffled = {
        f"{label}/shuffled-{number}": (number, "ant")
        for number, label in zip(range(7000, 7030), 10 * list(COLOURS), strict=True)
    }
    wrong = {f"{name}.png" for name in shuffled if not name.startswith("ant/")}
    drift = live.look(night(live.workspace, tmp_path, {**more(90), **shuffled}), "shuffled")
    assert drift.problems == []
    found = drift.label_errors
    assert found
    by_champion = {suspect.id for suspect in found.suspects if suspect.by == "champion"}
    assert by_champion
    assert by_champion <= wrong, "what the champion doubts is wrong"
    assert {suspect.suggested for suspect in found.suspects if suspect.by == "champion"} == {"ant"}
    shown = page(live, "shuffled")
    assert len(shown.pictures["suspects"]) == len(found.suspects)
    assert next(iter(by_champion)) in shown.html


@needs_cleanlab
def test_of_labels_that_are_right_hardly_any_is_doubted() -> None:
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 3, 600)
    probabilities = chance.dirichlet([0.2] * 3, 600)
    probabilities = 0.05 * probabilities + 0.95 * np.eye(3)[labels]
    assert len(label_errors.suspects(labels, probabilities)) == 0
    labels[:30] = (labels[:30] + 1) % 3
    assert set(label_errors.suspects(labels, probabilities).tolist()) == set(range(30))


@needs_cleanlab
def test_rare_classes_are_left_out_and_the_others_keep_their_places() -> None:
    labels = np.array([7, 3] * 2 + [20, 90] * 100 + [7, 5])
    probabilities = np.full((len(labels), 100), 0.0002)
    probabilities[np.arange(len(labels)), labels] = 0.98
    probabilities[[0, 50]] = 0.0002
    probabilities[[0, 50], 90] = 0.98
    assert label_errors.suspects(labels, probabilities).tolist() == [50]


@pytest.mark.parametrize("labels", [[0] * 30, [0] * 30 + [1] * 4, list(range(30))])
def test_of_one_class_alone_or_of_rare_ones_no_label_is_doubted(labels: list[int]) -> None:
    assert len(label_errors.suspects(np.array(labels), np.full((len(labels), 30), 1 / 30))) == 0


def test_a_champion_whose_snapshot_is_gone_is_told_in_a_sentence_and_on_the_page(
    live: Live, tmp_path: Path, told: Told
) -> None:
    before = read_record(live.store, "monday")[0].dataset.digest
    live.store.delete(snapshots.manifest_key(NAME, before))
    drift = live.look(night(live.workspace, tmp_path, more(30)), "night")
    (problem,) = drift.problems
    assert problem.startswith(f"what came in: there is no snapshot {before[:12]} of photos")
    assert any(problem in warning for warning in told.warnings)
    assert drift.came_in is None
    assert f"Not told: {problem}" in page(live, "night").html


def test_a_champion_that_cannot_be_built_leaves_what_needs_no_network(live: Live, tmp_path: Path) -> None:
    live.store.delete(version_key(NAME, "monday") + "weights.safetensors")
    drift = live.look(night(live.workspace, tmp_path, more(60)), "night")
    assert any("weights.safetensors is missing" in problem for problem in drift.problems)
    assert drift.labels
    assert drift.came_in
    assert (drift.came_in.images, drift.came_in.new) == (60, None)


def test_whatever_fails_the_verdict_is_not_kept_waiting(live: Live, tmp_path: Path) -> None:
    model = publish(live.workspace, night(live.workspace, tmp_path, more(30)), "night", says="ant")
    faulty = Faulty(live.store)
    faulty.fail("put", StorageError("no room for it"), key="reports/")
    faulty.fail("get", RuntimeError("a bug of ours"), key=card_key(NAME, "monday"))
    note_drift(faulty, model, Tonight(live.workspace, "night"))
    assert read_drift(live.store, "night") is None


def test_a_store_that_does_not_answer_is_waited_for_as_ever(live: Live, tmp_path: Path) -> None:
    model = publish(live.workspace, night(live.workspace, tmp_path, more(30)), "night", says="ant")
    faulty = Faulty(live.store)
    faulty.fail("put", StorageUnreachableError("away"), key="reports/")
    with pytest.raises(StorageUnreachableError):
        note_drift(faulty, model, Tonight(live.workspace, "night"))


def test_a_look_is_taken_once_also_after_the_candidate_went_live(live: Live, tmp_path: Path) -> None:
    ref = night(live.workspace, tmp_path, more(30))
    first = live.look(ref, "night")
    champions.promote_by_hand(live.store, NAME, "night")

    class Never(Tonight):
        def seen(self, *asked: object) -> object:  # type: ignore[override]
            raise AssertionError

    model = read_card(live.store, NAME, "night").ref()
    note_drift(live.store, model, Never(live.workspace, "night"))
    assert read_drift(live.store, "night") == first


def test_a_damaged_account_is_not_shown_and_is_made_again(live: Live, tmp_path: Path, told: Told) -> None:
    ref = night(live.workspace, tmp_path, more(30))
    drift = live.look(ref, "night")
    for body in (b"{}", documents.encoded(drift).replace(b'"format": 1', b'"format": 2')):
        live.store.put(drift_key("night"), body)
        assert read_drift(live.store, "night") is None
        assert "What came in" not in page(live, "night").html
    assert any("what came in is not shown" in warning for warning in told.warnings)
    model = read_card(live.store, NAME, "night").ref()
    note_drift(live.store, model, Tonight(live.workspace, "night"))
    again = read_drift(live.store, "night")
    assert again
    assert again.came_in == drift.came_in


def test_an_account_that_names_images_there_are_not_shows_those_there_are(live: Live, tmp_path: Path) -> None:
    drift = live.look(night(live.workspace, tmp_path, more(60)), "night")
    found = came_in(drift)
    away = [image.changed(number=10**6) for image in found.unusual[:5]]
    forged = drift.changed(came_in=found.changed(unusual=[*away, *found.unusual[5:]]))
    live.store.put(drift_key("night"), documents.encoded(forged))
    assert len(page(live, "night").pictures["unusual"]) == 15


def test_the_account_belongs_to_the_runs_report() -> None:
    place = place_of(drift_key("night"))
    assert place
    assert (place.kind, place.run_id) == ("report", "night")
