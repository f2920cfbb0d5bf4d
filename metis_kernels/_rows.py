"""The loop that the operators on an LM head share: rows in chunks, one row pass per chunk.

    for each chunk of C rows:
        logits   [C, V]  = hidden[row] @ weight.T + bias          one matrix product
        row pass [C, V]    logits -> logprob [C], entropy [C], and d(logits) in their place
        d_hidden[row]   += d(logits) @ weight                     two matrix products, where wanted
        d_weight        += d(logits).T @ hidden[row]

An implementation swaps the row pass and nothing else: `RowPass` is the contract, _torch.py the
plain one. _ops.py makes operators and autograd functions of the loop.

A head may be cut over the vocabulary (`Shard`): then every rank holds its own columns of the
logits, and the ranks meet between product and gradient for the maximum and the sums of each row.

Legend: S tokens, T rows of hidden, H hidden, V vocabulary (of this rank), C rows of a chunk; "work"
is the dtype of sums: float64 for float64 inputs, else float32. A leaf: it imports torch and hdpo's
helpers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metis_kernels.hdpo import HDPOConfig, HDPOTargets, check_range, hdpo_coefficient

ROW_TILE = 16
"""Rows that go to a matrix product are padded to a multiple of this. BLAS switches algorithm (and
with it the last bits) for the smallest and the ragged shapes, and an identical row must get
identical bits whether it comes alone or in a batch: the first ratio is exactly 1 only so. Measured
with MKL in fp32 at (H, V) up to (256, 32000): every multiple of 16 rows agrees."""

FLOOR = -1e4
"""exp of it is 0 in fp32 and fp64, and 0 * FLOOR is 0 where 0 * -inf would be NaN."""


@dataclass(frozen=True)
class Head:
    """What turns a row of hidden into the logits of a softmax: softcap, then temperature."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    temperature: float = 1.0
    softcap: float | None = None
    logits_dtype: torch.dtype | None = None
    """None: that of weight. A wider one than hidden's computes the products in it too."""

    @property
    def work_dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(self.weight.dtype, self.logits_dtype or self.weight.dtype)

    def scaled(self, logits: Tensor) -> Tensor:
        """What the softmax sees of raw logits."""
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature


@dataclass(frozen=True)
class Shard:
    """This rank's share of a head that is cut over the vocabulary, in the order of the ranks and
    into equal parts; the hidden states and targets are the same on all of them."""

    group: torch.distributed.ProcessGroup
    first: int
    """The label of this rank's first row of weight."""

    @classmethod
    def named(cls, name: str | None, vocab: int) -> Shard | None:
        """By the name of a process group: an operator takes no object."""
        if name is None:
            return None
        group = torch.distributed.distributed_c10d._resolve_process_group(name)
        return cls(group, torch.distributed.get_rank(group) * vocab)

    def sum(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, group=self.group)
        return values

    def max(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self.group)
        return values


