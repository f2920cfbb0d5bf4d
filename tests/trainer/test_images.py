"""Files that nobody vouches for: cases 28 to 30 of the list (see test_attacks.py), and own ones."""

from __future__ import annotations

import contextlib
import gzip
import io
import struct
import time
import zipfile
import zlib

import pytest
from attacks import encoded, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, PngImagePlugin

from trainer.images import ImageError, ImageLimits, open_image


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (png(65535, 65535), "pixels, at most 67,108,864 are decoded"),
        (png(9000, 9000), "9000x9000 pixels, at most 67,108,864"),
        (png(5000, 1), "at most 200 times the other"),
        (png(1, 5000), "at most 200 times the other"),
        (png(0, 0), "empty|not an image"),
        (png(0, 7), "empty|not an image"),
        (png(64, 64), "truncated or broken"),
        (b"", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image|broken"),
    ],
)
def test_28_sizes_that_are_refused(data, problem):
    with pytest.raises(ImageError, match=problem) as caught:
        open_image(data)
    assert len(str(caught.value)) < 200


def test_28_what_is_not_rgb_is_converted():
    for mode, colour, kind in [
        ("CMYK", (0, 0, 0, 0), "JPEG"),
        ("L", 255, "PNG"),
        ("1", 1, "PNG"),
        ("P", 0, "GIF"),
        ("LA", (0, 0), "PNG"),
        ("RGBA", (10, 20, 30, 0), "PNG"),
        ("RGBA", (10, 20, 30, 0), "WEBP"),
    ]:
        image = Image.new(mode, (20, 10), colour)
        if mode == "P":
            image.putpalette([255, 255, 255])
        opened = open_image(encoded(image, kind))
        assert (opened.mode, opened.size, opened.info) == ("RGB", (20, 10), {})
        assert opened.getpixel((3, 3)) == (255, 255, 255), (mode, kind)
    deep = Image.new("I;16", (20, 10), 128 * 257)
    assert open_image(encoded(deep)).getpixel((3, 3)) == (128, 128, 128)


def test_28_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)
        red, green, blue = open_image(data).getpixel((4, 4))
        assert red > 240 and green < 10 and blue < 10


def test_29_bombs():
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 1 << 20 and Image.MAX_IMAGE_PIXELS
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    bomb = zlib.compress(bytes(32 << 20))
    row = bytes(1 + 3 * 4)
    for kind, body in [
        (b"zTXt", b"Comment\0\0" + bomb),
        (b"iTXt", b"Comment\0\1\0\0\0" + bomb),
        (b"iCCP", b"name\0\0" + bomb),
        (b"tEXt", b"Comment\0" + bytes(2 << 20)),
    ]:
        began = time.process_time()
        with contextlib.suppress(ImageError):
            opened = open_image(png(4, 4, (kind, body), pixels=row * 4))
            assert opened.size == (4, 4) and opened.info == {}
        assert time.process_time() - began < 1
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(4 << 20))
    svg = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    fits = b"SIMPLE  =                    T" + b" " * 2850 + gzip.compress(bytes(1 << 20))
    tiff = encoded(Image.new("RGB", (9, 9)), "TIFF")
    for data in (archive.getvalue(), svg, fits, tiff):
        with pytest.raises(ImageError, match="not an image that can be read"):
            open_image(data)
    with pytest.raises(ImageError, match="bytes, at most 100"):
        open_image(bytes(101), ImageLimits(file_bytes=100))
    # More pixels in the data than the header says: they are never asked for.
    assert open_image(png(4, 4, pixels=bytes(16 << 20))).size == (4, 4)


def test_30_rotation_truncation_and_wrong_names(tmp_path):
    image = Image.new("RGB", (40, 20))
    image.paste((255, 0, 0), (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", exif=exif, quality=95)
    opened = open_image(data)
    assert opened.size == (20, 40) and opened.getpixel((10, 2))[0] > 200
    assert opened.getexif().get(0x0112) is None
    for cut in (len(data) - 40, len(data) // 2):
        with pytest.raises(ImageError, match="(?i)truncated"):
            open_image(data[:cut])
    (tmp_path / "really.png").write_bytes(data)
    assert open_image((tmp_path / "really.png").read_bytes()).size == (20, 40)
    broken = data.replace(b"Exif\0\0", b"Exif\0\0\xff\xff\xff", 1)
    with contextlib.suppress(ImageError):
        open_image(broken)


def test_own_a_jpeg_of_a_thousand_scans():
    data = encoded(Image.new("RGB", (4000, 4000)), "JPEG", progressive=True, quality=20)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(ImageError, match="scans of 4000x4000 pixels"):
        open_image(data[:-2] + scan * 300 + data[-2:])
    assert open_image(data).size == (4000, 4000)


def test_own_a_gif_frame_beyond_its_screen():
    data = bytearray(encoded(Image.new("P", (9, 9)), "GIF"))
    at = data.index(b"\x2c\0\0\0\0\x09\0\x09\0") + 5
    data[at : at + 4] = struct.pack("<HH", 65535, 65535)
    with pytest.raises(ImageError):
        open_image(bytes(data))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # refused by size
@given(st.binary(max_size=200), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_fuzz_any_bytes_are_an_image_or_an_image_error(noise, kind):
    image = Image.new("RGB", (16, 16), "red")
    whole = encoded(image, ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PNG")[kind])
    at = len(noise) * 7 % len(whole)
    for data in (noise, whole[:at] + noise, whole[:at] + noise + whole[at:]):
        with contextlib.suppress(ImageError):
            assert open_image(data).mode == "RGB"
