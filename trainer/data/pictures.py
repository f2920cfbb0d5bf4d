"""Pictures of data files: bytes are kept, pixels come on access, and limits hold before either."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from trainer.images import FORMATS, ImageError, ImageLimits, open_image

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")

Reason = Literal[
    "not_json",
    "wrong_type",
    "not_a_number",
    "empty_prompt",
    "missing_answer",
    "missing_image",
    "bad_image",
    "image_too_large",
    "image_count",
    "bad_text",
    "unsupported",
    "no_policy_turn",
    "duplicate_id",
    "in_heldout",
]
"""Why a row is not used:

not_json         a line that is no JSON object, or a JSON column that is none; cut short, or nested
                 too deeply
wrong_type       a value of another type than its layout has
not_a_number     NaN or infinity
empty_prompt     no text in the question
missing_answer   null or blank
missing_image    a path without a file, an address (nothing is fetched), or null
bad_image        no picture of a known format, damaged, or longer than image processors accept
image_too_large  past the limit of bytes or pixels
image_count      as many placeholders as images are needed, or none where all stand before the text
bad_text         cannot be encoded, has a chat template's control tokens in it, or is too long
unsupported      video, audio, prompts of several turns, several answers
no_policy_turn   a conversation in which the policy says nothing
duplicate_id     an earlier row has the id
in_heldout       the held-out questions have the id
"""


class BadRow(ValueError):
    """A row that is skipped, and why. Never raised for a file that cannot be read."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Picture:
    """A picture that has not been decoded: its bytes as they lie in the data, or its file."""

    source: bytes | Path
    limits: ImageLimits = ImageLimits()
    """Of these, `decoded`, `file_bytes` and `aspect`."""

    def read(self) -> bytes:
        """The encoded bytes. Raises BadRow for a file that is missing, no regular file or too
        large."""
        if isinstance(self.source, Path):
            try:
                if not self.source.is_file():  # a device or a pipe would never end
                    raise BadRow("missing_image", f"there is no file {str(self.source)!r}")
                _check_bytes(self.source.stat().st_size, self.limits)
                return self.source.read_bytes()
            except (OSError, ValueError) as error:
                if isinstance(error, BadRow):
                    raise
                raise BadRow("missing_image", f"{str(self.source)[:200]!r}: {error}") from None
        return self.source

    def check(self, *, pixels: bool = False) -> None:
        """Reads the header (and a PNG's checksums): format, size, limits. pixels: decodes it too.
        Raises BadRow."""
        if pixels:
            self.open()
        else:
            _check_header(self.read(), self.limits)

    def open(self) -> Image.Image:
        """The picture, decoded: RGB and upright, as open_image has it. Raises BadRow."""
        data = self.read()
        _check_header(data, self.limits)  # which tells what is too large from what is broken
        try:
            return open_image(data, self.limits)
        except ImageError as error:
            raise BadRow("bad_image", str(error)) from None


def _check_bytes(count: int, limits: ImageLimits) -> None:
    if count > limits.file_bytes:
        raise BadRow("image_too_large", f"{count:,} bytes, at most {limits.file_bytes:,} are read")


def _check_header(data: bytes, limits: ImageLimits) -> None:
    """Format, size and, of a PNG, checksums; no pixel is decoded. Raises BadRow."""
    _check_bytes(len(data), limits)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if width * height > limits.decoded:
                raise BadRow(
                    "image_too_large",
                    f"{width} x {height} pixels, at most {limits.decoded:,} are decoded",
                )
            if max(width, height) > limits.aspect * min(width, height):
                raise BadRow(
                    "bad_image",
                    f"{width} x {height} pixels: one side is more than {limits.aspect:g} times "
                    "the other",
                )
            if image.format == "PNG":
                image.verify()
    except BadRow:
        raise
    except Image.DecompressionBombError as error:
        raise BadRow("image_too_large", str(error)) from None
    except Exception as error:  # decoders raise all kinds on damaged data
        said = " ".join(str(error).split())[:120]
        raise BadRow("bad_image", f"{len(data):,} bytes: {type(error).__name__}: {said}") from None


def picture(value: Any, folder: Path, limits: ImageLimits) -> Picture:
    """What a data file calls an image -> Picture: bytes; {"bytes", "path"}; base64, with or
    without "data:image/...;base64,"; a path, relative to `folder`. Raises BadRow."""
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return picture(value["bytes"], folder, limits)
        value = value.get("path") or value.get("url")
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
    elif isinstance(value, str):
        found = _path_or_bytes(value.strip(), folder, limits)
        if isinstance(found, Path):
            return Picture(found, limits)
        data = found
    elif value is None:
        raise BadRow("missing_image", "an image is null")
    else:
        raise BadRow("wrong_type", f"an image is {type(value).__name__}, not bytes or a string")
    if not data:
        raise BadRow("missing_image", "an image has no bytes")
    _check_bytes(len(data), limits)
    return Picture(data, limits)


def _path_or_bytes(text: str, folder: Path, limits: ImageLimits) -> Path | bytes:
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise BadRow("unsupported", f"{head[:40]!r} is not base64")
    elif text.lower().endswith(_SUFFIXES) or text.startswith("file://"):
        return folder / text.removeprefix("file://")
    if "://" in text[:16]:
        raise BadRow("missing_image", f"{text[:80]!r} is an address; nothing is fetched")
    _check_bytes(len(text) * 3 // 4, limits)
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        pass
    try:  # line breaks, as `base64` prints them
        packed = "".join(text.split())
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise BadRow(
            "bad_image", f"{text[:40]!r} is neither base64 nor a path to a picture"
        ) from None
