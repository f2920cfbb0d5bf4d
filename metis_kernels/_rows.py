"""The loop that the operators on an LM head share: rows in chunks, one row pass per chunk.

    for each chunk of C rows:
        logits   [C, V]  = hidden[row] @ weight.T + bias          one matrix product
        row pass [C, V]    logits -> logprob [C], entropy [C], and d(logits) in their place
        d_hidden[row]   += d(logits) @ weight                     two matrix products, where wanted
        d_weight        += d(logits).T @ hidden[row]

An implementation swaps the row pass and nothing else; `row_pass_torch` below is the plain one.

Legend: S tokens, T rows of hidden, H hidden, V vocabulary, C rows of a chunk; "work" is the dtype
of sums: float64 for float64 inputs, else float32. A leaf: it imports torch and hdpo's helpers.

A `RowPass` runs as f(logits, target, label, head, coefficient) -> (logprob, entropy):

    logits [C, V]     the raw products in head.logits_dtype; holds d(logits) afterwards
    target [C]        the label's raw logit, an fp32 dot product; it stands in for logits[c, label]
    label [C]         int64
    coefficient       None (no gradient is wanted), or f(logprob [C], entropy [C]) -> (g, h): the
                      gradients of the loss with respect to both, h None where it is all zero
    logprob, entropy  [C] in work dtype

A row whose target is not finite has a logprob of NaN, and a row whose logprob is not finite leaves
zeros in its row of d(logits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from metis_kernels import _impl
from metis_kernels.hdpo import HDPOConfig, HDPOTargets, check_range, hdpo_coefficient

ROW_TILE = 16
"""Rows that go to a matrix product are padded to a multiple of this. BLAS switches algorithm (and
with it the last bits) for the smallest and the ragged shapes, and an identical row must get
identical bits whether it comes alone or in a batch: the first ratio is exactly 1 only so. Measured
with MKL in fp32 at (H, V) up to (256, 32000): every multiple of 16 rows agrees."""

_FLOOR = -1e4
"""exp of it is 0 in fp32 and fp64, and 0 * _FLOOR is 0 where 0 * -inf would be NaN."""


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


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""d_hidden [T, H], d_weight [V, H], d_bias [V] in work dtype, or None: rounded once, at the end."""


def check_head(
    hidden: Tensor,
    head: Head,
    label: Tensor,
    row: Tensor | None,
    ignored: int | None = None,
) -> None:
    """Raises ValueError unless hidden [T, H], weight [V, H], bias [V], label [S], row [S] agree. A
    label of `ignored` is in range."""
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
    check_range("label", label, weight.shape[0], "entries of the vocabulary")
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
    """An implementation of the row pass; the module's docstring has its contract."""

    run: Callable[..., tuple[Tensor, Tensor]]
    copies: int
    """Copies of a chunk in work dtype that it makes beside the logits."""


GOOD_ROWS = 2048
"""Rows of a chunk from which products are bound by arithmetic: below, reading the weight and adding
to its gradient is what they wait for."""


