"""Which rollouts go together into one batch: bin packing, and the order of the batches.

Sizes are rows, of which a batch holds `limit`; works are what the batches should be alike in. All
of it is a function of its arguments: ties go to the lower number. A leaf: it imports _layout.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain, product
from typing import NamedTuple

from metis_kernels._layout import PrefixLayout


class Piece(NamedTuple):
    """Rollouts that are packed together, behind one copy of their prefix."""

    group: int
    prefix: int
    members: tuple[int, ...]
    """Numbers of rollouts, ascending."""


def work_of(layout: PrefixLayout, attention_cost: float) -> float:
    return layout.tokens + attention_cost * layout.pairs


def first_fit_decreasing(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Items by bin, each bin's sizes at most limit in sum; no size is larger than limit."""
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [limit] * (2 * leaves)  # a tree: the most room in any bin below a node
    bins: list[list[int]] = []
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        node = 1
        while node < leaves:
            node = 2 * node + (room[2 * node] < sizes[item])
        if node - leaves == len(bins):
            bins.append([])
        bins[node - leaves].append(item)
        room[node] -= sizes[item]
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


def balanced(
    sizes: Sequence[int], works: Sequence[float], limit: int, count: int
) -> list[list[int]] | None:
    """Items in `count` bins of at most limit: in order of work, each to the bin with least work
    that has room for it. Where none has, one smaller item makes room; None where that fails too."""
    bins: list[list[int]] = [[] for _ in range(count)]
    work, room = [0.0] * count, [limit] * count
    ready = [(0.0, 0, b) for b in range(count)]  # a heap; entries out of date are passed over
    shut: list[tuple[int, int]] = []  # a heap of (-room, bin): too full for the item of the time

    def move(item: int, to: int, sign: int = 1) -> None:
        bins[to].append(item) if sign > 0 else bins[to].remove(item)
        work[to] += sign * works[item]
        room[to] -= sign * sizes[item]
        heapq.heappush(ready, (work[to], len(bins[to]), to))

    def make_room(size: int) -> int | None:
        by_room = sorted(range(count), key=lambda b: (-room[b], b))[:2]
        for b in sorted(range(count), key=lambda b: (work[b], b)):
            other = next((c for c in by_room if c != b), None)
            for item in sorted(bins[b], key=lambda i: (sizes[i], i)) if other is not None else ():
                if size - room[b] <= sizes[item] <= room[other]:
                    move(item, b, -1)
                    move(item, other)
                    return b
        return None

    for item in sorted(range(len(sizes)), key=lambda i: (-works[i], i)):
        while shut and -shut[0][0] >= sizes[item]:
            b = heapq.heappop(shut)[1]
            heapq.heappush(ready, (work[b], len(bins[b]), b))
        target = None
        while ready and target is None:
            w, held, b = heapq.heappop(ready)
            if (w, held) != (work[b], len(bins[b])):
                continue
            if room[b] >= sizes[item]:
                target = b
            else:
                heapq.heappush(shut, (-room[b], b))
        target = make_room(sizes[item]) if target is None else target
        if target is None:
            return None
        move(item, target)
    return bins


def level(
    bins: list[list[int]], sizes: Sequence[int], works: Sequence[float], limit: int
) -> list[list[int]]:
    """The bins with their works nearer to one another: the one with most work hands an item to the
    one with least, for another or for none, as long as that helps and they are 1 % apart."""
    bins = [list(b) for b in bins]
    work = [sum(works[i] for i in b) for b in bins]
    room = [limit - sum(sizes[i] for i in b) for b in bins]
    for _ in range(4 * len(bins)):
        high, low = (f(range(len(bins)), key=work.__getitem__) for f in (max, min))
        gap = work[high] - work[low]
        if gap <= 0.01 * work[high]:
            break
        best, chosen = 0.0, None
        for i, j in product(bins[high], (None, *bins[low])):
            size = sizes[i] - (0 if j is None else sizes[j])
            moved = works[i] - (0.0 if j is None else works[j])
            if min(moved, gap - moved) > best and -room[high] <= size <= room[low]:
                best, chosen = min(moved, gap - moved), (i, j, size, moved)
        if chosen is None:
            break
        i, j, size, moved = chosen
        for b, out, into, sign in ((high, i, j, -1), (low, j, i, 1)):
            bins[b] = [x for x in bins[b] if x != out] + ([] if into is None else [into])
            room[b] -= sign * size
            work[b] += sign * moved
    return bins


