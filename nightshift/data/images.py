"""The one place where an image file is opened, whoever has made it.

What is inside a file decides how it is read, and its name decides nothing. Only the formats of `FORMATS` are tried: of
the others that Pillow knows, some start programs (EPS starts Ghostscript) and most are never met. Reading an image
takes less than half a gigabyte of memory and a few seconds, or the image is refused before its pixels are decoded.
"""

import io
import os
import re
import stat
import warnings
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TiffImageFile

from nightshift.errors import UnreadableImageError
from nightshift.values import Resize

FORMATS = {"BMP": 9, "GIF": 9, "JPEG": 9, "PNG": 9, "PPM": 9, "TIFF": 12, "WEBP": 17}
"""What is read, and how many bytes a pixel takes at most until the image is upright and in RGB, as was measured."""
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
"""Of the names by which images are found in folders."""
MAX_BYTES = 100_000_000
"""The size of the largest file that is read."""
_MAX_MEMORY = 450_000_000
_MAX_SIDE = 65_535
"""To make an image of 40 million pixels in one line smaller takes Pillow 1.4 GB."""
_JPEG_IN_SCANS = 13
"""As in FORMATS, for a JPEG of several scans: what they say is kept until the last."""
_MAX_SCANNED = 1_000_000_000
"""Pixels times scans of a JPEG. A scan of a few bytes takes the time of all pixels; usual are 1 to 12 scans."""
_MAX_BYTES_IN_PYTHON = 2_000_000
"""Of what Pillow decodes in Python, at a microsecond a byte: a BMP in runs, and most variants of PPM."""
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_START_OF_SCAN, _END_OF_IMAGE = b"\xda", b"\xd9"
_SMALLER = "make it smaller"
WHITE = (255, 255, 255)
"""What stands where an image shows nothing."""

# Pillow only warns of what is larger than its own limit, and raises at twice that.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def open_image(source: Path | bytes) -> Image.Image:
    """An image in RGB as people see it: turned as its EXIF data says, and the first frame if there are several.

    What is transparent is seen on white. Grey of 16 bits is cut to its upper 8.

    Args:
        source: a file, or the content of one.

    Raises:
        UnreadableImageError: it is no image of FORMATS, is damaged or too large, or no regular file. The message is the
            reason; whoever asked names the image.
    """
    body = _read(source) if isinstance(source, Path) else source
    check_size(len(body))
    try:
        image = _decoded(body)
        if image.mode == "RGB":
            return image
        white = Image.new("RGB", image.size, WHITE)
        white.paste(image, mask=image)
        return white
    except UnreadableImageError:
        raise
    except UnidentifiedImageError:  # Pillow's own message names an object in memory
        raise UnreadableImageError(f"not an image of {', '.join(FORMATS)}, or damaged") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UnreadableImageError(f"it has too many pixels: {_SMALLER}") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise UnreadableImageError(f"damaged: {str(error) or type(error).__name__}") from error


