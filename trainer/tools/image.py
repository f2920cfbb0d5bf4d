"""Pictures as tools: crop, zoom and rotate.

They act on the pixels that the session holds, which are those that the policy sees: whoever fills
a session opens its images by `trainer.images.open_image`, which applies EXIF orientation once.
"""

from __future__ import annotations

import asyncio
import math
from typing import Literal

from PIL import Image

from trainer.images import ImageLimits, to_rgb
from trainer.tools.protocol import ToolError, ToolInfraError
from trainer.types import Observation, Session

MIN_SIDE = 32
"""Pixels: the shorter side of what a tool shows. Qwen3-VL's unit is 32: less is hardly a token."""
MAX_FACTOR = 16.0

Unit = Literal["pixel", "relative", "per_mille"]
_UNIT_LENGTH = {"relative": 1.0, "per_mille": 1000.0}


class _ImageTool:
    """What the tools share: they take an image of the session and add one to it."""

    def __init__(self, *, min_side: int = MIN_SIDE, limits: ImageLimits | None = None):
        """min_side: pixels; a result whose shorter side has fewer is enlarged. limits: those of
        the toolbox, so that what is shown is the image that the text names."""
        if min_side < 1:
            raise ValueError(f"min_side must be at least 1, got {min_side}")
        self.min_side = min_side
        self.limits = limits or ImageLimits()

    def _take(self, session: Session, number: int) -> Image.Image:
        """image_<number>, loaded. Raises ToolError for a number that is none, ToolInfraError for
        an image that cannot be decoded: the policy did not make it."""
        if not session.images:
            raise ToolError("there is no image")
        if not 1 <= number <= len(session.images):
            raise ToolError(
                f"there is no image {number}; the images are 1 to {len(session.images)}"
            )
        image = session.images[number - 1]
        width, height = image.size
        if not 1 <= width * height <= self.limits.decoded:
            raise ToolInfraError(
                f"image_{number} has {width}x{height} pixels, not 1 to {self.limits.decoded:,}"
            )
        try:
            # Here and not in the thread: rollouts of one question share the object, and PIL's
            # lazy loading is not safe in two threads at once.
            image.load()
        except Exception as error:
            raise ToolInfraError(
                f"image_{number} cannot be decoded: {type(error).__name__}"
            ) from None
        return image

    def _show(
        self, session: Session, result: Image.Image, what: str, factor: float = 1.0
    ) -> Observation:
        """The result `factor` times as large, within the limits, as the session's next image."""
        width, height = result.size
        short, long = sorted(result.size)
        if long > self.limits.aspect * short:
            raise ToolError(
                f"{what} is a strip of {width}x{height} pixels: the longer side may be at most "
                f"{self.limits.aspect:g} times the shorter"
            )
        wanted = max(factor, self.min_side / short)
        scale = min(wanted, math.sqrt(self.limits.pixels / (width * height)))
        wide, high = (max(1, int(side * scale + 1e-6)) for side in (width, height))
        # Rounding down must not make a strip that the toolbox would leave out after all.
        size = (
            min(wide, int(high * self.limits.aspect)),
            min(high, int(wide * self.limits.aspect)),
        )
        result = to_rgb(result)
        text = f"image_{len(session.images) + 1}: {what}"
        if size != result.size:
            result = result.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
            change = "enlarged" if scale > 1 else "scaled down"
            text += f", {change} from {width}x{height} to {size[0]}x{size[1]} pixels"
        result.info = {}  # an orientation that still stood there would be applied to the part
        return Observation(text, (result,))


class Crop(_ImageTool):
    """Cuts a region out. A bad box is the policy's fault: the error says why, and the size."""

    name = "crop"

    async def call(self, session: Session, image: int, box: list[float], unit: Unit) -> Observation:
        """Cut a region out of an image. The region becomes a new image.

        Args:
            image: number of the image, from 1
            box: [left, top, right, bottom] of the region, measured from the image's top left
            unit: what the box is given in: "pixel", "relative" (0 to 1 of the width and of the
                height) or "per_mille" (0 to 1000 of them)
        """
        return await _cut(self, session, image, box, unit)


class Zoom(_ImageTool):
    """Cuts a region out and enlarges it, as far as the limit of pixels allows."""

    name = "zoom"

    async def call(
        self, session: Session, image: int, box: list[float], unit: Unit, factor: float = 2.0
    ) -> Observation:
        """Enlarge a region of an image. The enlarged region becomes a new image.

        Args:
            image: number of the image, from 1
            box: [left, top, right, bottom] of the region, measured from the image's top left
            unit: what the box is given in: "pixel", "relative" (0 to 1 of the width and of the
                height) or "per_mille" (0 to 1000 of them)
            factor: how many times as wide and high it shall be, 1 to 16; 2 if not given
        """
        if not 1 <= factor <= MAX_FACTOR:  # NaN is not
            raise ToolError(f"factor must be 1 to {MAX_FACTOR:g}, got {factor:g}")
        return await _cut(self, session, image, box, unit, factor)