def spread(
    sizes: Sequence[int], works: Sequence[float], limit: int, multiple: int = 1
) -> list[list[int]]:
    """Items in the fewest bins of at most limit that first-fit decreasing finds, rounded up to a
    multiple; the work of the bins is balanced. Bins are empty only if items are too few."""
    bins = first_fit_decreasing(sizes, limit)
    count = -(-len(bins) // multiple) * multiple
    even = balanced(sizes, works, limit, count)
    while even is None and len(bins) < count:
        heaviest = max(
            (b for b in bins if len(b) > 1), key=lambda b: sum(works[i] for i in b), default=[]
        )
        bins.append([heaviest.pop()] if heaviest else [])
    return level(bins if even is None else even, sizes, works, limit)


def pieces_of(
    group: int, prefix: int, members: list[int], kept: list[int], limit: int, cost: float
) -> list[Piece]:
    """One group in the fewest pieces that fit; without a prefix every rollout is its own."""
    if prefix == 0:
        return [Piece(group, 0, (m,)) for m in members]
    if prefix + sum(kept[m] - prefix for m in members) <= limit:
        return [Piece(group, prefix, tuple(members))]
    sizes = [kept[m] - prefix for m in members]
    bins = spread(sizes, _response_works(prefix, sizes, cost), limit - prefix)
    return _parts(Piece(group, prefix, tuple(members)), bins)


def _parts(piece: Piece, bins: list[list[int]]) -> list[Piece]:
    return [piece._replace(members=tuple(sorted(piece.members[i] for i in b))) for b in bins]


def _response_works(prefix: int, sizes: list[int], cost: float) -> list[float]:
    return [r + cost * (r * prefix + r * (r + 1) / 2) for r in sizes]


def _split_for(pieces: list[Piece], count: int, kept: list[int], cost: float) -> list[Piece]:
    """Pieces split by responses, those with most work in each part first, until there are count
    or nothing can be split."""
    prefix_works = [p.prefix + cost * p.prefix * (p.prefix + 1) / 2 for p in pieces]
    sizes = [[kept[m] - p.prefix for m in p.members] for p in pieces]
    works = [_response_works(p.prefix, s, cost) for p, s in zip(pieces, sizes, strict=True)]
    parts = [1] * len(pieces)
    heap = [(-prefix_works[i] - sum(works[i]), i) for i, p in enumerate(pieces)]
    heapq.heapify(heap)
    missing = count - len(pieces)
    while heap and missing > 0:
        i = heapq.heappop(heap)[1]
        if parts[i] < len(pieces[i].members):
            parts[i] += 1
            missing -= 1
            heapq.heappush(heap, (-prefix_works[i] - sum(works[i]) / parts[i], i))
    split = []
    for piece, size, work, n in zip(pieces, sizes, works, parts, strict=True):
        # All of them fit one bin, so this cannot fail; and no part stays empty.
        split += _parts(piece, balanced(size, work, sum(size), n)) if n > 1 else [piece]
    return split


class Plan(NamedTuple):
    """One batch before its tensors are made."""

    layout: PrefixLayout
    members: tuple[int, ...]
    """Numbers of rollouts, in the layout's order."""


def planned(bins: list[list[Piece]], kept: list[int], cost: float, ranks: int) -> list[Plan]:
    """One batch a bin; from the most work to the least, every other round of ranks backwards, so
    that no rank has the most work in all of them."""
    plans = []
    for pieces in bins:
        together: dict[tuple[int, int], list[int]] = {}
        for p in pieces:
            together.setdefault((p.group, p.prefix), []).extend(p.members)
        groups = [(prefix, sorted(m)) for (_, prefix), m in sorted(together.items())]
        layout = PrefixLayout(
            tuple(prefix for prefix, _ in groups),
            tuple(tuple(kept[m] - prefix for m in members) for prefix, members in groups),
        )
        plans.append(Plan(layout, tuple(chain.from_iterable(m for _, m in groups))))
    plans.sort(key=lambda plan: (-work_of(plan.layout, cost), plan.members))
    for start in range(ranks, len(plans), 2 * ranks):
        plans[start : start + ranks] = plans[start : start + ranks][::-1]
    return plans


def binned(
    pieces: list[Piece], kept: list[int], max_tokens: int, ranks: int, cost: float
) -> list[list[Piece]]:
    def layout(p: Piece) -> PrefixLayout:
        return PrefixLayout((p.prefix,), (tuple(kept[m] - p.prefix for m in p.members),))

    layouts = [layout(p) for p in pieces]
    sizes, works = [x.tokens for x in layouts], [work_of(x, cost) for x in layouts]
    bins = spread(sizes, works, max_tokens, ranks)
    count = max(len(bins), 0 if ranks == 1 else ranks)
    if len(pieces) >= count:
        return [[pieces[i] for i in b] for b in bins]
    split = [[p] for p in _split_for(pieces, count, kept, cost)]
    return split + [[] for _ in range(count - len(split))]