def chunk_rows(count: int, head: Head, chunk_bytes: int | None, copies: int = 2) -> int:
    """Rows per chunk, a multiple of ROW_TILE, such that what the row pass holds fits chunk_bytes.

    At least one tile, even where that is more; chunks of nearly one size. Default budget: 128 MiB
    on the CPU; on a GPU 1 GiB, or GOOD_ROWS rows where a quarter of the free memory holds them.
    """
    per_row = head.weight.shape[0] * (head.dtype.itemsize + copies * head.work_dtype.itemsize)
    if chunk_bytes is None and head.weight.is_cuda:
        free, _ = torch.cuda.mem_get_info(head.weight.device)
        chunk_bytes = max(1 << 30, min(GOOD_ROWS * per_row, free // 4))
    elif chunk_bytes is None:
        chunk_bytes = 1 << 27
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes must be > 0, got {chunk_bytes}")
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
) -> tuple[Tensor, Tensor, Gradients]:
    """(logprob [S], entropy [S], gradients) of S tokens; the module's docstring is the algorithm.

    Inputs have passed `check_head`. Rows that repeat are summed, gradients accumulated in work
    dtype, chunks visited in order: the same bits at every run.
    """
    count, (vocab, _) = label.numel(), head.weight.shape
    work, device = head.work_dtype, hidden.device
    logprob, entropy = (torch.empty(count, dtype=work, device=device) for _ in range(2))
    if not any(wants):
        coefficient = None
    # What the first chunk writes needs no zeros; without a chunk there is nobody to write.
    fresh = torch.empty if count else torch.zeros
    d_hidden = hidden.new_zeros(hidden.shape, dtype=work) if wants.hidden else None
    d_weight = fresh(head.weight.shape, dtype=work, device=device) if wants.weight else None
    d_bias = hidden.new_zeros(vocab, dtype=work) if wants.bias else None
    # Under autocast every product below would be cast down behind our back.
    with torch.autocast(device.type, enabled=False):
        size = chunk_rows(count, head, chunk_bytes, row_pass.copies)
        # fp32 logits of bf16 operands: cuBLAS writes them directly, elsewhere the operands widen.
        widen = head.dtype != hidden.dtype and not hidden.is_cuda
        weight = head.weight.to(head.dtype) if widen else head.weight
        logits_buffer = torch.empty(size, vocab, dtype=head.dtype, device=device)
        for start in range(0, count, max(size, 1)):
            stop = min(start + size, count)
            part, n = slice(start, stop), stop - start
            index = torch.arange(start, stop, device=device) if row is None else row[part]
            rows = _gather(hidden, index)
            target = _target_logit(rows[:n], head, label[part])
            rows = rows.to(weight.dtype)
            logits = logits_buffer[: len(rows)]
            _project(logits, rows, weight, head.bias)
            chunk = None if coefficient is None else coefficient.rows(start, stop)
            lp, en = row_pass.run(logits[:n], target, label[part].long(), head, chunk)
            logprob[part], entropy[part] = lp, en
            if not any(wants):
                continue
            d_logits = logits.to(weight.dtype)
            if wants.hidden:
                _add_rows(d_hidden, index, torch.mm(d_logits, weight)[:n].to(work))
            if wants.weight:
                # The row of a broken hidden state is all zero in d_logits, but 0 * NaN is NaN.
                sound = torch.where(torch.isfinite(lp).unsqueeze(1), rows[:n], 0)
                _add_outer(d_weight, d_logits[:n], sound, first=start == 0)
            if wants.bias:
                d_bias += logits[:n].sum(0, dtype=work)
    return logprob, entropy, (d_hidden, d_weight, d_bias)


def row_pass_torch(
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    coefficient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]] | None,
) -> tuple[Tensor, Tensor]:
    """The row pass in torch operations; see the module's docstring for the contract.

    With s_j = z_j / temperature the scaled logits and p their softmax,

        dL/ds_j = g (1[j = label] - p_j) - h p_j (log p_j + entropy)
        dL/dz_j = dL/ds_j / temperature * (1 - tanh(z_j / softcap)^2, where there is a softcap)
    """
    work = torch.promote_types(logits.dtype, torch.float32)
    label = label.unsqueeze(1)
    shifted = logits.to(work, copy=head.softcap is not None)
    # The exact target takes its place in the sum too, so that logprob <= 0 holds in any dtype.
    shifted.scatter_(1, label, target.to(work).unsqueeze(1))
    slope = None
    if head.softcap is not None:
        shifted.div_(head.softcap).tanh_()
        slope = 1 - shifted.square() if coefficient is not None else None
        shifted.mul_(head.softcap)
    shifted.div_(head.temperature)
    top = shifted.amax(1, keepdim=True)
    shifted.sub_(top)
    logprob = shifted.gather(1, label).squeeze(1)
    shifted.clamp_(min=_FLOOR)
    probs = shifted.exp()
    total = _row_sum(probs)
    log_total = total.log()
    # A softcap would make a finite logprob of a broken hidden state; its target shows what it is.
    logprob = torch.where(torch.isfinite(target), logprob - log_total, float("nan"))
    entropy = log_total - _row_sum(shifted * probs) / total
    if coefficient is None:
        return logprob, entropy

    g, h = coefficient(logprob, entropy)
    g = g.to(work)
    probs.mul_((-g / total).unsqueeze(1)) if h is None else probs.div_(total.unsqueeze(1))
    if h is not None:
        # shifted - log_total is log p.
        shifted.sub_((log_total - entropy).unsqueeze(1)).mul_(-h.to(work).unsqueeze(1))
        probs.mul_(shifted.sub_(g.unsqueeze(1)))
    probs.scatter_add_(1, label, g.unsqueeze(1))
    if slope is not None:
        probs.mul_(slope)
    probs.div_(head.temperature)
    probs.masked_fill_(~torch.isfinite(logprob).unsqueeze(1), 0)
    logits.copy_(probs)
    return logprob, entropy


TORCH = RowPass(row_pass_torch, copies=2)


class GradientInForward(torch.autograd.Function):
    """Hangs gradients that the forward has already computed onto a loss.

    Backward multiplies them with the upstream gradient and rounds them, in one pass.
    """

    @staticmethod
    def forward(ctx, loss, hidden, weight, bias, d_hidden, d_weight, d_bias):
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtype = hidden.dtype
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        scaled = (_rounded(g, ctx.dtype, upstream) for g in ctx.saved_tensors)
        return None, *scaled, None, None, None


