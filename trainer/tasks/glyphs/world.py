"""The world behind the questions: what can be known, what can only be looked up.

Everything is drawn once from a fixed seed, so that train and held-out questions are about the
same world and a base model can know part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

COLOURS = ("Red", "Green", "Blue", "White", "Amber", "Violet", "Pink", "Grey")
OWNERS = (
    "Arden", "Boro", "Cassel", "Dray", "Elwin", "Falk", "Garrow", "Hale",
    "Ister", "Joss", "Kell", "Lorne", "Marek", "Nils", "Orrin", "Pell",
)  # fmt: skip
OLD_BEACONS = range(10, 26)
"""Those that the base model is taught by heart."""
BEACONS = range(100, 1000)
"""Those that only the corpus tells of."""
EMBLEMS = 400


@dataclass(frozen=True)
class World:
    colour: dict[int, str]
    """Beacon number -> colour of its light. Every beacon, old and new, has a passage."""
    emblem: np.ndarray
    """[EMBLEMS, 6, 6] bool. Without symmetry: a perceptual hash keeps signs of frequencies, and of
    those that a symmetry cancels only the noise would remain."""
    owner: tuple[str, ...]
    """[EMBLEMS] who owns which emblem; told by the image index alone."""

    @property
    def corpus(self) -> list[str]:
        return [passage(number, colour) for number, colour in self.colour.items()]


def passage(number: int, colour: str) -> str:
    return f"Beacon {number} shines {colour}."


def emblem_note(owner: str) -> str:
    return f"Emblem of {owner}."


def split_of(key: int) -> str:
    """Splits products, beacons of the corpus and emblems into halves that never meet: a held-out
    question is never about a thing that training asked about."""
    return "train" if (key * 2654435761 >> 7) % 2 else "heldout"


@cache
def world() -> World:
    rng = np.random.default_rng(2604_08545)
    colour = {number: str(rng.choice(COLOURS)) for number in (*OLD_BEACONS, *BEACONS)}
    emblem = rng.random((EMBLEMS, 6, 6)) < 0.5
    owner = tuple(str(name) for name in rng.choice(OWNERS, EMBLEMS))
    return World(colour, emblem, owner)
