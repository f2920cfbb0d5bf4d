"""The loop that the operators on an LM head share: rows in chunks, one row pass per chunk.

    for each chunk of C rows:
        logits   [C, V]  = hidden[row] @ weight.T + bias          one matrix product
        row pass [C, V]    logits -> logprob [C], entropy [C], and d(logits) in their place
        d_hidden[row]   += d(logits) @ weight                     two matrix products, where wanted
        d_weight        += d(logits).T @ hidden[row]

An implementation swaps the row pass and nothing else (`_rows.RowPass`). _ops.py makes operators and
autograd functions of the loop.

A head may be cut over the vocabulary (`_rows.Shard`): then every rank holds its own columns of the
logits, and the ranks meet between product and gradient for the maximum and the sums of each row.

With a filter (_filter.py) the two last products of a chunk wait until the next chunk's first one
has been launched, and two chunks of logits exist at a time.

Legend: S tokens, T rows of hidden, H hidden, V vocabulary (of this rank), C rows of a chunk; "work"
is the dtype of sums. A leaf: it imports torch, _rows and _filter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metis_kernels._filter import Filter, Verdict, live_dtype
from metis_kernels._rows import FLOOR, Coefficient, Head, RowPass, Shard, Wants, row_sum

ROW_TILE = 16
"""Rows that go to a matrix product are padded to a multiple of this. BLAS switches algorithm (and
with it the last bits) for the smallest and the ragged shapes, and an identical row must get
identical bits whether it comes alone or in a batch: the first ratio is exactly 1 only so. Measured
with MKL in fp32 at (H, V) up to (256, 32000): every multiple of 16 rows agrees."""

GOOD_ROWS = 2048
"""Rows of a chunk from which products are bound by arithmetic: below, reading the weight and adding
to its gradient is what they wait for."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""d_hidden [T, H], d_weight [V, H], d_bias [V] in `Head.gradient_dtype`, or None."""


