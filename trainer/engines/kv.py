"""The KV cache of trajectories of different lengths: every row has its own next slot.

transformers' DynamicCache and StaticCache write the tokens of a forward behind the longest row, so
that rows of different lengths get gaps that have to be masked, stored and one day removed. Here a
token of row b at its place t lies in slot t of row b, always. There are no gaps, a forward's tokens
are written in place, and the tensors stay where they are until rows are regrouped.

Legend: R rows, H key-value heads, C slots of a row (the capacity), D head dimension; a forward has
n rows of q tokens. A slot that no token has been written to yet may hold anything finite: whoever
reads must mask it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True)
class Place:
    """Where the tokens of a forward go and what they see."""

    rows: Tensor
    """[m] int64: the rows of the cache that are written."""
    slots: Tensor
    """[m, q] int64: the slot of every token."""
    view: int
    """Slots of these rows that attention is given, new tokens included; 0 where the rows were
    empty: attention is then given the forward's own keys and values, and the cache is not read."""
    source: Tensor | None = None
    """[m] int64 where several rows are filled from one row of the forward (only with view = 0):
    which one; else n = m."""
    every: bool = False
    """The rows are all rows of the cache in their order, so they are read without a copy."""


@dataclass
class _Shared:
    """What the layers of a cache have in common. Not the cache itself: a cycle would keep its
    memory until the garbage collector came by."""

    rows: int
    capacity: int
    place: Place | None = None


class _Layer(CacheLayerMixin):
    """keys and values [R, H, C, D] of one layer."""

    def __init__(self, shared: _Shared):
        super().__init__()
        self.shared = shared

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked slot has weight 0, and 0 * NaN is NaN.
        self.keys, self.values = (
            new.new_zeros(self.shared.rows, new.shape[1], self.shared.capacity, new.shape[3])
            for new in (key_states, value_states)
        )
        self.device = key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        place = self.shared.place
        given = []
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            filled = new if place.source is None else new.index_select(0, place.source)
            stored[place.rows[:, None], :, place.slots] = filled.transpose(1, 2)
            if place.view:
                seen = stored[:, :, : place.view]
                given.append(seen if place.every else seen.index_select(0, place.rows))
            else:
                given.append(new)
        return given[0], given[1]

    # Asked only where a forward comes without a mask: over rows that were empty.
    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.shared.capacity


class RowCache(Cache):
    """KV of `rows` trajectories with room for `capacity` tokens each."""

    def __init__(self, layers: int, rows: int, capacity: int):
        self.shared = _Shared(rows, capacity)
        super().__init__(layers=[_Layer(self.shared) for _ in range(layers)])

    @property
    def rows(self) -> int:
        return self.shared.rows

    @property
    def capacity(self) -> int:
        return self.shared.capacity

    def put(self, place: Place) -> RowCache:
        """Itself, ready for a forward whose tokens go to `place`."""
        self.shared.place = place
        return self

    @property
    def nbytes(self) -> int:
        filled = [layer for layer in self.layers if layer.is_initialized]
        return sum(tensor.nbytes for layer in filled for tensor in (layer.keys, layer.values))


def regroup(
    wanted: Sequence[tuple[Sequence[tuple[RowCache, int] | None], int]], layers: int
) -> list[RowCache]:
    """New caches made of rows of old ones; the old ones are emptied.

    wanted: of each new cache, where each of its rows comes from (None: an empty row) and its
    capacity; of a longer row as many slots as there is room for are kept. It goes layer by layer
    and frees as it goes, so the old and the new are never both in memory but for one layer.
    """
    caches = [RowCache(layers, len(rows), capacity) for rows, capacity in wanted]
    moves = []
    for rows, _ in wanted:
        by_source: dict[int, tuple[RowCache, list[int], list[int]]] = {}
        for target, origin in enumerate(rows):
            if origin is not None:
                entry = by_source.setdefault(id(origin[0]), (origin[0], [], []))
                entry[1].append(origin[1])
                entry[2].append(target)
        moves.append(list(by_source.values()))
    sources = {id(source): source for some in moves for source, _, _ in some}.values()
    for index in range(layers):
        for cache, some in zip(caches, moves, strict=True):
            for source, origins, targets in some:
                _copy(source.layers[index], origins, cache.layers[index], targets)
        for source in sources:
            source.layers[index] = _Layer(source.shared)
    return caches


def _copy(source: _Layer, origins: list[int], target: _Layer, targets: list[int]) -> None:
    if not target.is_initialized:
        target.lazy_initialization(source.keys, source.values)
    width = min(source.keys.shape[2], target.keys.shape[2])
    origin = torch.tensor(origins, device=source.device)
    index = torch.tensor(targets, device=source.device)
    for new, old in ((target.keys, source.keys), (target.values, source.values)):
        new[index, :, :width] = old[:, :, :width].index_select(0, origin)
