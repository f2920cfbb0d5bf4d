"""Pictures: what opens and what is refused, and crop, zoom and rotate on real ones."""

import asyncio
import gzip
import io
import json
import math
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from trainer.images import ImageLimits, open_image, to_rgb
from trainer.tools.image import Crop, Rotate, Zoom, to_pixels
from trainer.tools.protocol import ToolError, ToolInfraError
from trainer.tools.toolbox import Toolbox
from trainer.types import Session


def call(tool, session, **arguments):
    return asyncio.run(tool.call(session, **arguments))


def gradient(width, height):
    """Every pixel tells where it is."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x % 256, y % 256, (x // 256) * 16 + y // 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(width, height, *chunks):
    """A PNG of which the header says what it likes."""
    body = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    for name, data in ((b"IHDR", header), *chunks):
        checksum = struct.pack(">I", zlib.crc32(name + data))
        body += struct.pack(">I", len(data)) + name + data + checksum
    return body


# --- Opening --------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_opens_what_the_content_says(format):
    image = open_image(encoded(gradient(40, 20), format))
    assert image.size == (40, 20) and image.mode == "RGB" and not image.info


BOMB = zlib.compress(b"\0" * (200 << 20), 9)


REFUSED = {
    "header of 65,535^2": (png(65_535, 65_535, (b"IDAT", b"")), "too many pixels"),
    "header of 10,000^2": (png(10_000, 10_000, (b"IDAT", BOMB)), "10000x10000 pixels, at most"),
    "one pixel high": (encoded(Image.new("L", (60_000, 1)), "PNG"), "200 times"),
    "0 wide": (png(0, 10), "header is broken|not an image"),
    "0 high": (png(10, 0, (b"IDAT", b"")), "empty|not an image"),
    "text chunk bomb": (png(8, 8, (b"zTXt", b"a\0\0" + BOMB)), "broken|not an image"),
    "no pixels": (png(8, 8, (b"IEND", b"")), "broken|not an image"),
    "truncated JPEG": (encoded(gradient(200, 200), "JPEG")[:2000], "truncated"),
    "truncated PNG": (encoded(gradient(200, 200), "PNG")[:500], "truncated"),
    "truncated WebP": (encoded(gradient(200, 200), "WEBP")[:300], "truncated|broken|not an image"),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="/etc/passwd"/></svg>', "not an"),
    "FITS, zipped": (gzip.compress(b"SIMPLE  =                    T" + b" " * 5000), "not an"),
    "zip": (b"PK\x03\x04" + b"\0" * 100, "not an image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    "text": (b"hello", "not an image"),
    "nothing": (b"", "not an image"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_bombs_and_damaged_files_are_refused_quickly(name):
    content, message = REFUSED[name]
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message):
        open_image(content)
    assert time.perf_counter() - start < 2  # decoding 10,000^2 pixels would take longer


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(orientation):
    image = gradient(48, 16)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB")
    opened = open_image(content)
    assert opened.tobytes() == expected.tobytes()
    assert opened.size == ((48, 16) if orientation <= 4 else (16, 48))
    observation = call(Crop(min_side=1), Session([opened]), image=1, box=[2, 3, 9, 8], unit="pixel")
    assert observation.images[0].tobytes() == expected.crop((2, 3, 9, 8)).tobytes()
    assert not observation.images[0].getexif()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_matter():
    image = gradient(20, 10)
    content = encoded(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + b"\x12" * 50)
    assert open_image(content).size == (20, 10)


def test_deep_images_are_scaled_and_not_clipped():
    values = np.linspace(0, 65_535, 64, dtype=np.uint16).reshape(8, 8)
    for image in (
        Image.fromarray(values),
        Image.fromarray(values.astype(np.int32)),
        Image.fromarray((values / 65_535).astype(np.float32)),
    ):
        expected = (values.astype(float) / 257).round()
        assert np.abs(np.asarray(to_rgb(image))[..., 0] - expected).max() <= 1, image.mode
        if image.mode.startswith("I;16"):
            opened = open_image(encoded(image, "PNG"))
            assert np.abs(np.asarray(opened)[..., 1] - expected).max() <= 1, image.mode
    small = Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8))
    assert np.asarray(to_rgb(small))[..., 2].max() == 63
    strange = np.array([[math.nan, math.inf], [-5.0, 0.5]], dtype=np.float32)
    assert to_rgb(Image.fromarray(strange)).mode == "RGB"


def test_other_modes():
    image = gradient(20, 10)
    cmyk = open_image(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(cmyk, int) - np.asarray(image)).mean() < 6
    palette = image.quantize(16)
    assert to_rgb(palette).tobytes() == palette.convert("RGB").tobytes()
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert to_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)
    for mode in ("1", "L", "LA", "PA", "YCbCr", "HSV", "LAB", "RGBX", "RGBa"):
        made = Image.new(mode, (5, 5))
        assert to_rgb(made).mode == "RGB", mode


def test_an_animation_is_its_first_frame():
    frames = [Image.new("L", (8, 8), n % 256) for n in range(10_000)]
    content = encoded(frames[77], "GIF", save_all=True, append_images=frames)
    start = time.perf_counter()
    opened = open_image(content)
    assert time.perf_counter() - start < 2
    assert opened.getpixel((0, 0)) == (77, 77, 77)


# --- Boxes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("box", "unit", "pixels"),
    [
        ([10, 20, 30, 40], "pixel", (10, 20, 30, 40)),
        ([0, 0, 300, 100], "pixel", (0, 0, 300, 100)),
        ([0.4, 0.4, 0.6, 0.6], "pixel", (0, 0, 1, 1)),
        ([9.5, 1, 10.5, 2], "pixel", (9, 1, 11, 2)),
        ([299.5, 99.5, 300, 100], "pixel", (299, 99, 300, 100)),
        ([0, 0, 1, 1], "pixel", (0, 0, 1, 1)),
        ([0, 0, 1, 1], "relative", (0, 0, 300, 100)),
        ([0, 0, 1, 1], "per_mille", (0, 0, 1, 1)),
        ([0.1, 0.1, 0.2, 0.3], "relative", (30, 10, 60, 30)),
        ([0, 0, 1000, 1000], "per_mille", (0, 0, 300, 100)),
        ([100, 100, 200, 300], "per_mille", (30, 10, 60, 30)),
        ([1e-9, 1e-9, 2e-9, 2e-9], "relative", (0, 0, 1, 1)),
        ([1 - 1e-9, 0, 1, 1], "relative", (299, 0, 300, 100)),
    ],
)
def test_boxes_in_three_units(box, unit, pixels):
    assert to_pixels(box, unit, (300, 100)) == pixels


def test_boxes_tile_the_image():
    """Neighbouring boxes on whole pixels share none, in whatever unit they are written."""
    for width in (7, 30, 100, 333):
        for unit, whole in (("relative", 1), ("per_mille", 1000)):
            for n in range(width):
                left, right = n / width * whole, (n + 1) / width * whole
                assert to_pixels([left, 0, right, whole], unit, (width, 5)) == (n, 0, n + 1, 5)


@pytest.mark.parametrize(
    ("box", "unit", "message"),
    [
        ([-1, 0, 10, 10], "pixel", "out of the image.*0 to 300"),
        ([0, 0, 301, 10], "pixel", "out of the image"),
        ([0, 0, 10, 100.5], "pixel", "out of the image"),
        ([400, 400, 500, 500], "pixel", "out of the image"),
        ([0, 0, 1.1, 1], "relative", "out of the image.*0 to 1,"),
        ([0, 0, 30, 30], "relative", "out of the image"),
        ([0, 0, 1001, 30], "per_mille", "out of the image.*0 to 1000"),
        ([30, 0, 10, 10], "pixel", "left must be below right"),
        ([0, 30, 10, 10], "pixel", "top below bottom"),
        ([10, 10, 10, 20], "pixel", "is empty"),
        ([0, 0, 0, 0], "relative", "is empty"),
        ([math.nan, 0, 1, 1], "relative", "finite"),
        ([0, 0, math.inf, 1], "pixel", "finite"),
        ([1e308, 0, 1.7e308, 1], "pixel", "out of the image"),
        ([], "pixel", "4 numbers.*got 0"),
        ([1, 2, 3], "pixel", "got 3"),
        ([1] * 10_000, "pixel", "got 10000"),
        ([0, 0, 1, 1], "inch", "unit must be"),
    ],
)
@pytest.mark.parametrize("tool", [Crop(), Zoom()], ids=["crop", "zoom"])
def test_bad_boxes_say_what_is_wrong_and_how_large_the_image_is(tool, box, unit, message):
    session = Session([gradient(300, 100)])
    with pytest.raises(ToolError, match=message) as caught:
        call(tool, session, image=1, box=box, unit=unit)
    assert "image_1 has 300x100 pixels" in str(caught.value)
    assert len(str(caught.value)) < 300 and len(session.images) == 1


# --- The tools ------------------------------------------------------------------------------------


def test_crop_is_exact_and_numbered():
    image = gradient(300, 100)
    session = Session([image, gradient(40, 40)])
    observation = call(Crop(), session, image=1, box=[10, 20, 110, 70], unit="pixel")
    assert observation.text == "image_3: pixels [10, 20, 110, 70] of image_1"
    assert observation.images[0].tobytes() == image.crop((10, 20, 110, 70)).tobytes()
    assert session.images[2] is observation.images[0] and len(session.images) == 3
    again = call(Crop(), session, image=3, box=[0, 0, 50, 50], unit="pixel")
    assert again.images[0].tobytes() == image.crop((10, 20, 60, 70)).tobytes()


def test_small_crops_are_enlarged_and_it_is_said():
    observation = call(Crop(), Session([gradient(99, 99)]), image=1, box=[5, 5, 9, 7], unit="pixel")
    assert observation.images[0].size == (64, 32)
    assert observation.text.endswith("enlarged from 4x2 to 64x32 pixels")
    one = call(Crop(), Session([gradient(1, 1)]), image=1, box=[0, 0, 1, 1], unit="relative")
    assert one.images[0].size == (32, 32)


def test_zoom_enlarges_up_to_the_limit():
    session = Session([gradient(400, 300)])
    box = {"image": 1, "box": [0, 0, 500, 500], "unit": "per_mille"}
    assert call(Zoom(), session, **box).images[0].size == (400, 300)
    observation = call(Zoom(), session, **box, factor=3.5)
    assert observation.images[0].size == (700, 525)
    assert observation.text.endswith("enlarged from 200x150 to 700x525 pixels")
    tight = Zoom(limits=ImageLimits(pixels=100_000))
    width, height = call(tight, session, **box, factor=16.0).images[0].size
    assert 95_000 < width * height <= 100_000 and abs(width / height - 4 / 3) < 0.01
    for factor in (0.5, 0, -1, 17, math.nan, math.inf):
        with pytest.raises(ToolError, match="factor must be 1 to 16"):
            call(Zoom(), session, **box, factor=factor)


def test_large_results_fit_the_limits():
    session = Session([gradient(3000, 2200)])
    whole = call(Crop(), session, image=1, box=[0, 0, 1, 1], unit="relative")
    assert whole.images[0].width * whole.images[0].height <= ImageLimits().pixels
    assert "scaled down from 3000x2200" in whole.text
    with pytest.raises(ToolError, match="strip of 3000x1 pixels"):
        call(Crop(), session, image=1, box=[0, 5, 3000, 6], unit="pixel")


def test_every_result_passes_a_toolbox_unchanged():
    """The text names the image's number: one that the toolbox left out would shift them all."""
    limits = ImageLimits(pixels=50_000, aspect=7)
    box = Toolbox([Crop(limits=limits), Zoom(limits=limits)], images=limits)
    rng = np.random.default_rng(0)
    shown = 0
    for _ in range(150):
        width, height = (int(2 ** rng.uniform(0, 9)) for _ in range(2))
        session = Session([gradient(width, height)])
        left, top = (float(rng.uniform(0, 0.9)) for _ in range(2))
        arguments = {"image": 1, "box": [left, top, 1, float(rng.uniform(top + 0.05, 1))]}
        arguments["unit"] = "relative"
        name = "crop" if rng.random() < 0.5 else "zoom"
        text = json.dumps({"name": name, "arguments": arguments})
        _, observation = asyncio.run(box.execute(text, session))
        if observation.status == "ok":
            shown += 1
            assert "image_2:" in observation.text and "not shown" not in observation.text
            assert "[image scaled" not in observation.text
            assert session.images[1:] == list(observation.images) and len(session.images) == 2
        else:
            assert "strip" in observation.text and observation.status == "tool_error"
    assert shown > 75


