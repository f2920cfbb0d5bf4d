"""_bins.py: which rollouts go together. What comes of it in a batch is in test_packing.py."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from metis_kernels import _bins


def fewest(sizes: list[int], limit: int) -> int:
    """By trying every assignment."""
    best = len(sizes)

    def place(i: int, bins: list[int]) -> None:
        nonlocal best
        if len(bins) >= best:
            return
        if i == len(sizes):
            best = len(bins)
            return
        for b in range(len(bins)):
            if bins[b] + sizes[i] <= limit:
                place(i + 1, [*bins[:b], bins[b] + sizes[i], *bins[b + 1 :]])
        place(i + 1, [*bins, sizes[i]])

    place(0, [])
    return best


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=8), st.integers(20, 40), st.integers(1, 4))
def test_bins_hold_everything_once_within_the_limit(sizes, limit, multiple):
    works = [s + 0.01 * s * s for s in sizes]
    bins = _bins.spread(sizes, works, limit, multiple)
    assert sorted(i for b in bins for i in b) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in b) <= limit for b in bins)
    assert len(bins) % multiple == 0
    # First-fit decreasing takes at most 11/9 of the fewest and two thirds.
    assert len(bins) - multiple < 11 / 9 * fewest(sizes, limit) + 2 / 3
    if len(sizes) >= len(bins):
        assert all(bins)


def test_first_fit_takes_the_first_that_has_room():
    def slowly(sizes, limit):
        bins = []
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            fits = [b for b in bins if sum(sizes[j] for j in b) + sizes[i] <= limit]
            (fits[0] if fits else bins.append([]) or bins[-1]).append(i)
        return bins

    rng = random.Random(0)
    for _ in range(50):
        sizes = [rng.randint(1, 50) for _ in range(rng.randint(0, 60))]
        assert _bins.first_fit_decreasing(sizes, 60) == slowly(sizes, 60)


def test_a_smaller_item_makes_room():
    """4 | 3, then 4 | 3 2, then 4 3 | 3 2: the 5 has room only once the 2 has gone to the left."""
    sizes, works = [4, 3, 2, 3, 5], [10.0, 9.0, 1.0, 0.9, 0.5]
    assert _bins.balanced(sizes, works, 9, 2) == [[0, 3, 2], [1, 4]]
    assert _bins.balanced([*sizes, 2], [*works, 0.1], 9, 2) is None


def test_where_balancing_fails_the_packing_that_fits_stays():
    # Work says nothing of size here, so that the order in which they come leaves no room.
    sizes, works = [5, 3, 7, 5, 8], [5.0, 4.0, 3.0, 2.0, 1.0]
    feasible = _bins.first_fit_decreasing(sizes, 10)
    assert _bins.balanced(sizes, works, 10, len(feasible)) is None
    bins = _bins.spread(sizes, works, 10, 1)
    assert len(bins) == len(feasible) and all(sum(sizes[i] for i in b) <= 10 for b in bins)
    # With a bin to spare none stays empty.
    assert all(_bins.spread(sizes, works, 10, len(feasible) + 1))


def test_levelling_swaps_and_moves_within_the_limit():
    bins = [[0, 1], [2, 3]]
    assert _bins.level(bins, [4, 3, 2, 1], [4.0, 3.0, 2.0, 1.0], 10) == [[1, 2], [3, 0]]
    assert _bins.level(bins, [9, 3, 2, 8], [4.0, 3.0, 2.0, 1.0], 12) == [[1, 3], [2, 0]]
    assert _bins.level([[0, 1, 2], []], [1] * 3, [3.0, 2.0, 1.0], 9) == [[1, 2], [0]]
    assert _bins.level([[0, 1], [2]], [5, 5, 5], [3.0, 2.0, 1.0], 5) == [[0, 1], [2]]
    assert _bins.level([], [], [], 5) == [] and _bins.level([[]], [], [], 5) == [[]]
