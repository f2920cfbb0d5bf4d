"""The questions: eight kinds, each with its share of the mix and its known need of a tool."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from trainer.tasks.glyphs import scene
from trainer.tasks.glyphs.world import BEACONS, EMBLEMS, OLD_BEACONS, split_of, world
from trainer.types import Question

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Kind:
    share: float
    """Of the mix."""
    needs_tool: bool
    why: str


KINDS = {
    "glyph_large": Kind(0.14, False, "clear at the model's resolution"),
    "glyph_medium": Kind(0.24, True, "a guess is right about 60 % of the time, a crop 99 %"),
    "glyph_small": Kind(0.12, True, "lost at the model's resolution; a crop shows it"),
    "sum_easy": Kind(0.11, False, "two one-digit numbers, known by heart"),
    "product_hard": Kind(0.12, True, "two two-digit numbers"),
    "fact_known": Kind(0.11, False, "one of 16 old beacons that the base model knows by heart"),
    "fact_search": Kind(0.08, True, "a beacon that only the search corpus tells of"),
    "emblem": Kind(0.08, True, "an owner that only the image index tells of"),
}

BOARD_SHARES = {"large": 0.5, "medium": 0.25, "small": 0.25}


@dataclass(frozen=True)
class Draft:
    """A question and what a demonstration of it has to know."""

    question: Question
    fact: Any = None
    """(row, column) of the square, the two numbers, or the beacon's number."""


def draft(split: Split, index: int, kind: str | None = None) -> Draft:
    """Question number `index` of a split: a pure function of its arguments, infinite in `index`.

    Held-out questions never meet training ones: their pictures come from other seeds, and
    products, unknown beacons and emblems are split (world.split_of). `kind=None` takes the kind
    from the mix.
    """
    seed = zlib.crc32(f"glyphs/{split}/{kind or 'mix'}".encode())
    rng = np.random.default_rng([seed, index])
    if kind is None:
        kind = _kind_of(index)
    elif kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    image, text, answer, fact = _MAKERS[kind](kind, split, rng)
    identity = f"glyphs/{split}/{kind}/{index}"
    question = Question(identity, kind, text, (image,), answer, KINDS[kind].needs_tool)
    return Draft(question, fact)


_GOLDEN = (5**0.5 - 1) / 2


def _kind_of(index: int) -> str:
    """The kind of question number `index`: multiples of the golden ratio fill [0, 1) evenly, so the
    mix holds among any few questions in a row. (Drawn by chance, a kind is missing from every third
    step of 8 questions, and what the others teach meanwhile goes unopposed.)"""
    place = index * _GOLDEN % 1
    for name, kind in KINDS.items():
        place -= kind.share
        if place < 0:
            return name
    return name


def _board(rng: np.random.Generator) -> scene.Board:
    return scene.draw_board(rng, BOARD_SHARES)


def _glyph(kind: str, split: Split, rng: np.random.Generator):
    size = kind.removeprefix("glyph_")
    board = _board(rng)
    while not board.squares(size):
        board = _board(rng)
    row, column = board.squares(size)[rng.integers(len(board.squares(size)))]
    text = f"Which digit is in square {scene.name(row, column)}?"
    return board.image, text, str(board.digit[row, column]), (row, column)


def _sum(kind: str, split: Split, rng: np.random.Generator):
    a, b = (int(n) for n in rng.integers(0, 10, 2))
    return _board(rng).image, f"What is {a} + {b}?", str(a + b), (a, b)


def _product(kind: str, split: Split, rng: np.random.Generator):
    while True:
        a, b = (int(n) for n in rng.integers(11, 100, 2))
        if split_of(100 * a + b) == split:
            return _board(rng).image, f"What is {a} * {b}?", str(a * b), (a, b)


def _fact(kind: str, split: Split, rng: np.random.Generator):
    number = int(rng.choice(OLD_BEACONS)) if kind == "fact_known" else _new_beacon(split, rng)
    text = f"Which colour has beacon {number}?"
    return _board(rng).image, text, world().colour[number], number


def _new_beacon(split: Split, rng: np.random.Generator) -> int:
    while True:
        number = int(rng.choice(BEACONS))
        if split_of(number) == split:
            return number


def _emblem(kind: str, split: Split, rng: np.random.Generator):
    while True:
        index = int(rng.integers(EMBLEMS))
        if split_of(index) == split:
            image = scene.draw_emblem(world().emblem[index], rng)
            return image, "Who owns this emblem?", world().owner[index], index


_MAKERS = {
    "glyph_large": _glyph,
    "glyph_medium": _glyph,
    "glyph_small": _glyph,
    "sum_easy": _sum,
    "product_hard": _product,
    "fact_known": _fact,
    "fact_search": _fact,
    "emblem": _emblem,
}
