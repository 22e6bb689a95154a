"""The gate when images come and go: both models are tested on tonight's, and classes are matched by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nightshift.data import rows as table
from nightshift.data.datasets import open_dataset
from nightshift.data.stored import read_rows
from nightshift.errors import ConfigError
from nightshift.judging import gate
from nightshift.judging.answers import read_predictions, slices
from nightshift.judging.tonight import Tonight
from nightshift.publishing.prediction import Classifier
from nightshift.records import champions
from nightshift.records.history import History, history_key
from nightshift.records.versions import read_card
from nightshift.refs import DatasetRef, ModelRef, Verdict
from nightshift.settings import GateSettings
from nightshift.storage import documents
from nightshift.workspace import Workspace
from tests.judging.nights import NAME, images, publish
from tests.made_up import in_memory


def contents(workspace: Workspace, ref: DatasetRef, split: str) -> set[bytes]:
    """The sha256 of the images in a split."""
    _, rows = read_rows(workspace.store, NAME, ref.digest)
    return {content for (content,) in table.iterate(table.of_split(rows, split), "content")}


BEES, COWS, ANTS = range(120), range(200, 300), range(300, 400)


@dataclass
class Nights:
    """Monday had bees and cows. On Tuesday ants came, and the cows were gone."""

    workspace: Workspace
    monday: DatasetRef
    tuesday: DatasetRef

    def champion(self, version: str, says: str, **changed: Any) -> None:
        """Make a version of Monday's the champion, by hand."""
        publish(self.workspace, self.monday, version, says, **changed)
        champions.promote_by_hand(self.workspace.store, NAME, version)

    def judge(self, model: ModelRef, **settings: Any) -> Verdict:
        answer = Tonight(self.workspace, model.run_id).predicted
        return gate.promote(self.workspace.store, model, GateSettings(**settings), answer)

    def tested(self, name: str) -> int:
        """How many of Tuesday's test images are of a class."""
        dataset = open_dataset(self.workspace, self.tuesday)
        return int((dataset.test_labels == dataset.classes.index(name)).sum())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Nights:
    workspace = in_memory(tmp_path_factory.mktemp("home"))
    root = tmp_path_factory.mktemp("monday")
    monday = images(workspace, root, {"bee": BEES, "cow": COWS})
    table = ["image,label,camera", *(f"bee/{number:05}.png,bee,door" for number in BEES)]
    table += [f"ant/{number:05}.png,ant,{'yard' if number % 2 else ''}" for number in ANTS]
    root = tmp_path_factory.mktemp("tuesday")
    tuesday = images(workspace, root, {"bee": BEES, "ant": ANTS}, "\n".join(table))
    return Nights(workspace, monday, tuesday)


@pytest.fixture
def nights(made: Nights) -> Iterator[Nights]:
    """With no version published yet."""
    yield made
    for prefix in ("models/", "runs/"):
        for item in list(made.workspace.store.list(prefix)):
            made.workspace.store.delete(item.key)


def test_a_better_candidate_is_promoted_on_a_night_with_other_images_and_a_worse_one_is_not(nights: Nights) -> None:
    """It was refused, as the champion "was tested on other images": with growing data nothing went live any more."""
    nights.champion("first", says="cow")
    better = nights.judge(publish(nights.workspace, nights.tuesday, "better", says="bee"))
    assert better.promoted, better.reason
    assert better.comparison
    assert (better.comparison.champion, better.comparison.only_candidate) == ("first", nights.tested("bee"))
    nights.champion("second", says="bee")
    worse = nights.judge(publish(nights.workspace, nights.tuesday, "worse", says="ant"), max_class_regression=1)
    assert not worse.promoted
    assert worse.comparison
    assert worse.comparison.images == nights.tested("bee") + nights.tested("ant")
    assert worse.comparison.difference == (nights.tested("ant") - nights.tested("bee")) / worse.comparison.images
    assert "max_regression" in worse.reason


def test_classes_are_matched_by_name_and_those_that_came_and_went_are_told_apart(nights: Nights) -> None:
    """A new class sorts first, so every other class has another number than it had."""
    nights.champion("first", says="bee")
    verdict = nights.judge(publish(nights.workspace, nights.tuesday, "second", says="bee"))
    assert verdict.comparison
    assert (verdict.comparison.only_candidate, verdict.comparison.only_champion) == (0, 0)
    bees = nights.tested("bee")
    assert f"new since then, and so wrong for it: ant; on the other {bees} images +0.00 points" in verdict.reason
    assert "gone since then: cow" in verdict.reason
    assert ("known", bees) in [(guard.kind, guard.images) for guard in verdict.guards]


def test_what_a_new_class_gains_does_not_hide_what_the_others_lose(nights: Nights) -> None:
    nights.champion("first", says="bee")
    lost = nights.judge(publish(nights.workspace, nights.tuesday, "second", says="ant"), max_regression=0.5)
    assert not lost.promoted
    broken = {(guard.kind, guard.name) for guard in lost.guards if not guard.ok}
    assert broken == {("class", "bee"), ("known", "classes first knows")}
    assert "on bee (-100.00 points on" in lost.reason


