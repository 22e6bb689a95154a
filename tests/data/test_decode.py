"""Decoding in child processes: what one image does to its process, others do not feel."""

import hashlib
import os

import numpy as np
import pytest

from nightshift.data import decode
from nightshift.data.decode import Decoders, Shape
from nightshift.data.sources.listed import Listed
from nightshift.errors import StorageUnreachableError
from tests.conftest import eventually
from tests.data.pictures import SIZE, Made
from tests.sockets import tree

SHAPE = Shape(SIZE, "crop")


def images(*names: object) -> list[Listed]:
    return [Listed(str(name), "", "", "ant") for name in names]


@pytest.mark.parametrize("bad", ["crash", "hang"])
def test_an_image_that_crashes_or_hangs_its_decoder_is_left_out_and_all_others_are_read(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_CHUNK_SECONDS", 5)
    monkeypatch.setattr(decode, "_IMAGE_SECONDS", 5)
    with Decoders(Made(), SHAPE, processes=2) as decoders:
        found = list(decoders.read(images(*range(140), bad, *range(140, 145))))
    assert [image.refused for image in found].count("") == 145
    assert ("crashed on it" if bad == "crash" else "in 5 s") in found[140].refused


@pytest.mark.parametrize("readers", [1, 4])
def test_images_come_in_order_with_their_pixels_and_sizes(readers: int) -> None:
    with Decoders(Made(readers), SHAPE, processes=2) as decoders:
        found = list(decoders.read(images(*range(200))))
    assert {(image.width, image.height) for image in found} == {(SIZE, SIZE)}
    pixels = [np.random.default_rng(number).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8) for number in range(200)]
    assert [image.stored for image in found] == [array.tobytes() for array in pixels]
    assert [image.pixels for image in found] == [hashlib.sha256(array.tobytes()).digest() for array in pixels]


def test_a_source_that_does_not_answer_is_an_error_of_the_whole_and_no_fault_of_an_image() -> None:
    with Decoders(Made(), SHAPE, processes=1) as decoders, pytest.raises(StorageUnreachableError):
        list(decoders.read(images(1, "no store", 2)))


def test_nothing_is_left_running_when_the_reading_is_broken_off() -> None:
    with Decoders(Made(), SHAPE, processes=1) as decoders:  # so that the fork server runs, which stays
        list(decoders.read(images(1)))
    before = set(tree(os.getpid()))
    with Decoders(Made(), SHAPE, processes=2) as decoders:
        next(decoders.read(images(*range(200))))
        assert len(set(tree(os.getpid())) - before) == 2
    eventually(lambda: set(tree(os.getpid())) <= before)


def test_a_process_takes_many_small_images_at_once_and_few_large_ones() -> None:
    small, large = [Listed("small", "", "", "ant", 1000)] * 300, [Listed("large", "", "", "ant", 9_000_000)] * 5
    assert [len(chunk) for chunk in decode._chunks([*small, *large], 128)] == [128, 128, 46, 2, 1]
    assert [len(chunk) for chunk in decode._chunks(large, 128)] == [2, 2, 1]
    assert [*decode._chunks([], 128)] == []
    for size, most in ((32, 128), (224, 111), (512, 21)):
        with Decoders(Made(), Shape(size, "crop"), processes=1) as decoders:
            assert decoders._most == most
