"""Images from outside, opened in one place and within limits; any image as plain RGB, and as text.

A leaf: of the trainer it imports nothing.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""What is opened: formats of one compressed plane whose size is in the header. Not among them:
FITS (gzip inside), TIFF (a container), EPS and SVG (programs), archives."""
MAX_SCAN_PASSES = 16
"""Passes over the pixels of the largest image that decoding a progressive JPEG may take: a file of
a few kB may ask for thousands."""


@dataclass(frozen=True)
class ImageLimits:
    """What one observation may show, and what is decoded at all."""

    count: int = 8
    """Images; those past it are not shown."""
    pixels: int = 5120 * 32 * 32
    """Pixels of one image; a larger one is scaled down."""
    aspect: float = 200.0
    """Longer side / shorter side; a longer strip is not shown: image processors refuse it."""
    decoded: int = 1 << 26
    """Pixels that are decoded; an image with more is refused by its header."""
    file_bytes: int = 64 << 20
    """Bytes of a file; a longer one is not opened."""


class ImageError(ValueError):
    """The image cannot be had. The message is fit for the policy: no path, no library's innards."""


def open_image(data: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """The picture in a file of untrusted bytes: RGB, upright, loaded, without metadata.

    The header is read first and everything that the limits forbid is refused before a pixel is
    decoded. Of an animation the first frame counts. What is transparent lies on white; 16 bits
    become 8; the orientation of EXIF is applied. The name of the file is of no interest: its first
    bytes say what it is. Pillow's own bounds on text chunks and colour profiles hold besides.

    Raises ImageError for what is no image, too large, too long a strip, truncated or broken.
    """
    limits = limits or ImageLimits()
    if len(data) > limits.file_bytes:
        raise ImageError(
            f"the image file has {len(data):,} bytes, at most {limits.file_bytes:,} are read"
        )
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise ImageError(
            f"the image has too many pixels, at most {limits.decoded:,} are decoded"
        ) from None
    except Exception as error:  # Pillow's parsers raise whatever they stumble on
        raise ImageError(f"the image's header is broken ({_reason(error)})") from None
    with image:
        _check_size(image.size, limits)
        _check_scans(image, data, limits)
        try:
            image.load()
        except Exception as error:
            kind = image.format or "image"
            raise ImageError(f"the {kind} file is truncated or broken ({_reason(error)})") from None
        return to_rgb(_upright(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """A loaded RGB image of the same pixels: the image itself where it is one already.

    What is transparent lies on white; 16-bit grey is scaled to 8 bits. Raises what Pillow does
    where the image was opened and not yet decoded, and its file is broken.
    """
    image.load()
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        # Pillow's own conversion cuts at 255, so that nearly everything would be white.
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, "white")
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def png_base64(image: Image.Image) -> str:
    """A PNG file of the image, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def png_uri(image: Image.Image) -> str:
    return f"data:image/png;base64,{png_base64(image)}"


def _eight_bits(image: Image.Image) -> Image.Image:
    """Integers past 255 are 16-bit, floats up to 1 are shares of white; the rest is 0 to 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    peak = values.max(initial=0.0)
    if image.mode.startswith("I;16") or (image.mode == "I" and peak > 255):
        values = values / 257
    elif image.mode == "F" and peak <= 1:
        values = values * 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF turns nothing: the picture itself is whole
        image = image.copy()
    # The one entry that means something for the pixels stays; 64 MB of comments do not.
    image.info = {k: v for k, v in image.info.items() if k == "transparency"}
    return image


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if min(size) < 1:
        raise ImageError(f"the image is empty: {width}x{height} pixels")
    if width * height > limits.decoded:
        raise ImageError(
            f"the image has {width}x{height} pixels, at most {limits.decoded:,} are decoded"
        )
    if max(size) > limits.aspect * min(size):
        raise ImageError(
            f"the image has {width}x{height} pixels; one side may be at most {limits.aspect:g} "
            "times the other"
        )


def _check_scans(image: Image.Image, data: bytes, limits: ImageLimits) -> None:
    """Every scan of a progressive JPEG passes over the whole picture."""
    if image.format not in ("JPEG", "MPO"):
        return
    scans = data.count(b"\xff\xda")  # compressed data has no such pair: 0xff is stuffed there
    if scans * image.width * image.height > MAX_SCAN_PASSES * limits.decoded or scans > 1_000:
        raise ImageError(
            f"the JPEG has {scans:,} scans of {image.width}x{image.height} pixels, which would "
            "take too long to decode"
        )


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return ascii(text[:100]).strip("'\"") or type(error).__name__
