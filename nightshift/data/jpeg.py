"""Images that are stored as JPEG, and decoded each time they are seen.

A stored image is the length of its JPEG in four bytes, little-endian, and then the JPEG, of the size at which its data
set stores images. It was made once, when the image was read. A file that is such a JPEG already is stored as it came.
"""

import io
from collections.abc import Callable

import numpy as np
import simplejpeg
from PIL import Image
from PIL.ExifTags import Base

from nightshift.errors import DataCorruptError

_QUALITY = 95
_LENGTH = 4
_LARGEST = 4 * 1024**2
_UPRIGHT = 1


def as_stored(pixels: np.ndarray, file: bytes) -> bytes:
    """An image as it is stored.

    Args:
        pixels: uint8 (size, size, 3).
        file: what it was made from.
    """
    jpeg = file if _is_as_stored(pixels, file) else encoded(pixels)
    return len(jpeg).to_bytes(_LENGTH, "little") + jpeg


def stored_at(read: Callable[[int, int], bytes], offset: int) -> bytes:
    """A stored image in its shard; less than that, or nothing, where the shard is another or cannot be read.

    Args:
        read: of an offset and a length, in bytes, what is in the shard.
    """
    try:
        length = int.from_bytes(read(offset, _LENGTH), "little")
        return read(offset, _LENGTH + min(length, _LARGEST))
    except OSError:  # the disk cannot read it, or there is no such place
        return b""


def decode(stored: bytes, into: np.ndarray) -> None:
    """Decode a stored image. Python's lock is free meanwhile.

    Args:
        into: uint8 (size, size, 3), contiguous.

    Raises:
        DataCorruptError: it is no JPEG of this size.
    """
    try:
        height, width, _ = simplejpeg.decode_jpeg(memoryview(stored)[_LENGTH:], "RGB", buffer=into).shape
    except ValueError as error:  # among them that it is larger
        raise DataCorruptError(f"it is no whole JPEG of {into.shape[1]} x {into.shape[0]} pixels: {error}") from error
    if (height, width) != into.shape[:2]:
        raise DataCorruptError(f"it is {width} x {height} pixels, and not {into.shape[1]} x {into.shape[0]}")


def encoded(pixels: np.ndarray) -> bytes:
    """The JPEG of an image, uint8 (size, size, 3)."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _is_as_stored(pixels: np.ndarray, file: bytes) -> bool:
    """Whether a file is a plain JPEG of these pixels, and no larger than they are."""
    if len(file) > pixels.nbytes or not file.startswith(b"\xff\xd8"):
        return False
    with Image.open(io.BytesIO(file)) as image:
        is_plain = image.format == "JPEG" and image.mode == "RGB" and not image.info.get("progressive")
        if not is_plain or image.size != pixels.shape[1::-1] or image.getexif().get(Base.Orientation, 1) != _UPRIGHT:
            return False
    decoded = np.empty_like(pixels)
    try:
        decode(bytes(_LENGTH) + file, decoded)
    except DataCorruptError:  # Pillow is more patient with what is not quite right
        return False
    return np.array_equal(decoded, pixels)