class Rotate(_ImageTool):
    """Turns an image. Right angles keep every pixel; others fill the corners with black."""

    name = "rotate"

    async def call(self, session: Session, image: int, degrees: float) -> Observation:
        """Rotate an image clockwise. The rotated image becomes a new image.

        Args:
            image: number of the image, from 1
            degrees: the angle, -360 to 360; negative turns counter-clockwise
        """
        source = self._take(session, image)
        if not -360 <= degrees <= 360:
            raise ToolError(
                f"degrees must be -360 to 360, got {degrees:g}; "
                f"image_{image} has {source.width}x{source.height} pixels"
            )
        what = f"image_{image} rotated by {degrees:g} degrees"
        observation = await asyncio.to_thread(self._rotate, session, source, degrees, what)
        session.images.extend(observation.images)
        return observation

    def _rotate(
        self, session: Session, source: Image.Image, degrees: float, what: str
    ) -> Observation:
        turns, rest = divmod(degrees % 360, 90)
        if rest:
            # Before it is turned, or the corners alone may take it past what memory allows.
            source = to_rgb(source)
            scale = math.sqrt(self.limits.pixels / (source.width * source.height))
            if scale < 1:
                source = source.resize([max(1, int(side * scale)) for side in source.size])
            turned = source.rotate(-degrees, Image.Resampling.BICUBIC, expand=True)
        elif turns:
            turned = source.transpose(_RIGHT_ANGLES[int(turns)])
        else:
            turned = source.copy()
        return self._show(session, turned, what)


_RIGHT_ANGLES = {  # PIL counts counter-clockwise
    1: Image.Transpose.ROTATE_270,
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_90,
}


async def _cut(
    tool: _ImageTool,
    session: Session,
    number: int,
    box: list[float],
    unit: str,
    factor: float = 1.0,
) -> Observation:
    source = tool._take(session, number)
    try:
        region = to_pixels(box, unit, source.size)
    except ValueError as error:
        raise ToolError(
            f"{error}; image_{number} has {source.width}x{source.height} pixels"
        ) from None
    what = f"pixels {list(region)} of image_{number}"

    def work() -> Observation:
        # Deep modes are scaled by the whole image's brightest pixel, not by the region's.
        pixels = to_rgb(source) if source.mode.startswith(("I", "F")) else source
        return tool._show(session, pixels.crop(region), what, factor)

    observation = await asyncio.to_thread(work)
    session.images.extend(observation.images)
    return observation


def to_pixels(box: list[float], unit: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The whole pixels that a box touches: left, top, right, bottom; right and bottom exclusive.

    The unit is stated, never guessed: [0, 0, 1, 1] is a pixel or everything. Raises ValueError,
    whose message is for the policy, for a box that is not four finite numbers, has left >= right
    or top >= bottom, or reaches out of the image.
    """
    if len(box) != 4:
        raise ValueError(f"box must be 4 numbers [left, top, right, bottom], got {len(box)}")
    if not all(math.isfinite(value) for value in box):
        raise ValueError("box must be finite numbers")
    shown = "[" + ", ".join(f"{value:g}" for value in box) + "]"
    left, top, right, bottom = box
    if left >= right or top >= bottom:
        raise ValueError(f"box {shown} is empty: left must be below right, and top below bottom")
    width, height = size
    if unit == "pixel":
        ends = (float(width), float(height))
    elif unit in _UNIT_LENGTH:
        ends = (_UNIT_LENGTH[unit], _UNIT_LENGTH[unit])
    else:
        raise ValueError(f"unit must be pixel, relative or per_mille, got {unit!r}")
    if left < 0 or top < 0 or right > ends[0] or bottom > ends[1]:
        raise ValueError(
            f"box {shown} reaches out of the image: with unit {unit}, left and right lie in "
            f"0 to {ends[0]:g}, top and bottom in 0 to {ends[1]:g}"
        )
    across, down = width / ends[0], height / ends[1]
    # The nudge: 0.1 * 30 is a hair above 3, and must not take a fourth pixel in.
    first = (math.floor(left * across + 1e-6), math.floor(top * down + 1e-6))
    last = (math.ceil(right * across - 1e-6), math.ceil(bottom * down - 1e-6))
    # A box thinner than the nudge still touches the pixel it starts in.
    x, y = min(first[0], width - 1), min(first[1], height - 1)
    return x, y, min(width, max(last[0], x + 1)), min(height, max(last[1], y + 1))