def run_row_sweep(
    hidden, weight, bias, row, label, logprob_grad, entropy_grad, ignored, temperature, softcap,
    logits_dtype, wants, operator, impl, chunk_bytes,
):  # fmt: skip
    """(logprob [S], entropy [S], d_hidden, d_weight, d_bias): `sweep` with gradients [S] that are
    known beforehand, over the tokens whose label is not `ignored`; the others have zeros.
    `row_sweep` is it as one opaque operator, so that a compiled caller sees no chunks. A gradient
    that nobody wants is empty.
    """
    count, real = label.numel(), None
    if ignored is not None:
        real = (label != ignored).nonzero().flatten()
        if len(real) < count:
            row = real if row is None else row.index_select(0, real)
            label = label.index_select(0, real)
    given = None if logprob_grad is None else Given(logprob_grad, entropy_grad)
    if given is not None and real is not None and len(real) < count:
        given = given.take(real)
    logprob, entropy, grads = sweep(
        hidden,
        Head(weight, bias, temperature, softcap, logits_dtype),
        label,
        row,
        given,
        Wants(*wants),
        _impl.implementation(operator, impl, hidden.device, hidden.dtype),
        chunk_bytes,
    )
    if real is not None and len(real) < count:
        logprob, entropy = (x.new_zeros(count).index_copy(0, real, x) for x in (logprob, entropy))
    return logprob, entropy, *(hidden.new_empty(0) if g is None else g for g in grads)


row_sweep = torch.library.custom_op(
    "metis_kernels::row_sweep",
    run_row_sweep,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor? row, Tensor label, "
    "Tensor? logprob_grad, Tensor? entropy_grad, int? ignored, float temperature, float? softcap, "
    "ScalarType? logits_dtype, bool[] wants, str operator, str impl, int? chunk_bytes) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def fake_sweep(
    hidden: Tensor, weight: Tensor, label: Tensor, wants: Sequence[bool]
) -> tuple[Tensor, ...]:
    """What a sweep's operator returns, by shape and dtype."""
    work = torch.promote_types(weight.dtype, torch.float32)
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    gradients = (
        hidden.new_empty(shape, dtype=work) if wanted else hidden.new_empty(0)
        for shape, wanted in zip(shapes, wants, strict=True)
    )
    return *(hidden.new_empty(label.shape, dtype=work) for _ in range(2)), *gradients


@row_sweep.register_fake
def _(hidden, weight, bias, row, label, logprob_grad, entropy_grad, ignored, temperature, softcap,
      logits_dtype, wants, operator, impl, chunk_bytes):  # fmt: skip
    return fake_sweep(hidden, weight, label, wants)


class Recompute(torch.autograd.Function):
    """(logprob [S], entropy [S]) with logits in neither forward's nor backward's memory."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, row, label, options):
        ctx.save_for_backward(hidden, weight, bias, row, label)
        ctx.options = options
        ctx.set_materialize_grads(False)
        given = (hidden, weight, bias, row, label, None, None, None)
        logprob, entropy, *_ = row_sweep(*given, *options[:3], [False] * 3, *options[3:])
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logprob, d_entropy):
        if d_logprob is None and d_entropy is None:
            return (None,) * 6
        if d_logprob is None:
            d_logprob = torch.zeros_like(d_entropy)
        wants = list(ctx.needs_input_grad[:3])
        given = (*ctx.saved_tensors, d_logprob, d_entropy, None)
        _, _, *grads = row_sweep(*given, *ctx.options[:3], wants, *ctx.options[3:])
        dtype = ctx.saved_tensors[0].dtype
        grads = (g.to(dtype) if wanted else None for g, wanted in zip(grads, wants, strict=True))
        return *grads, None, None, None


def recompute(
    hidden: Tensor,
    head: Head,
    label: Tensor,
    row: Tensor | None,
    operator: str,
    impl: str,
    chunk_bytes: int | None,
) -> tuple[Tensor, Tensor]:
    """`Recompute` on checked inputs, with an implementation that is registered for operator."""
    options = (head.temperature, head.softcap, head.logits_dtype, operator, impl, chunk_bytes)
    return Recompute.apply(hidden, head.weight, head.bias, row, label, options)


def _tiles(count: int) -> int:
    return -(-count // ROW_TILE) * ROW_TILE


def _gather(hidden: Tensor, index: Tensor) -> Tensor:
    """The rows at index [n], then zeros up to a whole number of tiles."""
    n = index.numel()
    return torch.nn.functional.pad(hidden.index_select(0, index), (0, 0, 0, _tiles(n) - n))


def _target_logit(rows: Tensor, head: Head, label: Tensor) -> Tensor:
    """[n]: the label's logit as a dot product in work dtype, before softcap and temperature."""
    work = head.work_dtype
    target = _row_sum(rows.to(work) * head.weight.index_select(0, label).to(work))
    if head.bias is not None:
        target = target + head.bias.index_select(0, label).to(work)
    return target


def _rounded(gradient: Tensor | None, dtype: torch.dtype, factor: Tensor) -> Tensor | None:
    """gradient times a 0-d factor in dtype; the product is rounded once, as it is written."""
    if gradient is None:
        return None
    out = torch.empty_like(gradient, dtype=dtype)
    return torch.mul(gradient, factor.to(gradient.dtype), out=out)


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
        torch.addmm(total, left.t(), right, total.dtype, beta=beta, out=total)
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


def _row_sum(x: Tensor) -> Tensor:
    """x.sum(1), in the order of summation that it has among other rows even where it is alone.

    (torch splits a sum of a single output across threads, and no other.)
    """
    return x.sum(1) if len(x) != 1 else x.expand(2, -1).sum(1)[:1]
