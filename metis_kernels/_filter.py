"""Columns of d(logits) that cannot matter, left out of the two backward products.

A trained policy is sure of itself: in most columns of a chunk no row of d(logits) holds anything
that bf16 would keep. A column is live where some row has |d logit| > eps (|g| + |h|) / temperature,
that is where the token is a label, or not negligible to some row; the row pass marks them. The
products run over the live columns alone. What a row has in the others is known, for a row of
d(logits) sums to zero, and is given back to d_hidden along their mean row of weight: a correction
of rank 1. d_weight of a dropped column gets nothing, d_bias is exact.

Legend: n rows of a chunk, V vocabulary (of this rank), L live columns, H hidden. A leaf: it imports
torch alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

AUTO_EPS = 2.4e-4
"""A sixteenth of bf16's spacing at 1 (2^-8)."""
LIVE_SHARE = 0.5
"""Share of live columns above which gathering them costs more than it saves."""
LOST = 2**-9
"""Relative error (2-norm) of a gradient whose d(logits) are rounded to bf16, as measured on samples
of a language model: a guarded filter loses no more."""
SAMPLED = 16
"""Rows of a chunk on which a guarded filter measures that: their product with the head is one
reading of it, and no more work than a hundredth of a chunk's."""


@dataclass(frozen=True)
class Filter:
    """What a caller asks for."""

    eps: float
    guarded: bool = False
    """Whether a chunk takes all columns where too many are live, or too much would be lost."""

    @classmethod
    def of(cls, grad_filter: float | str | None) -> Filter | None:
        """Of None, "auto" or a number. Raises ValueError for anything else."""
        if grad_filter is None:
            return None
        if grad_filter == "auto":
            return cls(AUTO_EPS, guarded=True)
        if isinstance(grad_filter, str) or not 0 <= grad_filter < 1:
            raise ValueError(
                'grad_filter must be None (exact), "auto" or a number in [0, 1), '
                f"got {grad_filter!r}"
            )
        return cls(float(grad_filter))


def live_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    """Of the marks of a chunk of logits: as wide as they are, so that a kernel that has loaded a
    block of logits can store marks from the same lanes."""
    return {2: torch.int16, 4: torch.int32, 8: torch.int64}[logits_dtype.itemsize]


@dataclass(frozen=True)
class Columns:
    """The L columns of a chunk that are kept."""

    index: Tensor
    """[L]"""
    head: Tensor
    """[L, H] their rows of weight."""
    mean: Tensor
    """[H] the mean row of weight of the others, in work dtype."""
    sums_to_zero: bool
    """Whether a row of d(logits) does."""

    def d_hidden(self, d_logits: Tensor, kept: Tensor) -> Tensor:
        """[n, H] of d_logits [n, V] and their live columns kept [n, L]."""
        mass = -kept.sum(1, dtype=self.mean.dtype)
        if not self.sums_to_zero:
            mass += d_logits.sum(1, dtype=self.mean.dtype)
        return torch.mm(kept, self.head).to(self.mean.dtype).addr_(mass, self.mean)


class Verdict:
    """Which columns of a chunk are kept: found out by the device, asked for later by the host.

    Between the two the caller launches the next chunk's product, behind which the one number that
    the host needs (how many columns are live) has time to arrive.
    """

    def __init__(
        self,
        chosen: Filter,
        d_logits: Tensor,
        live: Tensor,
        weight: Tensor,
        work: torch.dtype,
        sums_to_zero: bool,
    ):
        """d_logits [n, V] in weight's dtype, live [V] the row pass's marks, weight [V, H]; work:
        the dtype of sums."""
        self.weight, self.sums_to_zero, live = weight, sums_to_zero, live > 0
        dropped = (~live).to(weight.dtype).unsqueeze(0)
        count = live.sum()
        share = (len(weight) - count).clamp_min(1)
        if chosen.guarded:
            few = d_logits[:: -(-len(d_logits) // SAMPLED)]
            lost = few * dropped
            products = _product(torch.cat((dropped, lost, few)), weight, work)
            self.mean = products[0] / share
            mass = lost.sum(1, dtype=work)
            if sums_to_zero:
                mass = -(few - lost).sum(1, dtype=work)
            gap, exact = products[1:].chunk(2)
            gap = torch.addr(gap, mass, self.mean, alpha=-1)
            fits = (count <= LIVE_SHARE * len(weight)) & _within(lost, few) & _within(gap, exact)
            count = torch.where(fits, count, -1)
        else:
            self.mean = _product(dropped, weight, work)[0] / share
        self.live, self.arrived = live, None
        self.count = count
        if count.is_cuda:
            self.count = torch.empty((), dtype=count.dtype, pin_memory=True)
            self.count.copy_(count, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def columns(self) -> Columns | None:
        """The columns, or None where all are to be used. Waits for the device to have decided."""
        if self.arrived is not None:
            self.arrived.synchronize()
        count = int(self.count)
        if count < 0:
            return None
        index = torch.nonzero_static(self.live, size=count).flatten()
        return Columns(index, self.weight.index_select(0, index), self.mean, self.sums_to_zero)


def _within(lost: Tensor, whole: Tensor) -> Tensor:
    """Whether lost is small against whole: no for anything that is not finite."""
    sizes = (torch.linalg.vector_norm(x, dtype=torch.float32) for x in (lost, whole))
    small, large = sizes
    return small <= LOST * large


def _product(left: Tensor, weight: Tensor, work: torch.dtype) -> Tensor:
    """left [m, V] @ weight [V, H] in work dtype, rounded no sooner where the device can."""
    if left.dtype != work and left.is_cuda:
        return torch.mm(left, weight, out_dtype=work)
    return torch.mm(left, weight).to(work)
