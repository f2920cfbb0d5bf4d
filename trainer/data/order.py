"""The order of training: a pure function of (seed, epoch, index), with no list of indices.

A Feistel network permutes [0, 4^k), the smallest such range that holds n; indices that land past n
are sent through again until they do not, which leaves a permutation of [0, n) (cycle walking: Black
and Rogaway, "Ciphers with arbitrary finite domains", 2002). An index costs tens of microseconds,
and training resumes at any index without playing what came before.
"""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

_ROUNDS = 8
_BLOCK = 512
"""Rows whose members are counted together, in RowSet."""


def permute(index: int, n: int, seed: int, epoch: int = 0, attempt: int = 0) -> int:
    """The place in [0, n) of training index `index`: for fixed (seed, epoch, attempt) each place
    comes once. attempt: another order, for where the first one's row turns out to be unusable.

    Raises ValueError for an index outside [0, n).
    """
    if not 0 <= index < n:
        raise ValueError(f"index must be in [0, {n}), got {index}")
    key = blake2b(f"{seed}/{epoch}/{attempt}".encode(), digest_size=32).digest()
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    place = index
    while True:
        place = _feistel(place, half, key)
        if place < n:
            return place


def _feistel(value: int, half: int, key: bytes) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for number in range(_ROUNDS):
        data = bytes([number]) + right.to_bytes(8, "little")
        digest = blake2b(data, key=key, digest_size=8).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half | right


class RowSet:
    """A set of row numbers, one bit each; `rows[k]` is the k-th of them in ascending order."""

    def __init__(self, member: np.ndarray):
        """member [N] bool."""
        self._bits = np.packbits(member, bitorder="little")
        padded = np.pad(member, (0, -len(member) % _BLOCK)).reshape(-1, _BLOCK)
        counts = padded.sum(axis=1, dtype=np.int64)
        self._before = np.concatenate([[0], np.cumsum(counts)])
        self._range = len(member)

    def __len__(self) -> int:
        return int(self._before[-1])

    def __contains__(self, row: int) -> bool:
        return 0 <= row < self._range and bool(self._bits[row >> 3] >> (row & 7) & 1)

    def __getitem__(self, k: int) -> int:
        if not 0 <= k < len(self):
            raise IndexError(f"number {k} of a set of {len(self)} rows")
        block = int(np.searchsorted(self._before, k, "right")) - 1
        part = self._bits[block * _BLOCK // 8 : (block + 1) * _BLOCK // 8]
        rows = np.flatnonzero(np.unpackbits(part, bitorder="little"))
        return block * _BLOCK + int(rows[k - int(self._before[block])])

    def members(self) -> np.ndarray:
        """[N] bool."""
        return np.unpackbits(self._bits, count=self._range, bitorder="little").astype(bool)
