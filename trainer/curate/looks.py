"""Whether two pictures look the same, whatever their encoding.

Two measures, which must both be small. The perceptual hash keeps the signs of low frequencies: it
survives scaling and compression, and takes pictures of little detail for one another. The grey
levels of a picture shrunk to 16 x 16 tell those apart, and are changed by another exposure of the
same thing.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import imagehash
import numpy as np
from PIL import Image

SIDE = 16


@dataclass(frozen=True)
class Look:
    size: tuple[int, int]
    """Pixels: width, height."""
    bits: int
    """The 64-bit perceptual hash."""
    grey: bytes
    """[SIDE * SIDE] grey levels, 0 to 255."""

    def to_json(self) -> list:
        return [*self.size, f"{self.bits:016x}", base64.b64encode(self.grey).decode("ascii")]

    @classmethod
    def from_json(cls, value: list) -> Look:
        width, height, bits, grey = value
        return cls((width, height), int(bits, 16), base64.b64decode(grey))


@dataclass(frozen=True)
class Distance:
    bits: int
    """Of 64; unrelated pictures differ in about 32."""
    grey: float
    """Root mean square of the differences of grey levels, of 255."""

    def within(self, bits: int, grey: float) -> bool:
        return self.bits <= bits and self.grey <= grey

    def __str__(self) -> str:
        return f"{self.bits} of 64 bits, {self.grey:.1f} grey levels"


def look(image: Image.Image) -> Look:
    """How a picture looks. Raises ValueError for one without pixels."""
    if 0 in image.size:
        raise ValueError(f"the image is empty: {image.width}x{image.height} pixels")
    grey = image.convert("L")
    small = grey.resize((SIDE, SIDE), Image.Resampling.BOX)
    bits = np.packbits(imagehash.phash(grey).hash.ravel()).tobytes()
    return Look(image.size, int.from_bytes(bits, "big"), small.tobytes())


def distance(a: Look, b: Look) -> Distance:
    left, right = (np.frombuffer(one.grey, np.uint8).astype(np.float32) for one in (a, b))
    return Distance((a.bits ^ b.bits).bit_count(), float(np.sqrt(np.mean((left - right) ** 2))))