def _decoded(body: bytes) -> Image.Image:
    """The first frame, upright: in RGBA if anything in it may be transparent, else in RGB."""
    with Image.open(io.BytesIO(body), formats=tuple(FORMATS)) as file:
        _check_costs(file, body)
        image: Image.Image = _plain_jpeg(file, body) or file
        if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
            raise UnreadableImageError("nothing says which of its values is white: save it with 8 or 16 bits a channel")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "I" or image.mode.startswith("I;16"):  # Pillow would clip it at 255
            values = np.asarray(image)
            grey = (values // 257).astype(np.uint8)
            if "transparency" in image.info:
                grey[values == image.info["transparency"]] = 255
            return Image.fromarray(grey).convert("RGB")
        wanted = "RGBA" if image.has_transparency_data else "RGB"
        return image if image.mode == wanted else image.convert(wanted)


def _plain_jpeg(image: ImageFile.ImageFile, body: bytes) -> Image.Image | None:
    """A common JPEG, with the pixels that Pillow would decode, in three quarters of the time; None of all others.

    None also of what is damaged: Pillow then says what is wrong with it, or is more patient.
    """
    if (image.format, image.mode) != ("JPEG", "RGB") or image.info.get("progressive"):
        return None
    try:
        decoded = Image.fromarray(simplejpeg.decode_jpeg(body, "RGB"))
    except ValueError:
        return None
    decoded.format, decoded.info = image.format, image.info
    return decoded


def fit(image: Image.Image, size: int, how: Resize) -> Image.Image:
    """An image as a square of `size` by `size` pixels.

    `crop` scales its shorter side to `size` and cuts off both ends of the longer one alike. `pad` scales its longer
    side to `size` and puts it in the middle of white. `stretch` scales each side by itself. All scale by Pillow's
    bicubic filter, which sees every pixel when it makes an image smaller. An image that has the size already is
    returned unchanged to the bit, whatever `how` says.

    Args:
        image: in RGB, as `open_image` returns it.
    """
    if image.size == (size, size):
        return image
    width, height = image.size
    if how == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2  # whole pixels, which are not blurred
        box = (left, top, left + side, top + side)
        return image.resize((size, size), Image.Resampling.BICUBIC, box)
    if how == "stretch":
        return image.resize((size, size), Image.Resampling.BICUBIC)
    longer = max(width, height)
    # A line of pixels, however thin, is still seen.
    scaled = image.resize(
        (max(1, round(width * size / longer)), max(1, round(height * size / longer))), Image.Resampling.BICUBIC
    )
    square = Image.new("RGB", (size, size), WHITE)
    square.paste(scaled, ((size - scaled.width) // 2, (size - scaled.height) // 2))
    return square


def check_size(size: int) -> None:
    """Raise UnreadableImageError if a file of `size` bytes is too large, or empty, to be read at all."""
    if size > MAX_BYTES:
        raise UnreadableImageError(
            f"it has {size / 1e6:,.0f} MB, and at most {MAX_BYTES / 1e6:,.0f} are read: {_SMALLER}"
        )
    if not size:
        raise UnreadableImageError("it is empty")


def _read(path: Path) -> bytes:
    """A regular file's bytes. Whatever else a name may lead to, a device or a pipe for example, is not even opened."""
    try:
        _check_regular(path.stat().st_mode)
        with open(path, "rb", opener=open_at_once) as file:  # another may have put a pipe in its place meanwhile
            status = os.fstat(file.fileno())
            _check_regular(status.st_mode)
            check_size(status.st_size)
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UnreadableImageError(
            "it is a link that leads nowhere" if path.is_symlink() else "there is no such file"
        ) from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise UnreadableImageError(getattr(error, "strerror", None) or str(error)) from None


def open_at_once(path: str, flags: int) -> int:
    """Open what may be a pipe, which would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK)


def _check_regular(mode: int) -> None:
    kinds = {
        stat.S_IFDIR: "a folder",
        stat.S_IFIFO: "a pipe",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
    }
    if not stat.S_ISREG(mode):
        raise UnreadableImageError(f"it is {kinds.get(stat.S_IFMT(mode), 'something else')}, and no file with an image")


def _check_costs(image: ImageFile.ImageFile, body: bytes) -> None:
    """Raise UnreadableImageError if decoding this image, whose header was read, would take too much memory or time."""
    if max(image.size) > _MAX_SIDE:
        raise UnreadableImageError(f"it is {image.width} x {image.height} pixels: {_SMALLER}")
    kind = "JPEG" if isinstance(image, JpegImageFile) else str(image.format)  # one of several pictures is an MPO
    pixels, bytes_a_pixel = image.width * image.height, FORMATS[kind]
    if kind == "JPEG" and (scans := _scans(body, most=_MAX_SCANNED // pixels)) > 1:
        bytes_a_pixel = _JPEG_IN_SCANS
        if scans * pixels > _MAX_SCANNED:
            raise UnreadableImageError(f"a JPEG with so many scans ({scans} or more) takes too long: save it anew")
    if isinstance(image, TiffImageFile):  # a tile is decoded whole, however little of it the image needs
        pixels = max(pixels, image.tag_v2.get(_TILE_WIDTH, 1) * image.tag_v2.get(_TILE_LENGTH, 1))
    if len(body) + pixels * bytes_a_pixel > _MAX_MEMORY:
        most = (_MAX_MEMORY - len(body)) // bytes_a_pixel
        raise UnreadableImageError(
            f"it has {pixels / 1e6:,.1f} million pixels, and {most / 1e6:,.1f} is the most in such a {kind}: {_SMALLER}"
        )
    if len(body) > _MAX_BYTES_IN_PYTHON and any(tile.codec_name in Image.DECODERS for tile in image.tile):
        raise UnreadableImageError(f"this variant of {kind} takes too long to decode: save it as PNG")


def _scans(body: bytes, most: int) -> int:
    """How many scans a JPEG has. Counting stops when there are more than `most`."""
    if body.count(b"\xff" + _START_OF_SCAN) < 2:  # of most, which takes a tenth of the time
        return 1
    scans, at = 0, 2
    while scans <= most and (found := _MARKER.search(body, at)) and found[1] != _END_OF_IMAGE:
        scans += found[1] == _START_OF_SCAN
        at = found.end() + int.from_bytes(body[found.end() : found.end() + 2])
    return scans
