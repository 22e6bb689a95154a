"""Which images came in since another night, and how the classes have moved."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nightshift.data.datasets import open_dataset
from nightshift.errors import SourceError
from nightshift.judging.arrivals import Arrivals, Counts, arrivals, judged
from nightshift.judging.came_in import label_shift
from nightshift.refs import DatasetRef
from nightshift.workspace import Workspace
from tests.data.pictures import SIZE, picture, write
from tests.judging.nights import NAME, images
from tests.judging.test_tonight import contents
from tests.made_up import in_memory

BEES, COWS = range(120), range(200, 300)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return in_memory(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def monday(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> DatasetRef:
    return images(workspace, tmp_path_factory.mktemp("monday"), {"bee": BEES, "cow": COWS})


def since(workspace: Workspace, monday: DatasetRef, tonight: DatasetRef, most: int = 2000) -> Arrivals:
    return arrivals(workspace.store, NAME, tonight.digest, monday.digest, most)


def test_a_class_whose_share_has_moved_is_told_and_tested(
    workspace: Workspace, monday: DatasetRef, tmp_path: Path
) -> None:
    grown = images(workspace, tmp_path, {"bee": BEES, "cow": range(200, 500)})
    found = since(workspace, monday, grown)
    assert found.came == 200
    shift = label_shift(found.counts)
    assert (shift.before + shift.came, shift.went) == (shift.tonight, 0)
    assert shift.p_value is not None
    assert shift.p_value < 1e-6
    assert {moved.name for moved in shift.moved} == {"bee", "cow"}
    cows = next(moved for moved in shift.moved if moved.name == "cow")
    assert cows.moved == pytest.approx(cows.tonight / shift.tonight - cows.before / shift.before)
    assert shift.distance == pytest.approx(cows.moved)


def test_new_images_are_those_whose_content_the_other_snapshot_has_not_and_a_copy_counts_once(
    workspace: Workspace, monday: DatasetRef, tmp_path: Path
) -> None:
    write(tmp_path, {f"bee/copy-{number}.png": picture(number) for number in (1, 2, 900)})
    write(tmp_path, {f"cow/new-{number}.png": picture(901) for number in (1, 2)})
    write(tmp_path, {"cow/torn.png": picture(900)})
    found = since(workspace, monday, images(workspace, tmp_path, {"bee": BEES, "cow": COWS}))
    assert found.came == 1, "the copies of bees are known, 900 stands under two labels, and 901 twice"
    (new,) = found.new
    assert (new.id, new.label) == ("cow/new-1.png", "cow")


def test_an_image_is_named_by_its_number_in_the_packed_split(
    workspace: Workspace, monday: DatasetRef, tmp_path: Path
) -> None:
    tonight = images(workspace, tmp_path, {"bee": BEES, "cow": COWS, "ant": range(300, 400)}, size=SIZE)
    found = since(workspace, monday, tonight)
    dataset = open_dataset(workspace, tonight)
    assert {image.split for image in found.new} == {"train", "validation", "test"}
    for image in [*found.new, *found.old]:
        shown = dataset.images_of(image.split)[image.number].numpy()
        assert np.array_equal(shown, np.asarray(Image.open(tmp_path / image.id))), image.id


def test_old_images_are_tonights_test_images_that_the_other_snapshot_had_and_did_not_train_on(
    workspace: Workspace, monday: DatasetRef, tmp_path: Path
) -> None:
    more = {"test": 0.8, "validation": 0.1, "by": "image"}
    tonight = images(workspace, tmp_path, {"bee": BEES, "cow": range(200, 400)}, split=more)
    found = since(workspace, monday, tonight)
    trained, tested = contents(workspace, monday, "train"), contents(workspace, tonight, "test")
    known = trained | contents(workspace, monday, "validation") | contents(workspace, monday, "test")
    assert len(found.old) == len(tested & known - trained) > 0
    assert {image.split for image in found.old} == {"test"}


def test_some_of_many_are_chosen_alike_on_every_night(workspace: Workspace, monday: DatasetRef, tmp_path: Path) -> None:
    tuesday = images(workspace, tmp_path / "tuesday", {"bee": BEES, "cow": range(200, 400)})
    wednesday = images(workspace, tmp_path / "wednesday", {"bee": BEES, "cow": range(200, 410)})
    few, all_of_them = since(workspace, monday, tuesday, most=30), since(workspace, monday, tuesday)
    assert few.came == all_of_them.came == 100
    assert few.new == all_of_them.new[:30]
    assert few.old == all_of_them.old[:30]
    later = {image.id for image in since(workspace, monday, wednesday, most=30).new}
    assert len(later & {image.id for image in few.new}) >= 20, "ten more images can only take ten places"


def test_judged_images_are_those_that_are_not_trained_on(workspace: Workspace, monday: DatasetRef) -> None:
    found = judged(workspace.store, NAME, monday.digest, 2000)
    assert {image.split for image in found} == {"validation", "test"}
    dataset = open_dataset(workspace, monday)
    assert len(found) == len(dataset.test_labels) + len(dataset.images_of("validation"))
    assert judged(workspace.store, NAME, monday.digest, 7) == found[:7]


def test_without_the_other_snapshot_nothing_can_be_told(workspace: Workspace, monday: DatasetRef) -> None:
    with pytest.raises(SourceError, match="there is no snapshot"):
        arrivals(workspace.store, NAME, monday.digest, "7" * 64, 10)


def counts(stayed: dict[str, int], came: dict[str, int], went: dict[str, int] | None = None) -> Counts:
    went = went or {}

    def both(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
        return {name: one.get(name, 0) + other.get(name, 0) for name in {*one, *other}}

    return Counts(before=both(stayed, went), tonight=both(stayed, came), stayed=stayed, came=came, went=went)


def test_images_that_are_in_both_snapshots_do_not_hide_that_all_new_ones_are_of_one_class() -> None:
    """Tested as two samples, the snapshots would hardly differ: p = 0.7."""
    of_one_class = counts({"bee": 5000, "cow": 5000}, {"bee": 60})
    p_value = of_one_class.p_value()
    assert p_value is not None
    assert p_value < 1e-10


def test_a_relabelled_image_has_gone_from_one_class_and_come_to_another(
    workspace: Workspace, monday: DatasetRef, tmp_path: Path
) -> None:
    moved = range(200, 290)
    table = ["image,label", *(f"bee/{number:05}.png,bee" for number in BEES)]
    table += [f"cow/{number:05}.png,{'ox' if number in moved else 'cow'}" for number in COWS]
    tonight = images(workspace, tmp_path, {"bee": BEES, "cow": COWS}, "\n".join(table))
    found = since(workspace, monday, tonight)
    assert found.came == 0
    shift = label_shift(found.counts)
    assert shift.came == shift.went > 20
    assert {shift.moved[0].name, shift.moved[1].name} == {"ox", "cow"}
    assert shift.p_value is not None
    assert shift.p_value < 1e-6


@pytest.mark.parametrize(
    "found",
    [
        counts({"bee": 100, "cow": 100}, {}),
        counts({"bee": 100, "cow": 100}, {"bee": 10}, {"cow": 10}),
        counts({"bee": 100}, {"bee": 100}),
        counts({f"class {number}": 1 for number in range(10)}, {"class 1": 20}),
        counts({}, {}),
    ],
)
def test_of_too_few_images_nothing_is_tested(found: Counts) -> None:
    assert found.p_value() is None


def test_rare_classes_are_tested_together() -> None:
    many = {f"class {number}": 1 for number in range(1000)}
    assert counts({**many, "bee": 1000}, {**many, "bee": 1000}).p_value() == pytest.approx(1)
    p_value = counts({**many, "bee": 1000}, {"bee": 500}).p_value()
    assert p_value is not None
    assert p_value < 1e-10


def test_where_nothing_has_moved_the_test_says_so_by_chance_only() -> None:
    """At 0.05, of 400 nights whose new images are like the old ones: 20 expected, more than 36 once in 3,000 times."""
    chance, shares = np.random.default_rng(0), [0.5, 0.3, 0.15, 0.05]
    names = ("ant", "bee", "cow", "dog")

    def drawn(images: int) -> dict[str, int]:
        return dict(zip(names, chance.multinomial(images, shares).tolist(), strict=True))

    found = [counts(drawn(2000), drawn(200), drawn(100)).p_value() for _ in range(400)]
    assert sum(p_value is not None and p_value < 0.05 for p_value in found) <= 36
    assert None not in found