def test_a_slice_has_a_guard(nights: Nights) -> None:
    """The column `camera` of the table; an image without a value in it is in none of its slices."""
    nights.champion("first", says="bee")
    candidate = publish(nights.workspace, nights.tuesday, "second", says="ant")
    verdict = nights.judge(candidate, max_regression=0.5, slices=" camera , weather", min_class_images=5)
    found = {guard.name: (guard.images, guard.ok) for guard in verdict.guards if guard.kind == "slice"}
    assert found["camera=door"] == (nights.tested("bee"), False)
    assert found.keys() == {"camera=door", "camera=yard"}
    assert 5 <= found["camera=yard"][0] < nights.tested("ant")


def test_published_predictions_say_which_image_each_is_and_slices_are_in_their_order(nights: Nights) -> None:
    store = nights.workspace.store
    publish(nights.workspace, nights.tuesday, "second", says="ant")
    ours = read_predictions(store, read_card(store, NAME, "second"))
    _, rows = read_rows(store, NAME, nights.tuesday.digest)
    known = {content: (label, extra) for content, label, extra in table.iterate(rows, "content", "label", "extra")}
    assert ours.content is not None
    found = [known[row.tobytes()] for row in ours.content]
    assert [label for label, _ in found] == [ours.card.classes[number] for number in ours.labels]
    (cameras,) = slices(store, ours, ["camera"])
    assert [number >= 0 and cameras.names[number] == "camera=door" for number in cameras.numbers] == [
        '"door"' in extra for _, extra in found
    ]


def test_a_champion_that_cannot_be_built_and_has_seen_too_few_of_tonights_images_is_not_compared(
    nights: Nights,
) -> None:
    nights.champion("first", says="bee", network="parts_net")
    verdict = nights.judge(publish(nights.workspace, nights.tuesday, "second", says="bee"))
    assert not verdict.promoted
    for part in ("'parts_net'", f"of {nights.tested('bee')} of tonight's", "nightshift promote second"):
        assert part in verdict.reason


def test_a_champion_that_takes_images_of_another_size_predicts_what_it_predicts_of_files(
    made: Nights, tmp_path: Path
) -> None:
    workspace = made.workspace
    publish(workspace, made.monday, "large", says=None)
    small = images(workspace, tmp_path / "photos", {"bee": range(20), "cow": range(200, 220)}, size=24)
    publish(workspace, small, "small", says="bee")
    card = read_card(workspace.store, NAME, "large")
    predicted = Tonight(workspace, "small").predicted(card)
    for number, image in enumerate(open_dataset(workspace, small).test_images[:].numpy()):
        Image.fromarray(image).save(tmp_path / f"{number:03}.png")
    files = sorted(map(str, tmp_path.glob("*.png")))
    expected = [item.label for item in Classifier(workspace.store, NAME, "large").predict(workspace.store, files)]
    assert [card.classes[number] for number in predicted] == expected
    assert len(set(expected)) == 2, "a network that says one class of all images shows nothing"


def test_images_that_the_champion_was_trained_on_do_not_count_for_it_after_the_splits_were_changed(
    nights: Nights, tmp_path: Path
) -> None:
    nights.champion("first", says="bee")
    more = {"test": 0.8, "validation": 0.1, "by": "image"}
    tonight = images(nights.workspace, tmp_path, {"bee": BEES, "cow": COWS}, split=more)
    verdict = nights.judge(publish(nights.workspace, tonight, "second", says="bee"))
    trained, tested = contents(nights.workspace, nights.monday, "train"), contents(nights.workspace, tonight, "test")
    assert verdict.comparison
    assert verdict.comparison.images == len(tested - trained) < len(tested)
    assert f"without {len(tested & trained)} test images that it was trained on" in verdict.reason


def test_a_network_that_is_unknown_here_is_a_mistake_in_a_sentence(nights: Nights) -> None:
    publish(nights.workspace, nights.monday, "strange", says="bee", network="parts_net")
    card = read_card(nights.workspace.store, NAME, "strange")
    with pytest.raises(ConfigError, match="parts_net"):
        Tonight(nights.workspace, "strange").predicted(card)


def test_the_best_champion_of_the_last_thirty_nights_is_tested_on_tonights_images_too(nights: Nights) -> None:
    store = nights.workspace.store
    nights.champion("best", says="bee", test_accuracy=0.9)
    gate.promote(store, publish(nights.workspace, nights.monday, "live", says="cow"), GateSettings(max_regression=1))
    candidate = publish(nights.workspace, nights.tuesday, "candidate", says="ant")
    settings = {"max_regression": 1, "max_slide": 0.01}
    slid = nights.judge(candidate, **settings)
    below = 100 * (nights.tested("bee") - nights.tested("ant")) / (nights.tested("bee") + nights.tested("ant"))
    assert not slid.promoted
    assert f"{below:.2f} points below best" in slid.reason
    history, etag = documents.read(store, history_key(NAME), History)
    long_ago = [entry.changed(at=entry.at.replace(year=entry.at.year - 1)) for entry in history.transitions]
    documents.write(store, history_key(NAME), history.changed(transitions=long_ago), etag)
    assert nights.judge(candidate, **settings).promoted
