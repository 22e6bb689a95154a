"""A JPEG has the pixels that Pillow decodes, whoever decodes it, and is refused where Pillow refuses it."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from nightshift.data.images import open_image
from nightshift.errors import UnreadableImageError
from tests.data.test_images import PICTURE, damage, encoded


def decoded_by_pillow(body: bytes) -> np.ndarray | str:
    """The pixels of a JPEG, or `refused`."""
    try:
        with Image.open(io.BytesIO(body), formats=["JPEG"]) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception:  # decoders raise anything on damaged files
        return "refused"


JPEGS = [
    encoded("JPEG", picture, subsampling=subsampling, quality=quality, exif=exif, **how)
    for picture in (PICTURE, PICTURE.crop((0, 0, 33, 17)), PICTURE.resize((301, 222), Image.Resampling.BICUBIC))
    for subsampling, quality in (("4:2:0", 75), ("4:2:2", 95), ("4:4:4", 30))
    for exif in (b"", b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0")
    for how in ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True})
]


@pytest.mark.parametrize("number", range(0, len(JPEGS), 12))
def test_a_jpeg_has_the_pixels_that_pillow_decodes(number: int) -> None:
    """Data sets of yesterday were decoded by Pillow, and their images are known by their pixels."""
    for body in JPEGS[number : number + 12]:
        assert np.array_equal(np.asarray(open_image(body)), decoded_by_pillow(body))


@given(body=st.sampled_from(JPEGS[::5]), data=st.data())
@settings(max_examples=200)
def test_a_damaged_jpeg_has_the_pixels_that_pillow_decodes_or_is_refused_as_by_pillow(
    body: bytes, data: st.DataObject
) -> None:
    damaged = damage(body, data, first=len(body) // 2, most=4)
    expected = decoded_by_pillow(damaged)
    try:
        pixels = np.asarray(open_image(damaged))
    except UnreadableImageError:
        assert isinstance(expected, str)
    else:
        assert np.array_equal(pixels, expected)
