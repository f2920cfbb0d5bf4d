"""The pictures: a board of 4 x 4 squares with one digit each, or an emblem.

A picture has 128 x 128 pixels; the model sees it at 32 x 32 (one token a square). A digit is
drawn with a 5 x 7 font at scale 4 (large: clear at the model's resolution), 2 (medium and pale: at
the edge of it) or 1 (small: lost). Seen at full resolution, through a crop, all three are clear.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

GRID, SQUARE = 4, 32
SIDE = GRID * SQUARE
SCALES = {"large": 4, "medium": 2, "small": 1}
INK = {"large": 1.0, "medium": 0.55, "small": 1.0}
"""Medium digits are pale: what is left of them at the model's resolution makes for a guess. How
pale decides how often it is right: the base model 38 % at 0.5, 62 % at 0.55, 78 % at 0.6."""
NOISE = 28.0
"""Standard deviation of the sensor noise, in grey levels of 255, at full resolution."""

_BACKGROUND = np.array([22.0, 26.0, 44.0])
_INK = np.array([244.0, 236.0, 214.0])
_FONT = {
    0: "01110 10001 10011 10101 11001 10001 01110",
    1: "00100 01100 00100 00100 00100 00100 01110",
    2: "01110 10001 00001 00110 01000 10000 11111",
    3: "11110 00001 00001 01110 00001 00001 11110",
    4: "00010 00110 01010 10010 11111 00010 00010",
    5: "11111 10000 11110 00001 00001 10001 01110",
    6: "00110 01000 10000 11110 10001 10001 01110",
    7: "11111 00001 00010 00100 01000 01000 01000",
    8: "01110 10001 10001 01110 10001 10001 01110",
    9: "01110 10001 10001 01111 00001 00010 01100",
}
FONT = np.array([[list(map(int, row)) for row in _FONT[d].split()] for d in range(10)], float)


@dataclass(frozen=True)
class Board:
    """Which digit stands in which square, and how large.

    digit [GRID, GRID] 0..9, size [GRID, GRID] of "large", "medium", "small"; square "b3" is
    column b (second), row 3 (third): see `name` and `box`.
    """

    digit: np.ndarray
    size: np.ndarray
    image: Image.Image

    def squares(self, size: str) -> list[tuple[int, int]]:
        return [(int(r), int(c)) for r, c in np.argwhere(self.size == size)]


def name(row: int, column: int) -> str:
    return f"{'abcd'[column]}{row + 1}"


def box(row: int, column: int) -> tuple[int, int, int, int]:
    """Pixels of a square: left, upper, right, lower."""
    return (column * SQUARE, row * SQUARE, (column + 1) * SQUARE, (row + 1) * SQUARE)


def _picture(ink: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """ink [h, w] in 0..1 -> RGB with sensor noise."""
    pixels = _BACKGROUND + ink[..., None] * (_INK - _BACKGROUND)
    pixels = pixels + NOISE * rng.standard_normal(ink.shape)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGB")


def draw_board(
    rng: np.random.Generator, shares: dict[str, float], strength: dict[str, float] = INK
) -> Board:
    """A board whose squares are large, medium or small with these probabilities."""
    digit = rng.integers(0, 10, (GRID, GRID))
    size = rng.choice(list(shares), p=list(shares.values()), size=(GRID, GRID))
    ink = np.zeros((SIDE, SIDE))
    for row in range(GRID):
        for column in range(GRID):
            scale = SCALES[size[row, column]]
            dot = strength[size[row, column]] * np.ones((scale, scale))
            glyph = np.kron(FONT[digit[row, column]], dot)
            height, width = glyph.shape
            top, left = _place(size[row, column], rng)
            top, left = top + row * SQUARE, left + column * SQUARE
            ink[top : top + height, left : left + width] = glyph
    return Board(digit, size, _picture(ink, rng))


def _place(size: str, rng: np.random.Generator) -> tuple[int, int]:
    """Where in its square a digit's upper left corner is, in pixels.

    A large digit is on the raster of the shrunk picture, and stays crisp in it. A smaller one has,
    in the crop of its square, the same place within an 8 x 8 patch that a large one has in the
    overview: who can read the one can read the other.
    """
    down, right = int(rng.integers(0, 2)), int(rng.integers(0, 4))
    if size == "large":
        return 4 * down, 4 * right
    cells = {"medium": (2, 3), "small": (4, 4)}[size]
    return tuple(
        8 * int(rng.integers(0, count)) + offset
        for count, offset in zip(cells, (down, right), strict=True)
    )


def draw_emblem(pattern: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """An emblem [6, 6] bool, filling the picture but for a margin."""
    ink = np.zeros((SIDE, SIDE))
    ink[4:124, 4:124] = np.kron(pattern, np.ones((20, 20)))
    return _picture(ink, rng)