@pytest.mark.parametrize(
    ("degrees", "transpose"),
    [
        (90, Image.Transpose.ROTATE_270),
        (-90, Image.Transpose.ROTATE_90),
        (180, Image.Transpose.ROTATE_180),
        (270, Image.Transpose.ROTATE_90),
        (-270.0, Image.Transpose.ROTATE_270),
        (0, None),
        (360, None),
        (-360, None),
    ],
)
def test_right_angles_keep_every_pixel(degrees, transpose):
    image = gradient(300, 100)
    session = Session([image])
    observation = call(Rotate(), session, image=1, degrees=degrees)
    expected = image if transpose is None else image.transpose(transpose)
    assert observation.images[0].tobytes() == expected.tobytes()
    assert observation.text == f"image_2: image_1 rotated by {degrees:g} degrees"
    assert len(session.images) == 2 and observation.images[0] is not image


def test_rotation_is_clockwise_and_loses_no_corner():
    image = Image.new("RGB", (100, 100), "white")
    image.paste("red", (0, 0, 50, 50))  # top left: at the top after 45 degrees
    observation = call(Rotate(), Session([image]), image=1, degrees=45)
    turned = observation.images[0]
    assert turned.size == (142, 142)
    assert turned.getpixel((71, 30)) == (255, 0, 0) and turned.getpixel((110, 71)) != (255, 0, 0)
    assert turned.getpixel((2, 2)) == (0, 0, 0)
    large = call(Rotate(), Session([gradient(3000, 2200)]), image=1, degrees=30)
    assert large.images[0].width * large.images[0].height <= ImageLimits().pixels
    for degrees in (361, -1e9, math.nan, math.inf):
        with pytest.raises(ToolError, match="degrees.*300x100 pixels"):
            call(Rotate(), Session([gradient(300, 100)]), image=1, degrees=degrees)


