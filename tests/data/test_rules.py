"""The rules that a night's images are held to: what each finds, and what becomes of the night."""

from pathlib import Path
from typing import Any

import pytest

from nightshift.data.snapshot import (
    check_rules,
)
from nightshift.errors import (
    DatasetRejectedError,
)
from nightshift.storage.memory import MemoryStore
from tests.data.made import made
from tests.data.pictures import album, picture, write

NAMES = ("ant", "bee", "cow")


def test_a_snapshot_that_breaks_a_rule_stops_the_night_and_is_nothing_to_compare_with(
    memory: MemoryStore, root: Path
) -> None:
    write(root, album(range(100)))
    made(memory, root)
    for path in sorted(root.rglob("*.png"))[:30]:
        path.unlink()
    for _ in range(2):  # the second night must not take the first for what is usual
        with pytest.raises(DatasetRejectedError, match=r'30 of the 100 images.*set vanished = "warn"'):
            check_rules(made(memory, root))
    check_rules(made(memory, root, rules={"vanished": "warn", "few_images": "off", "label_shift": "off"}))
    assert made(memory, root).ok


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda root: write(root, {f"cat/{n}.png": picture(500 + n) for n in range(5)}), "new_class"),
        (lambda root: [path.unlink() for path in (root / "cow").iterdir()], "gone_class"),
        (lambda root: write(root, {f"ant/x{n}.png": picture(900 + n) for n in range(99)}), "label_shift"),
        (lambda root: write(root, {f"ant/x{n}.png": b"broken" for n in range(20)}), "unreadable"),
        (lambda root: write(root, {"ant/copy.png": picture(0)}), "duplicates"),
        (lambda root: write(root, {"bee/copy.png": picture(0)}), "conflicts"),
    ],
)
def test_each_rule_finds_what_it_is_for_and_nothing_else_does(
    memory: MemoryStore, root: Path, change: Any, rule: str
) -> None:
    write(root, {**album(range(100)), **{f"cow/{n}.png": picture(700 + n) for n in range(8)}})
    quiet = {"vanished": "off", "few_images": "off"}
    assert made(memory, root, rules=quiet).findings == []
    change(root)
    assert [finding.rule for finding in made(memory, root, rules=quiet).findings] == [rule]
    assert made(memory, root, rules={**quiet, rule: "off"}).ok


def test_a_class_whose_labels_are_shuffled_stops_the_night_and_a_few_mended_ones_do_not(
    memory: MemoryStore, root: Path
) -> None:
    def relabel(images: list[Path]) -> None:
        for number, path in enumerate(images):
            path.rename(root / ("bee", "cow")[number % 2] / f"was-{path.name}")

    quiet = {"vanished": "off"}  # where folders are the labels, it is another name

    write(root, {f"{name}/{n}.png": picture(200 * place + n) for place, name in enumerate(NAMES) for n in range(30)})
    made(memory, root, rules=quiet)
    relabel(sorted((root / "ant").iterdir())[:8])
    check_rules(made(memory, root, rules=quiet))
    relabel(sorted((root / "ant").iterdir())[:20])
    with pytest.raises(DatasetRejectedError, match=r'20 of 22 of ant\. .*set relabelled = "warn"'):
        check_rules(made(memory, root, rules=quiet))


def test_a_class_with_few_images_is_a_finding(memory: MemoryStore, root: Path) -> None:
    write(root, {**album(range(60)), "cow/1.png": picture(70)})
    (finding,) = made(memory, root, rules={"min_images_per_class": 5}).findings
    assert (finding.rule, finding.ok, "cow has 1" in finding.detail) == ("few_images", True, True)
