"""Images are opened by what is inside them, within bounds; whatever is none is refused with a reason."""

import io
import os
import socket
import stat
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nightshift.data import images
from nightshift.data.images import fit, open_image
from nightshift.errors import UnreadableImageError
from nightshift.values import Resize

PIXELS = np.random.default_rng(1).integers(0, 256, (40, 48, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)


def encoded(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture or PICTURE).save(file, kind, **options)
    return file.getvalue()


def fitted(image: Image.Image, size: int, how: Resize) -> np.ndarray:
    return np.asarray(fit(image, size, how))


def reason(source: Path | bytes) -> str:
    """Why an image is refused, as one line; that takes no longer than people wonder, of the processor's time."""
    started = time.process_time()
    with pytest.raises(UnreadableImageError) as refused:
        open_image(source)
    assert time.process_time() - started < 2
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", images.FORMATS)
def test_each_format_is_read_as_rgb(kind: str, tmp_path: Path) -> None:
    body = encoded(kind, lossless=True)  # which only WEBP knows
    path = tmp_path / "any-name.txt"
    path.write_bytes(body)
    for source in (body, path):
        image = open_image(source)
        assert (image.mode, image.size) == ("RGB", (48, 40))
        if kind not in ("GIF", "JPEG"):
            assert np.array_equal(np.asarray(image), PIXELS)


@pytest.mark.parametrize(
    "kind", ["AVIF", "BLP", "DDS", "EPS", "ICNS", "ICO", "JPEG2000", "PCX", "PDF", "SGI", "SPIDER", "TGA", "XBM"]
)
def test_no_other_format_is_read_whatever_the_name(kind: str, tmp_path: Path) -> None:
    modes = {"BLP": "P", "SPIDER": "F", "XBM": "1"}
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(kind, PICTURE.convert(modes.get(kind, "RGB"))))
    assert reason(path).startswith("not an image of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP, or damaged")


