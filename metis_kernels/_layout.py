"""How groups of rollouts lie in one row of tokens: the noun that packing makes and attention reads.

    | prefix g0 | r00 | r01 | r02 || prefix g1 | r10 | r11 ...

A token of a response sees the prefix of its group and its own response up to itself, never a
sibling and never another group. A rollout without a group to share with is a response behind a
prefix of length 0. A leaf: it imports torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class PrefixLayout:
    """Lengths, group by group; T is their sum.

    Raises ValueError where a length is negative, a group has no response, or both tuples differ in
    length.
    """

    prefixes: tuple[int, ...]
    """Tokens of each group's shared prefix; 0 where nothing is shared."""
    responses: tuple[tuple[int, ...], ...]
    """Tokens of each group's responses, in the order in which they lie behind the prefix."""

    def __post_init__(self):
        if len(self.prefixes) != len(self.responses):
            raise ValueError(
                f"the layout has {len(self.prefixes)} prefixes but {len(self.responses)} groups of "
                "responses; expected one of each a group"
            )
        for number, (prefix, lengths) in enumerate(zip(self.prefixes, self.responses, strict=True)):
            if prefix < 0 or not lengths or min(lengths) < 0:
                raise ValueError(
                    f"group {number} has a prefix of {prefix} and responses of {lengths} tokens; "
                    "expected at least one response and no negative length"
                )

    @cached_property
    def tokens(self) -> int:
        """T: rows of the packed batch."""
        return sum(self.prefixes) + sum(map(sum, self.responses))

    @cached_property
    def rollout_tokens(self) -> int:
        """Rows that the same rollouts take without sharing."""
        return sum(
            prefix * len(lengths) + sum(lengths)
            for prefix, lengths in zip(self.prefixes, self.responses, strict=True)
        )

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs that attention computes: the measure of its work."""
        total = 0
        for prefix, lengths in zip(self.prefixes, self.responses, strict=True):
            total += prefix * (prefix + 1) // 2
            total += sum(r * prefix + r * (r + 1) // 2 for r in lengths)
        return total

    def on(self, device: torch.device | str) -> DeviceLayout:
        """The same as index tensors on a device; made once."""
        return _on(self, torch.device(device))


@dataclass(frozen=True)
class DeviceLayout:
    """A layout as variable-length attention kernels take it. Segments are the prefixes and
    responses in the order in which they lie, empty ones left out; crossing are the groups that have
    both."""

    cu_segments: Tensor
    """[M + 1] int32: where each segment starts, and T."""
    max_segment: int
    response_rows: Tensor
    """[R] int64: rows of the responses of the crossing groups, ascending."""
    cu_response: Tensor
    """[C + 1] int32: where each crossing group's responses start among the R."""
    max_response: int
    prefix_rows: Tensor
    """[P] int64: rows of the prefixes of the crossing groups, ascending."""
    cu_prefix: Tensor
    """[C + 1] int32: where each crossing group's prefix starts among the P."""
    max_prefix: int


@lru_cache(maxsize=64)
def _on(layout: PrefixLayout, device: torch.device) -> DeviceLayout:
    segments: list[int] = []
    response: list[int] = []
    prefix: list[int] = []
    response_rows: list[Tensor] = []
    prefix_rows: list[Tensor] = []
    start = 0
    for p, lengths in zip(layout.prefixes, layout.responses, strict=True):
        r = sum(lengths)
        segments += [n for n in (p, *lengths) if n]
        if p and r:
            prefix.append(p)
            response.append(r)
            prefix_rows.append(torch.arange(start, start + p))
            response_rows.append(torch.arange(start + p, start + p + r))
        start += p + r
    return DeviceLayout(
        _offsets(segments).to(device),
        max(segments, default=0),
        _joined(response_rows).to(device),
        _offsets(response).to(device),
        max(response, default=0),
        _joined(prefix_rows).to(device),
        _offsets(prefix).to(device),
        max(prefix, default=0),
    )


def _offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _joined(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
