"""What the tool server and its client say to one another: images as bytes, both ways.

    POST   /sessions                    {"id"?, "seed"?}        -> {"id", "idle_seconds", ...}
    PUT    /sessions/{id}/images/{n}    raw pixels or a file    -> {"number", "width", "height"}
    GET    /sessions/{id}/images/{n}    -> raw RGB pixels, or ?format=png
    POST   /sessions/{id}/calls         {"text"} or {"name", "arguments"}, and "calls"?, "images"?
                                        -> {"call", "observation": {"text", "status", "images"},
                                            "calls", "ms"}
    DELETE /sessions/{id}
    GET    /tools, /health, /metrics

Images are numbered as the policy numbers them, from 1. An image crosses the wire once each way:
as raw pixels (`?mode=RGB&width=W&height=H`), for nothing is faster within a cluster, or as a file
(what trainer/images.py opens). An error is {"error": what is wrong} with a status of 4xx or 5xx.
"""

from __future__ import annotations

import io
import re

from PIL import Image

from trainer.images import ImageError, to_rgb

TOKEN_VARIABLE = "METIS_TOOLS_TOKEN"
"""The environment variable that the server and its clients read their shared secret from."""

KEY_HEADER = "Idempotency-Key"
"""A call that is sent again with the key of an earlier one is answered from memory."""

RAW = "application/octet-stream"
RAW_MODES = {"L": 1, "RGB": 3, "RGBA": 4}
"""Modes that are sent as raw pixels -> bytes a pixel."""
SHARED_LIMITS = ("max_text", "max_call", "max_calls_per_turn")
"""Of the server's toolbox, which its clients keep as well."""

IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")


def encode_image(image: Image.Image) -> tuple[bytes, dict[str, str | int]]:
    """Raw pixels and query of an upload. Other modes than RAW_MODES become RGB."""
    image = image if image.mode in RAW_MODES else to_rgb(image)
    query = {"mode": image.mode, "width": image.width, "height": image.height}
    return image.tobytes(), query


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def raw_image(data: bytes, mode: str, width: int, height: int, max_pixels: int) -> Image.Image:
    """The image that raw pixels are. Raises ImageError where mode, size and length do not agree."""
    if mode not in RAW_MODES:
        raise ImageError(f"mode {mode!r} is not sent raw; the modes are: {', '.join(RAW_MODES)}")
    check_size(width, height, max_pixels)
    size = width * height * RAW_MODES[mode]
    if len(data) != size:
        raise ImageError(f"{width}x{height} {mode} pixels are {size:,} bytes, got {len(data):,}")
    return Image.frombytes(mode, (width, height), data)


def check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"an image of {width}x{height} pixels has none")
    if width * height > max_pixels:
        raise ImageError(
            f"an image of {width}x{height} pixels; at most {max_pixels:,} pixels are taken"
        )