def test_an_eps_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "started"
    for name in ("gs", "gswin32c", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {trap}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    reason(encoded("EPS"))
    assert not trap.exists()


def test_an_image_is_turned_as_its_exif_data_says() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    image = open_image(encoded("PNG", PICTURE.rotate(90, expand=True), exif=turned))
    assert np.array_equal(np.asarray(image), PIXELS)


def test_the_first_frame_of_several_is_read() -> None:
    others = [PICTURE.rotate(90), PICTURE.rotate(180)]
    for kind in ("TIFF", "WEBP", "PNG"):
        body = encoded(kind, save_all=True, append_images=others, lossless=True)
        assert np.array_equal(np.asarray(open_image(body)), PIXELS)
    assert open_image(encoded("MPO", save_all=True, append_images=others)).size == (48, 40)


def with_alpha(mode: str) -> Image.Image:
    """The picture, whose left half is transparent."""
    picture = PICTURE.convert(mode)
    alpha = Image.new("L", picture.size, 255)
    alpha.paste(0, (0, 0, 24, 40))
    picture.putalpha(alpha)
    return picture


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_is_transparent_is_seen_on_white(kind: str, mode: str) -> None:
    found = np.asarray(open_image(encoded(kind, with_alpha(mode), lossless=True)))
    assert (found[:, :24] == 255).all()
    assert np.array_equal(found[:, 24:], np.asarray(PICTURE.convert(mode).convert("RGB"))[:, 24:])


def test_what_is_half_transparent_is_half_white() -> None:
    picture = Image.new("RGBA", (2, 2), (0, 100, 200, 128))
    assert open_image(encoded("PNG", picture)).getpixel((0, 0)) == (127, 177, 227)


def test_alpha_that_hides_nothing_changes_nothing() -> None:
    assert np.array_equal(np.asarray(open_image(encoded("PNG", PICTURE.convert("RGBA")))), PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_colour_of_a_palette_that_is_transparent_is_white(kind: str) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    body = encoded(kind, palette, transparency=0)
    assert np.asarray(open_image(body)).tolist() == [[[255, 255, 255], [0, 200, 0]]]
    whole = PICTURE.quantize(16)
    assert (np.asarray(open_image(encoded("PNG", whole, transparency=bytes(16)))) == 255).all()


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (9, 9, 9)), ("L", 9), ("1", 0), ("I;16", 9)])
def test_the_colour_that_a_png_calls_transparent_is_white(mode: str, colour: Any) -> None:
    picture = Image.new(mode, (2, 1), colour)
    picture.putpixel((1, 0), (80, 80, 80) if mode == "RGB" else 80 * 257 if mode == "I;16" else 255)
    found = np.asarray(open_image(encoded("PNG", picture, transparency=colour)))
    assert found[0, 0].tolist() == [255, 255, 255]
    assert found[0, 1].tolist() == [80, 80, 80] if mode in ("RGB", "I;16") else [255, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_grey_of_16_bits_is_neither_white_nor_black(kind: str) -> None:
    grey = np.asarray(PICTURE.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    found = open_image(encoded(kind, deep if kind != "PPM" else deep.convert("I")))
    assert np.array_equal(np.asarray(found), np.asarray(Image.fromarray(grey).convert("RGB")))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_of_which_nobody_knows_what_is_white_are_refused(mode: str) -> None:
    assert "which of its values is white" in reason(encoded("TIFF", PICTURE.convert(mode)))


# Squares


def halves(width: int, height: int) -> Image.Image:
    """The left half red, the right half blue."""
    image = Image.new("RGB", (width, height), (255, 0, 0))
    image.paste((0, 0, 255), (width // 2, 0, width, height))
    return image


def test_a_crop_keeps_the_middle_of_the_longer_side() -> None:
    pixels = np.zeros((32, 96, 3), np.uint8)
    pixels[:, 32:64] = PIXELS[:32, :32]
    assert np.array_equal(fitted(Image.fromarray(pixels), 32, "crop"), PIXELS[:32, :32])
    assert np.array_equal(fitted(Image.fromarray(pixels.swapaxes(0, 1)), 32, "crop"), PIXELS[:32, :32].swapaxes(0, 1))


def test_a_crop_of_an_image_whose_shorter_side_has_the_size_only_cuts() -> None:
    assert np.array_equal(fitted(Image.fromarray(PIXELS[:, :47]), 40, "crop"), PIXELS[:, 3:43])


def test_a_pad_shows_the_whole_image_in_the_middle_of_white() -> None:
    found = fitted(halves(96, 32), 48, "pad")
    assert (found[:16] == 255).all()
    assert (found[32:] == 255).all()
    assert (found[16:32, :20] == (255, 0, 0)).all()
    assert (found[16:32, 28:] == (0, 0, 255)).all()


def test_a_stretch_shows_the_whole_image_on_the_whole_square() -> None:
    found = fitted(halves(96, 32), 48, "stretch")
    assert (found[:, :20] == (255, 0, 0)).all()
    assert (found[:, 28:] == (0, 0, 255)).all()


@pytest.mark.parametrize("how", get_args(Resize))
def test_an_image_that_has_the_size_already_is_unchanged_to_the_bit(how: Resize) -> None:
    assert np.array_equal(fitted(Image.fromarray(PIXELS[:, :40]), 40, how), PIXELS[:, :40])


@pytest.mark.parametrize("how", get_args(Resize))
@pytest.mark.parametrize("size", [16, 40, 512])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65_535, 1), (1, 600), (511, 513)])
def test_every_image_fits_every_square(how: Resize, size: int, shape: tuple[int, int]) -> None:
    found = fitted(Image.new("RGB", shape, (10, 20, 30)), size, how)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert (found == (10, 20, 30)).all(2).any()


def test_an_image_is_made_smaller_from_all_its_pixels() -> None:
    """Lines of black and white, of a pixel each, become grey and not black or white."""
    lines = np.zeros((128, 128, 3), np.uint8)
    lines[::2] = 255
    assert (abs(fitted(Image.fromarray(lines), 32, "stretch")[2:-2].astype(int) - 127) <= 2).all()


# What is no image file


def pipe(path: Path) -> str:
    os.mkfifo(path)
    return "a pipe"


def listening(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
    return "a socket"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "a device"


def link_to_nowhere(path: Path) -> str:
    path.symlink_to("nowhere.png")
    return "leads nowhere"


def link_to_itself(path: Path) -> str:
    path.symlink_to(path.name)
    return "Too many levels of symbolic links"


def folder(path: Path) -> str:
    path.mkdir()
    return "a folder"


def nothing(path: Path) -> str:
    return "there is no such file"


def empty(path: Path) -> str:
    path.touch()
    return "it is empty"


def huge(path: Path) -> str:
    with path.open("wb") as file:
        file.truncate(10**12)
    return "1,000,000 MB"


@pytest.mark.parametrize(
    "make", [pipe, listening, device, link_to_nowhere, link_to_itself, folder, nothing, empty, huge]
)
def test_what_is_no_regular_file_of_some_size_is_refused_at_once(tmp_path: Path, make: Callable[[Path], str]) -> None:
    path = tmp_path / "x.png"
    expected = make(path)
    assert expected in reason(path)


def test_a_pipe_that_takes_the_place_of_a_file_meanwhile_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "x.png")
    regular, look = (tmp_path / "y.png"), Path.stat
    regular.write_bytes(encoded("PNG"))
    monkeypatch.setattr(Path, "stat", lambda path, **options: look(regular, **options))
    assert stat.S_ISREG((tmp_path / "x.png").stat().st_mode)
    assert "a pipe" in reason(tmp_path / "x.png")


def test_names_that_cannot_be_names_are_refused() -> None:
    assert "null" in reason(Path("a\0b.png"))
    assert "too long" in reason(Path("x" * 5000 + ".png"))


def test_a_name_that_is_no_utf_8_is_opened(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    path.write_bytes(encoded("PNG"))
    assert open_image(path).size == (48, 40)


# What would take too much


def png_of(width: int, height: int) -> bytes:
    """A PNG of a bit a pixel, which a few hundred kilobytes can fill; only its beginning."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(8000, 7000), (12_000, 12_000), (60_000, 60_000), (40_000_000, 1), (1, 40_000_000)])
def test_a_small_file_with_too_many_pixels_is_refused(size: tuple[int, int]) -> None:
    """0.5 MB took 2 GB; 5 KB took 1.4 GB, to make a single line of pixels smaller."""
    told = reason(png_of(*size))
    assert "pixels" in told
    assert told.endswith("make it smaller")


def test_a_photograph_of_45_megapixels_is_read() -> None:
    assert open_image(encoded("JPEG", Image.new("RGB", (8192, 5464)))).size == (8192, 5464)


def test_a_tiff_with_tiles_far_larger_than_the_image_is_refused() -> None:
    """783 KB took 770 MB."""
    content = zlib.compress(bytes(3 * 4096))
    entries = [
        *((256, 4, 1, 16), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)),
        *((322, 4, 1, 16384), (323, 4, 1, 16384), (324, 4, 1, 8 + 2 + 12 * 10 + 4), (325, 4, 1, len(content))),
    ]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    body = b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + struct.pack("<I", 0) + content
    assert "268.4 million pixels" in reason(body)


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    """440 KB took 19 s, and a scan more costs 82 bytes."""
    body = encoded("JPEG", Image.new("RGB", (5000, 5000)), progressive=True, subsampling=0)
    last = body[body.rfind(b"\xff\xc4", 0, body.rfind(b"\xff\xda")) : -2]
    assert "scans" in reason(body[:-2] + 100 * last + body[-2:])
    assert open_image(body).size == (5000, 5000)


def test_what_follows_the_end_of_a_jpeg_is_not_counted_as_scans() -> None:
    """Telephones put a film there."""
    body = encoded("JPEG", Image.new("RGB", (4000, 3000)), progressive=True)
    assert open_image(body + 1000 * b"\xff\xda\0\x02film").size == (4000, 3000)


def test_a_large_ppm_in_plain_text_is_refused_and_a_small_one_read() -> None:
    """24 MB took 18 s."""
    assert open_image(b"P3 2 1 255 " + b"9 " * 6).size == (2, 1)
    assert "too long" in reason(b"P3 2000 2000 255 " + b"1 " * 12_000_000)


def damage(body: bytes, data: st.DataObject, first: int, most: int) -> bytes:
    """A file of which up to `most` bytes from `first` on are others, and which may be cut there."""
    damaged = bytearray(body)
    for _ in range(data.draw(st.integers(1, most))):
        damaged[data.draw(st.integers(first, len(body) - 1))] = data.draw(st.integers(0, 255))
    return bytes(damaged[: data.draw(st.one_of(st.none(), st.integers(first, len(body))))])


BODIES = [
    *(encoded(kind) for kind in images.FORMATS),
    encoded("JPEG", progressive=True),
    encoded("TIFF", compression="tiff_lzw"),
    encoded("PNG", PICTURE.quantize(16)),
]


@given(body=st.sampled_from(BODIES), data=st.data())
@settings(max_examples=200)
def test_a_damaged_image_is_read_or_refused_and_nothing_else(body: bytes, data: st.DataObject) -> None:
    with suppress(UnreadableImageError):
        assert open_image(damage(body, data, first=0, most=8)).mode == "RGB"