class Wants(NamedTuple):
    """Which gradients somebody waits for."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @classmethod
    def of(cls, hidden: Tensor, head: Head) -> Wants:
        """None at all under no_grad, whatever the inputs say."""
        if not torch.is_grad_enabled():
            return cls()
        bias = head.bias is not None and head.bias.requires_grad
        return cls(hidden.requires_grad, head.weight.requires_grad, bias)


class Coefficient(Protocol):
    """Gradients of a loss with respect to logprob and entropy, for any slice of its S rows."""

    def rows(self, start: int, stop: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]: ...


@dataclass(frozen=True)
class Given:
    """A `Coefficient` that is known beforehand: an upstream gradient."""

    logprob_grad: Tensor
    """[S]"""
    entropy_grad: Tensor | None = None
    """[S] or None"""

    def rows(self, start: int, stop: int) -> Given:
        h = self.entropy_grad
        return Given(self.logprob_grad[start:stop], None if h is None else h[start:stop])

    def take(self, index: Tensor) -> Given:
        h = self.entropy_grad
        return Given(self.logprob_grad[index], None if h is None else h[index])

    def __call__(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.logprob_grad, self.entropy_grad


@dataclass(frozen=True)
class HDPOCoefficient:
    """The `Coefficient` of the HDPO loss: dL/dlogprob and dL/dentropy of any slice of its tokens.

    A row pass may call it, or read its fields and do the same arithmetic itself.
    """

    targets: HDPOTargets
    config: HDPOConfig

    def rows(self, start: int, stop: int) -> HDPOCoefficient:
        index = torch.arange(start, stop, device=self.targets.acc_advantage.device)
        return replace(self, targets=self.targets.take(index))

    def __call__(self, logprob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        return hdpo_coefficient(logprob, self.targets, self.config, entropy)


@dataclass(frozen=True)
class Filter:
    """Columns of d(logits) that cannot matter are left out of the two backward products.

    A column of a chunk is live where some row has |d logit| > eps (|g| + |h|) / temperature: where
    the token is a label, or not negligible to some row. The products run over the live columns
    alone; what a row has in the others (known, for a row sums to zero) is given back to d_hidden
    along their mean row of weight. d_weight of a dropped column gets nothing, d_bias is exact.
    """

    eps: float
    guarded: bool = False
    """Whether a chunk takes all columns where too many are live, or too much would be lost."""

    @classmethod
    def of(cls, grad_filter: float | str | None) -> Filter | None:
        """What a caller asks for: None, "auto" or a number. Raises ValueError for anything else."""
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


AUTO_EPS = 2.4e-4
"""A sixteenth of bf16's spacing at 1 (2^-8)."""
LIVE_SHARE = 0.5
"""Share of live columns above which gathering them costs more than it saves."""
LOST = 2**-9
"""Relative error (2-norm) of a gradient whose d(logits) are rounded to bf16, as measured on samples
of a language model: a guarded filter loses no more."""
SAMPLED = 16
"""Rows of a chunk on which a guarded filter measures that."""


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""d_hidden [T, H], d_weight [V, H], d_bias [V] in work dtype, or None: rounded once, at the end."""


def check_head(
    hidden: Tensor,
    head: Head,
    label: Tensor,
    row: Tensor | None,
    ignored: int | None = None,
    parts: int = 1,
) -> None:
    """Raises ValueError unless hidden [T, H], weight [V, H], bias [V], label [S], row [S] agree. A
    label of `ignored` is in range; weight is one of `parts` of the vocabulary."""
    weight = head.weight
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden [T, H] and weight [V, H] of one H, "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"expected a vocabulary of at least 1, got weight {list(weight.shape)}")
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(
            f"expected hidden and weight in one floating dtype, got {hidden.dtype} and "
            f"{weight.dtype}"
        )
    if head.bias is not None:
        if head.bias.shape != weight.shape[:1]:
            raise ValueError(
                f"expected bias [{weight.shape[0]}] as weight {list(weight.shape)} has it, "
                f"got {list(head.bias.shape)}"
            )
        if head.bias.dtype != weight.dtype:
            raise ValueError(f"expected bias in {weight.dtype}, got {head.bias.dtype}")
    if not 0 < head.temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number > 0, got {head.temperature}")
    if head.softcap is not None and not 0 < head.softcap < float("inf"):
        raise ValueError(f"softcap must be a finite number > 0 or None, got {head.softcap}")
    if head.logits_dtype not in (None, torch.float32, weight.dtype):
        raise ValueError(f"logits_dtype must be None or torch.float32, got {head.logits_dtype}")
    if label.dim() != 1:
        raise ValueError(f"expected label [S], got {list(label.shape)}")
    if row is not None and row.shape != label.shape:
        raise ValueError(f"expected row {list(label.shape)} as label is, got {list(row.shape)}")
    if row is None and label.shape[0] != hidden.shape[0]:
        raise ValueError(
            f"without row, label s belongs to row s: expected label [{hidden.shape[0]}] as hidden "
            f"{list(hidden.shape)} has it, got {list(label.shape)}"
        )
    named = {"weight": weight, "bias": head.bias, "label": label, "row": row}
    for name, value in named.items():
        if value is not None and value.device != hidden.device:
            raise ValueError(f"expected {name} on {hidden.device} as hidden is, got {value.device}")
    for name, value in (("label", label), ("row", row)):
        if value is not None and (value.dtype == torch.bool or value.is_floating_point()):
            raise ValueError(f"expected {name} in an integer dtype, got {value.dtype}")
    if ignored is not None and label.device.type == "cpu":
        label = torch.where(label == ignored, 0, label)
    check_range("label", label, parts * weight.shape[0], "entries of the vocabulary")
    check_range("row", row, hidden.shape[0], "rows of hidden")


def flatten_batch(hidden: Tensor, label: Tensor, row: Tensor | None) -> tuple[Tensor, Tensor]:
    """hidden [B, T, H] as [B T, H]; a label [B, T] without row as [B T]. 2-D hidden as it is."""
    if hidden.dim() == 3:
        if row is None and label.shape == hidden.shape[:2]:
            label = label.reshape(-1)
        hidden = hidden.reshape(-1, hidden.shape[-1])
    return hidden, label


@dataclass(frozen=True)
class RowPass:
    """An implementation of the row pass over a chunk of logits [C, V].

    run(logits, target, label, head, coefficient, mark) -> (logprob, entropy)

        logits [C, V]     the raw products in head.dtype; holds d(logits) afterwards
        target [C]        the label's raw logit, an fp32 dot product; the one in logits is ignored
        label [C]         int64
        coefficient       None (no gradient is wanted), or f(logprob [C], entropy [C]) -> (g, h):
                          the loss's gradients with respect to both, h None where it is all zero
        mark              None, or (live [V] bool, eps): sets live where `Filter` says so
        logprob, entropy  [C] in work dtype

    A row whose target is not finite has a logprob of NaN, and a row whose logprob is not finite
    leaves zeros in its row of d(logits).

    statistics and gradient are its two halves, for a head that is cut over the vocabulary. With s
    the scaled logits, a label outside [0, V) is another rank's:

    statistics(logits, target, label, head) -> (peak, total, moment)
                          [C] each: max s, sum e, sum e (s - peak), with e = exp(s - peak)
    gradient(logits, target, label, head, peak, log_total, entropy, alive, g, h, mark)
                          writes d(logits), zeros in a row that is not alive
    """

    run: Callable[..., tuple[Tensor, Tensor]]
    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., None]
    copies: int
    """Copies of a chunk in work dtype that it makes beside the logits."""


GOOD_ROWS = 2048
"""Rows of a chunk from which products are bound by arithmetic: below, reading the weight and adding
to its gradient is what they wait for."""


def chunk_rows(count: int, head: Head, chunk_bytes: int | None, copies: int) -> int:
    """Rows per chunk, a multiple of ROW_TILE, such that what the row pass holds fits chunk_bytes.

    At least one tile, even where that is more; chunks of nearly one size. Default budget: 128 MiB
    on the CPU; on a GPU 1 GiB, or the logits of GOOD_ROWS rows where those are more. Never a
    function of the memory that happens to be free: it decides the order of sums.
    """
    vocab = head.weight.shape[0]
    if chunk_bytes is None and head.weight.is_cuda:
        chunk_bytes = max(1 << 30, GOOD_ROWS * vocab * head.dtype.itemsize)
    elif chunk_bytes is None:
        chunk_bytes = 1 << 27
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be > 0, got {chunk_bytes}")
    per_row = vocab * (head.dtype.itemsize + copies * head.work_dtype.itemsize)
    fits = max(chunk_bytes // per_row // ROW_TILE, 1)
    tiles = _tiles(count) // ROW_TILE
    chunks = max(-(-tiles // fits), 1)
    return -(-tiles // chunks) * ROW_TILE


@torch.no_grad()
def sweep(
    hidden: Tensor,
    head: Head,
    label: Tensor,
    row: Tensor | None,
    coefficient: Coefficient | None,
    wants: Wants,
    row_pass: RowPass,
    chunk_bytes: int | None = None,
    shard: Shard | None = None,
    grad_filter: Filter | None = None,
) -> tuple[Tensor, Tensor, Gradients]:
    """(logprob [S], entropy [S], gradients) of S tokens; the module's docstring is the algorithm.

    Inputs have passed `check_head`. Rows that repeat are summed, gradients accumulated in work
    dtype, chunks visited in order: the same bits at every run.
    """
    if shard is not None:
        label = label - shard.first
    count, (vocab, _) = label.numel(), head.weight.shape
    work, device = head.work_dtype, hidden.device
    logprob, entropy = (torch.empty(count, dtype=work, device=device) for _ in range(2))
    if not any(wants):
        coefficient = grad_filter = None
    # Under autocast every product below would be cast down behind our back.
    with torch.autocast(device.type, enabled=False):
        size = chunk_rows(count, head, chunk_bytes, row_pass.copies)
        # fp32 logits of bf16 operands: cuBLAS writes them directly, elsewhere the operands widen.
        widen = head.dtype != hidden.dtype and not hidden.is_cuda
        weight = head.weight.to(head.dtype) if widen else head.weight
        sums = _Sums(hidden, head, weight, wants, count, grad_filter)
        logits_buffer = torch.empty(size, vocab, dtype=head.dtype, device=device)
        for start in range(0, count, max(size, 1)):
            stop = min(start + size, count)
            part, n = slice(start, stop), stop - start
            index = torch.arange(start, stop, device=device) if row is None else row[part]
            rows = _gather(hidden, index)
            target = _target_logit(rows[:n], head, label[part], shard)
            rows = rows.to(weight.dtype)
            logits = logits_buffer[: len(rows)]
            _project(logits, rows, weight, head.bias)
            chunk = None if coefficient is None else coefficient.rows(start, stop)
            given = (logits[:n], target, label[part].long(), head, chunk, sums.mark())
            if shard is None:
                lp, en = row_pass.run(*given)
            else:
                lp, en = _sharded_run(row_pass, *given, shard)
            logprob[part], entropy[part] = lp, en
            if any(wants):
                # The row of a broken hidden state is all zero in d(logits), but 0 * NaN is NaN.
                rows[:n].masked_fill_(~torch.isfinite(lp).unsqueeze(1), 0)
                whole = shard is None and head.softcap is None
                sums.add(logits, rows, index, sums_to_zero=whole)
    if shard is not None and wants.hidden:
        shard.sum(sums.hidden)
    return logprob, entropy, (sums.hidden, sums.weight, sums.bias)


class _Sums:
    """The gradients of a sweep while they are added up, in work dtype."""

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        weight: Tensor,
        wants: Wants,
        count: int,
        grad_filter: Filter | None,
    ):
        """weight: head.weight in the dtype of the products."""
        vocab, self.work = head.weight.shape[0], head.work_dtype
        self.head_weight, self.filter, self.written = weight, grad_filter, False
        # What the first chunk writes needs no zeros; without a chunk there is nobody to write.
        fresh = torch.empty if count and grad_filter is None else torch.zeros
        shape, device = head.weight.shape, hidden.device
        self.hidden = hidden.new_zeros(hidden.shape, dtype=self.work) if wants.hidden else None
        self.weight = fresh(shape, dtype=self.work, device=device) if wants.weight else None
        self.bias = hidden.new_zeros(vocab, dtype=self.work) if wants.bias else None
        self.live = self.column_sum = None
        if grad_filter is not None:
            self.live = torch.empty(vocab, dtype=torch.bool, device=device)
            self.column_sum = weight.sum(0, dtype=self.work)

    def mark(self) -> tuple[Tensor, float] | None:
        """What the next row pass notes live columns in."""
        return None if self.filter is None else (self.live.zero_(), self.filter.eps)

    def add(self, logits: Tensor, rows: Tensor, index: Tensor, sums_to_zero: bool) -> None:
        """A chunk: logits [C', V] hold d(logits), rows [C', H] what they came from; the last few of
        both are padding. index [C]: where in hidden the rows are."""
        n = index.numel()
        if self.bias is not None:
            self.bias += logits[:n].sum(0, dtype=self.work)
        d_logits = logits.to(self.head_weight.dtype)
        live = None if self.filter is None else self._live(d_logits[:n], sums_to_zero)
        if live is not None:
            kept = d_logits[:n].index_select(1, live.column)
            if self.hidden is not None:
                _add_rows(self.hidden, index, live.d_hidden(d_logits[:n], kept))
            if self.weight is not None:
                outer = torch.empty(live.head.shape, dtype=self.work, device=kept.device)
                _add_outer(outer, kept, rows[:n], first=True)
                self.weight.index_add_(0, live.column, outer)
            return
        if self.hidden is not None:
            product = torch.mm(d_logits, self.head_weight)[:n]
            _add_rows(self.hidden, index, product.to(self.work))
        if self.weight is not None:
            first = not self.written and self.filter is None
            _add_outer(self.weight, d_logits[:n], rows[:n], first)
            self.written = True

    def _live(self, d_logits: Tensor, sums_to_zero: bool) -> _Live | None:
        """The live columns, or None where all are to be used. The device is waited for."""
        if self.filter.guarded:
            energy = torch.linalg.vector_norm(d_logits, dim=0, dtype=self.work).square()
            lost = energy.masked_fill(self.live, 0).sum()
            share = self.live.to(self.work).mean()
            share, lost, total = torch.stack((share, lost, energy.sum())).tolist()
            if share > LIVE_SHARE or lost > LOST**2 * total:
                return None
        column = self.live.nonzero().flatten()
        head = self.head_weight.index_select(0, column)
        dropped = max(len(self.head_weight) - len(column), 1)
        mean = (self.column_sum - head.sum(0, dtype=self.work)) / dropped
        live = _Live(column, head, mean, sums_to_zero)
        if self.filter.guarded and self.hidden is not None and len(d_logits):
            # What d_hidden would lose is not bounded by what d(logits) loses: measured, on a few.
            few = d_logits[:: -(-len(d_logits) // SAMPLED)]
            exact = torch.mm(few, self.head_weight).to(self.work)
            gap = live.d_hidden(few, few.index_select(1, column)) - exact
            if gap.norm() > LOST * exact.norm():
                return None
        return live


@dataclass(frozen=True)
class _Live:
    """The L columns of a chunk that are kept."""

    column: Tensor
    """[L]"""
    head: Tensor
    """[L, H] their rows of weight."""
    mean: Tensor
    """[H] the mean row of weight of the others."""
    sums_to_zero: bool
    """Whether a row of d(logits) does."""

    def d_hidden(self, d_logits: Tensor, kept: Tensor) -> Tensor:
        """[n, H] of d_logits [n, V] and their live columns kept [n, L]."""
        mass = -kept.sum(1, dtype=self.mean.dtype)
        if not self.sums_to_zero:
            mass += d_logits.sum(1, dtype=self.mean.dtype)
        return torch.mm(kept, self.head).to(self.mean.dtype).addr_(mass, self.mean)


def _sharded_run(
    row_pass: RowPass,
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    coefficient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None,
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


def _add_outer(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """total [V, H] += left [n, V].T @ right [n, H], summed in total's dtype; first: total is yet to
    be written."""
    beta = 0 if first else 1  # with 0, not even a NaN in total is looked at
    if left.dtype == total.dtype:
        torch.addmm(total, left.t(), right, beta=beta, out=total)
    elif left.is_cuda:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, beta=beta, out=total)
    elif first:
        total.copy_(torch.mm(left.t(), right))
    else:
        total.add_(torch.mm(left.t(), right))


def _add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index] += values, where index may repeat; the same bits at every run."""
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)
    else:
        total.index_add_(0, index, values)


def row_sum(x: Tensor) -> Tensor:
    """x.sum(1), in the order of summation that it has among other rows even where it is alone.

    (torch splits a sum of a single output across threads, and no other.)
    """
    return x.sum(1) if len(x) != 1 else x.expand(2, -1).sum(1)[:1]