def test_images_that_are_not_there():
    tool = Crop()
    box = {"box": [0, 0, 1, 1], "unit": "relative"}
    with pytest.raises(ToolError, match="there is no image$"):
        call(tool, Session([]), image=1, **box)
    for number in (0, -1, 2, 10**17):
        with pytest.raises(ToolError, match="the images are 1 to 1"):
            call(tool, Session([gradient(9, 9)]), image=number, **box)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_image_that_cannot_be_decoded_is_nobodys_fault():
    content = encoded(gradient(200, 200), "JPEG")[:2000]
    for tool, arguments in (
        (Crop(), {"box": [0, 0, 1, 1], "unit": "relative"}),
        (Rotate(), {"degrees": 90}),
    ):
        with pytest.raises(ToolInfraError, match="image_1 cannot be decoded"):
            call(tool, Session([Image.open(io.BytesIO(content))]), image=1, **arguments)
    huge = Image.open(io.BytesIO(png(12_000, 12_000, (b"IDAT", BOMB))))
    with pytest.raises(ToolInfraError, match="12000x12000"):
        call(Crop(), Session([huge]), image=1, box=[0, 0, 1, 1], unit="relative")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image": 1, "box": [0, 0, 9, 9]}, "missing argument 'unit'"),
        ({"image": 1.5, "box": [0, 0, 9, 9], "unit": "pixel"}, "'image'"),
        ({"image": "1", "box": [0, 0, 9, 9], "unit": "pixel"}, "'image'"),
        ({"image": True, "box": [0, 0, 9, 9], "unit": "pixel"}, "'image'"),
        ({"image": 1, "box": "0, 0, 9, 9", "unit": "pixel"}, "'box'"),
        ({"image": 1, "box": [0, 0, "9", 9], "unit": "pixel"}, "'box.2'"),
        ({"image": 1, "box": [0, 0, 9, 9], "unit": "px"}, "'unit'"),
        ({"image": 1, "box": [[0, 0, 9, 9]], "unit": "pixel"}, "'box.0'"),
        ({"image": 1, "box": [0, 0, 9, None], "unit": "pixel"}, "'box.3'"),
        ({"image": 1, "box": [0, 0, 90, 9], "unit": "pixel"}, "out of the image"),
    ],
)
def test_what_a_policy_may_write_is_an_observation(arguments, message):
    box = Toolbox([Crop(), Zoom(), Rotate()])
    session = Session([gradient(50, 50)])
    text = json.dumps({"name": "crop", "arguments": arguments})
    _, observation = asyncio.run(box.execute(text, session))
    assert observation.status == "tool_error" and message in observation.text
    assert len(session.images) == 1 and session.calls == 1


def test_the_schema_tells_the_units_and_integers_are_numbers():
    box = Toolbox([Crop(), Zoom(), Rotate()])
    crop, zoom, rotate = (schema["function"]["parameters"] for schema in box.schemas())
    assert crop["required"] == ["image", "box", "unit"]
    assert crop["properties"]["unit"]["enum"] == ["pixel", "relative", "per_mille"]
    assert crop["properties"]["box"]["items"] == {"type": "number"}
    assert zoom["required"] == ["image", "box", "unit"] and "factor" in zoom["properties"]
    assert rotate["required"] == ["image", "degrees"]
    call_text = '{"name": "rotate", "arguments": {"image": 1, "degrees": 90}}'
    _, observation = asyncio.run(box.execute(call_text, Session([gradient(50, 20)])))
    assert observation.status == "ok" and observation.images[0].size == (32, 80)


def test_bad_settings():
    with pytest.raises(ValueError, match="min_side"):
        Crop(min_side=0)