def chunk_rows(
    count: int,
    head: Head,
    chunk_bytes: int | None,
    copies: int,
    buffers: int = 1,
    learns: bool = False,
) -> int:
    """Rows per chunk, a multiple of ROW_TILE, such that what the row pass holds fits chunk_bytes.

    At least one tile, even where that is more; chunks of nearly one size. Default budget, for each
    of `buffers`: on a GPU 1 GiB, or the logits of GOOD_ROWS rows where those are more; on the CPU
    128 MiB, or half of an fp32 gradient of the head where there is one (`learns`) and it is more,
    because each chunk reads and writes all of that gradient. Never a function of the memory that
    happens to be free: it decides the order of sums.
    """
    vocab, width = head.weight.shape
    if chunk_bytes is None and head.weight.is_cuda:
        chunk_bytes = buffers * max(1 << 30, GOOD_ROWS * vocab * head.dtype.itemsize)
    elif chunk_bytes is None:
        half = vocab * width * head.work_dtype.itemsize // 2
        chunk_bytes = buffers * max(1 << 27, half if learns else 0)
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be > 0, got {chunk_bytes}")
    tiles = _tiles(count) // ROW_TILE
    per_row = vocab * (head.dtype.itemsize + copies * head.work_dtype.itemsize)
    if chunk_bytes < tiles * ROW_TILE * per_row:  # a single chunk needs one buffer
        per_row = vocab * (buffers * head.dtype.itemsize + copies * head.work_dtype.itemsize)
    fits = max(chunk_bytes // per_row // ROW_TILE, 1)
    chunks = max(-(-tiles // fits), 1)
    return -(-tiles // chunks) * ROW_TILE


class Loop(NamedTuple):
    """How a sweep is done, whatever it is done to."""

    row_pass: RowPass
    chunk_bytes: int | None = None
    shard: Shard | None = None
    filter: Filter | None = None


def sweep_selected(
    hidden: Tensor,
    head: Head,
    label: Tensor,
    row: Tensor | None,
    coefficient: Coefficient | None,
    wants: Wants,
    loop: Loop,
    select: Tensor | None,
    fill: float,
) -> tuple[Tensor, ...]:
    """`sweep` over the tokens at select [K] (None: all), in that order; logprob and entropy of the
    others are fill. The gradients follow, an empty tensor for one that nobody wants."""
    count = label.numel()
    part = select is not None and len(select) < count
    if part:
        row = select if row is None else row.index_select(0, select)
        label = label.index_select(0, select)
        coefficient = None if coefficient is None else coefficient.take(select)
    *outputs, grads = sweep(hidden, head, label, row, coefficient, wants, loop)
    if part:
        outputs = (x.new_full((count,), fill).index_copy(0, select, x) for x in outputs)
    return *outputs, *(hidden.new_empty(0) if g is None else g for g in grads)


@torch.no_grad()
def sweep(
    hidden: Tensor,
    head: Head,
    label: Tensor,
    row: Tensor | None,
    coefficient: Coefficient | None,
    wants: Wants,
    loop: Loop,
) -> tuple[Tensor, Tensor, Gradients]:
    """(logprob [S], entropy [S], gradients) of S tokens; the module's docstring is the algorithm.

    Inputs have passed `check_head`. Rows that repeat are summed, gradients accumulated in work
    dtype, chunks visited in order: the same bits at every run.
    """
    row_pass, chunk_bytes, shard, chosen = loop
    if shard is not None:
        label = label - shard.first
    count, (vocab, _) = label.numel(), head.weight.shape
    work, device = head.work_dtype, hidden.device
    logprob, entropy = (torch.empty(count, dtype=work, device=device) for _ in range(2))
    if not any(wants):
        coefficient = chosen = None
    # Under autocast every product below would be cast down behind our back.
    with torch.autocast(device.type, enabled=False):
        buffers = 1 if chosen is None else 2
        size = chunk_rows(count, head, chunk_bytes, row_pass.copies, buffers, wants.weight)
        # fp32 logits of bf16 operands: cuBLAS writes them directly, elsewhere the operands widen.
        widen = head.dtype != hidden.dtype and not hidden.is_cuda
        weight = head.weight.to(head.dtype) if widen else head.weight
        sums = _Sums(hidden, head, weight, wants, chosen, chunks=-(-count // max(size, 1)))
        buffers = min(buffers, sums.chunks)
        logits_buffers = torch.empty(buffers, size, vocab, dtype=head.dtype, device=device)
        for start in range(0, count, max(size, 1)):
            stop = min(start + size, count)
            part, n = slice(start, stop), stop - start
            index = torch.arange(start, stop, device=device) if row is None else row[part]
            rows = _gather(hidden, index)
            target = _target_logit(rows[:n], head, label[part], shard)
            rows = rows.to(weight.dtype)
            logits = logits_buffers[start // size % buffers, : len(rows)]
            _project(logits, rows, weight, head.bias)
            mark = sums.mark()
            chunk = None if coefficient is None else coefficient.rows(start, stop)
            given = (logits[:n], target, label[part].long(), head, chunk, mark)
            if shard is None:
                lp, en = row_pass.run(*given)
            else:
                lp, en = _sharded_run(row_pass, *given, shard)
            logprob[part], entropy[part] = lp, en
            if any(wants):
                # The row of a broken hidden state is all zero in d(logits), but 0 * NaN is NaN.
                rows[:n].masked_fill_(~torch.isfinite(lp).unsqueeze(1), 0)
                whole = shard is None and head.softcap is None
                sums.add(_Chunk(logits, rows, index), mark, sums_to_zero=whole)
        sums.finish()
    del logits_buffers
    if shard is not None and wants.hidden:
        shard.sum(sums.hidden)
    grads = (sums.hidden, sums.weight, sums.bias)
    return logprob, entropy, tuple(g if g is None else g.to(head.gradient_dtype) for g in grads)


class _Chunk(NamedTuple):
    """What the backward products of a chunk take."""

    d_logits: Tensor
    """[C', V], the last few rows of it padding"""
    rows: Tensor
    """[C', H] the hidden states that they came from"""
    index: Tensor
    """[C] where in hidden those are"""


class _Sums:
    """The gradients of a sweep while they are added up: in work dtype, but for a d_weight that one
    product makes at once."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        weight: Tensor,
        wants: Wants,
        chosen: Filter | None,
        chunks: int,
    ):
        """weight: head.weight in the dtype of the products."""
        vocab, self.work, self.chunks = head.weight.shape[0], head.work_dtype, chunks
        self.head, self.head_weight, self.filter, self.written = head, weight, chosen, False
        # What the first chunk writes needs no zeros; without a chunk there is nobody to write.
        fresh = torch.empty if chunks and chosen is None else torch.zeros
        shape, device = head.weight.shape, hidden.device
        at_once = chunks == 1 and chosen is None and head.gradient_dtype != self.work
        dtype = weight.dtype if at_once else self.work
        self.hidden = hidden.new_zeros(hidden.shape, dtype=self.work) if wants.hidden else None
        self.weight = fresh(shape, dtype=dtype, device=device) if wants.weight else None
        self.bias = hidden.new_zeros(vocab, dtype=self.work) if wants.bias else None
        self.waiting: tuple[_Chunk, Verdict] | None = None

    def mark(self) -> tuple[Tensor, float] | None:
        """What the next row pass notes live columns in."""
        if self.filter is None:
            return None
        vocab, device = len(self.head_weight), self.head_weight.device
        live = torch.zeros(vocab, dtype=live_dtype(self.head.dtype), device=device)
        return live, self.filter.eps

    def add(self, chunk: _Chunk, mark: tuple[Tensor, float] | None, sums_to_zero: bool) -> None:
        """Adds a chunk, or with a filter the one before it: this one waits for its `Verdict`."""
        n = chunk.index.numel()
        if self.bias is not None:
            self.bias += chunk.d_logits[:n].sum(0, dtype=self.work)
        chunk = chunk._replace(d_logits=chunk.d_logits.to(self.head_weight.dtype))
        if mark is None:
            self._add_all(chunk)
            return
        given = (chunk.d_logits[:n], mark[0], self.head_weight, self.work, sums_to_zero)
        verdict = Verdict(self.filter, *given)
        self.finish()
        self.waiting = chunk, verdict

    def finish(self) -> None:
        """Adds the chunk that waits, if there is one."""
        if self.waiting is None:
            return
        chunk, verdict = self.waiting
        self.waiting = None
        columns = verdict.columns()
        if columns is None:
            self._add_all(chunk)
            return
        d_logits, rows = (x[: chunk.index.numel()] for x in (chunk.d_logits, chunk.rows))
        kept = d_logits.index_select(1, columns.index)
        if self.hidden is not None:
            _add_rows(self.hidden, chunk.index, columns.d_hidden(d_logits, kept))
        if self.weight is not None:
            outer = torch.empty(columns.head.shape, dtype=self.work, device=kept.device)
            _add_outer(outer, kept, rows, first=True)
            self.weight.index_add_(0, columns.index, outer)

    def _add_all(self, chunk: _Chunk) -> None:
        n = chunk.index.numel()
        if self.hidden is not None:
            product = torch.mm(chunk.d_logits, self.head_weight)[:n]
            _add_rows(self.hidden, chunk.index, product.to(self.work))
        if self.weight is not None:
            first = not self.written and self.filter is None
            _add_outer(self.weight, chunk.d_logits[:n], chunk.rows[:n], first)
            self.written = True


def _sharded_run(
    row_pass: RowPass,
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    coefficient: Coefficient | None,
    mark: tuple[Tensor, float] | None,
    shard: Shard,
) -> tuple[Tensor, Tensor]:
    """`RowPass.run` over the columns of all ranks."""
    peak, total, moment = row_pass.statistics(logits, target, label, head)
    top = shard.max(peak.clone())
    gap = (peak - top).clamp_min(FLOOR)
    total, moment = shard.sum(torch.stack((total, moment + gap * total)) * gap.exp())
    log_total = total.log()
    logprob = head.scaled(target) - top - log_total
    logprob = torch.where(torch.isfinite(target), logprob, float("nan"))
    entropy = log_total - moment / total
    if coefficient is not None:
        g, h = coefficient(logprob, entropy)
        alive = torch.isfinite(logprob)
        row_pass.gradient(logits, target, label, head, top, log_total, entropy, alive, g, h, mark)
    return logprob, entropy


def _tiles(count: int) -> int:
    return -(-count // ROW_TILE) * ROW_TILE


def _gather(hidden: Tensor, index: Tensor) -> Tensor:
    """The rows at index [n], then zeros up to a whole number of tiles."""
    n = index.numel()
    return torch.nn.functional.pad(hidden.index_select(0, index), (0, 0, 0, _tiles(n) - n))


def _target_logit(rows: Tensor, head: Head, label: Tensor, shard: Shard | None) -> Tensor:
    """[n]: the label's logit as a dot product in work dtype, before softcap and temperature."""
    work, here = head.work_dtype, None
    if shard is not None:
        here = (label >= 0) & (label < head.weight.shape[0])
        label = torch.where(here, label, 0)
    target = row_sum(rows.to(work) * head.weight.index_select(0, label).to(work))
    if head.bias is not None:
        target = target + head.bias.index_select(0, label).to(work)
    return target if here is None else shard.sum(torch.where(here, target, 0))


def _project(out: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out [n, V] = rows [n, H] @ weight [V, H].T + bias, in out's dtype."""
    if out.dtype != rows.dtype:
        torch.mm(rows, weight.t(), out_dtype=out.dtype, out=out)
    else:
        torch.mm(rows, weight.t(), out=out)
    if bias is not None:
        out.add_(bias)


OUTER_ROWS = 1 << 14
"""Rows of d_weight that the CPU makes at a time where its product cannot add to fp32."""
WIDENED_ROWS = 1 << 12
"""Of these, rows that are widened at a time. (Added unwidened they would be, all at once.)"""


def _add_outer(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [V, H] += left [n, V].T @ right [n, H], summed in total's dtype; first: total is yet to
    be written."""
    if left.dtype == total.dtype and first:
        torch.mm(left.t(), right, out=total)
        return
    if left.dtype == total.dtype:
        torch.addmm(total, left.t(), right, out=total)
        return
    if left.is_cuda:
        beta = 0 if first else 1  # with 0, not even a NaN in total is looked at
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, beta=beta, out=total)
        return
    for columns, rows in zip(left.split(OUTER_ROWS, 1), total.split(OUTER_ROWS), strict=True):
        product = torch.mm(columns.t(), right)
        if first:
            rows.copy_(product)
            continue
        for part, some in zip(rows.split(WIDENED_ROWS), product.split(WIDENED_ROWS), strict=True):
            part.add_(some.to(total.dtype))


def _add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index] += values, where index may repeat; the same bits at every run."""
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)
