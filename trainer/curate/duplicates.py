"""Which rows ask nearly the same as an earlier one: nearly its words of nearly its pictures.

Words are compared by the Jaccard index of their shingles of five characters, and every number must
be the same: "12 + 34" is not "12 + 35". Candidates come from the perceptual hashes of the first
pictures, one xor and a count of bits for every row kept so far; of rows without pictures from
MinHash (datasketch).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.curate.looks import Distance, Look, distance
from trainer.verify import normalise

SHINGLE = 5
_PERMUTATIONS = 64


@dataclass(frozen=True)
class Asked:
    """What a row asks."""

    number: int
    text: str
    looks: tuple[Look, ...]


@dataclass(frozen=True)
class Match:
    of: int
    """Number of the earlier row."""
    jaccard: float
    apart: tuple[Distance, ...]
    """Of every picture."""

    def __str__(self) -> str:
        pictures = f"; pictures {', '.join(map(str, self.apart))}" if self.apart else ""
        return f"of row {self.of}: text {self.jaccard:.2f}{pictures}"


class Kept:
    """The rows kept so far. `match` finds the one that another nearly is."""

    def __init__(self, *, jaccard: float, bits: int, grey: float):
        """jaccard: from which on texts are near. bits, grey: up to which pictures are."""
        self.jaccard, self.bits, self.grey = jaccard, bits, grey
        self._rows: list[Asked] = []
        self._words: list[tuple[frozenset[str], tuple[str, ...]]] = []
        self._hashes = np.zeros(1024, np.uint64)
        """[>= rows] of first pictures; only of rows in `_pictured`."""
        self._pictured: list[int] = []
        self._minhash: _Words | None = None

    def match(self, row: Asked) -> Match | None:
        """The earliest row that this one nearly is."""
        words = _words(row.text)
        for index in self._candidates(row, words[0]):
            other, (shingles, numbers) = self._rows[index], self._words[index]
            if len(other.looks) != len(row.looks) or numbers != words[1]:
                continue
            near = _jaccard(shingles, words[0])
            if near < self.jaccard:
                continue
            apart = tuple(map(distance, other.looks, row.looks))
            if all(one.within(self.bits, self.grey) for one in apart):
                return Match(other.number, near, apart)
        return None

    def add(self, row: Asked) -> None:
        index = len(self._rows)
        self._rows.append(row)
        self._words.append(_words(row.text))
        if not row.looks:
            if self._minhash is None:
                self._minhash = _Words(self.jaccard)
            self._minhash.add(index, self._words[index][0])
            return
        if len(self._pictured) == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
        self._hashes[len(self._pictured)] = row.looks[0].bits
        self._pictured.append(index)

    def _candidates(self, row: Asked, shingles: frozenset[str]) -> Iterable[int]:
        if not row.looks:
            return [] if self._minhash is None else self._minhash.near(shingles)
        hashes = self._hashes[: len(self._pictured)]
        far = np.bitwise_count(hashes ^ np.uint64(row.looks[0].bits))
        return [self._pictured[i] for i in np.flatnonzero(far <= self.bits).tolist()]


class _Words:
    """Sets of shingles that have others near them, by MinHash."""

    def __init__(self, threshold: float):
        from datasketch import MinHashLSH  # loads scipy: a second that pictures do not need

        # A little lower: the sketch only proposes, the sets themselves decide.
        self._index = MinHashLSH(threshold=max(0.1, threshold - 0.1), num_perm=_PERMUTATIONS)

    def add(self, index: int, shingles: frozenset[str]) -> None:
        self._index.insert(index, _sketch(shingles))

    def near(self, shingles: frozenset[str]) -> list[int]:
        return sorted(self._index.query(_sketch(shingles)))


def _sketch(shingles: frozenset[str]):
    from datasketch import MinHash

    sketch = MinHash(num_perm=_PERMUTATIONS, seed=1)
    sketch.update_batch([shingle.encode("utf-8", "replace") for shingle in sorted(shingles)])
    return sketch


def _words(text: str) -> tuple[frozenset[str], tuple[str, ...]]:
    """(shingles, numbers in their order) of a question."""
    key = normalise(text)
    count = max(1, len(key) - SHINGLE + 1)
    shingles = frozenset(key[start : start + SHINGLE] for start in range(count))
    return shingles, tuple(re.findall(r"\d+(?:[.,]\d+)*", key))


def _jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def find_duplicates(rows: Sequence[Asked], kept: Kept) -> dict[int, Match]:
    """Of rows in their order, each that nearly is an earlier one which is none itself."""
    found: dict[int, Match] = {}
    for row in rows:
        match = kept.match(row)
        if match is None:
            kept.add(row)
        else:
            found[row.number] = match
    return found
