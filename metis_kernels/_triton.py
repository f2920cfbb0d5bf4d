"""What the Triton paths share: where they run, and the row pass over a chunk of logits.

One program takes one row of logits [C, V], in place:

    read    log-sum-exp and entropy, online in every lane and merged at the end
    then    the gradient of the loss with respect to the row's logprob and entropy (g, h)
    write   d(logits) over the logits, from the last block to the first: what was read last is what
            the L2 cache still holds

so it moves 2 reads and 1 write of the chunk at most. Statistics are in fp32 whatever the logits are
kept in. Nothing here waits for the device.

Legend: C rows of a chunk, V vocabulary; z a raw logit, s = softcap(z) / temperature what the
softmax sees, "peak" max_j s_j, "log_total" log sum_j exp(s_j - peak). The two halves of the
log-sum-exp stay apart: their sum is rounded at the size of the logits. A leaf: it imports torch,
triton where there is one, and _rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metis_kernels._rows import Given, HDPOCoefficient, Head, RowPass
from metis_kernels.hdpo import inverse_count

try:
    import triton
    import triton.language as tl
    from triton import jit
except ImportError:  # kernels are then functions that nobody calls: `unavailable` says so
    triton = tl = None

    def jit(function: Callable) -> Callable:
        return function


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""
    return triton is not None and not isinstance(row_kernel, triton.JITFunction)


def unavailable(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """Why the Triton paths cannot run for tensors of this kind, or None."""
    if triton is None:
        return "triton is not installed: pip install triton"
    if device.type != "cuda" and not interpreting():
        return f"Triton compiles for a GPU, not for {device.type} (TRITON_INTERPRET=1 interprets)"
    if dtype is not None and dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return f"the kernels compute in fp32, for {names}; got {dtype}"
    return None


class RowConfig(NamedTuple):
    """How a row is cut: columns of a block, and warps that share it."""

    block: int
    warps: int


ROW_CONFIGS = {
    "small": RowConfig(1024, 4),
    "half": RowConfig(4096, 8),
    "single": RowConfig(2048, 8),
}
"""All there are. Sixteen columns a thread of two bytes each, or eight of four: two 16-byte loads
in flight and three accumulators a column in registers. The choice depends on V and the dtype alone,
never on N, so that a row has the same bits in every batch."""


def row_config(vocab: int, dtype: torch.dtype) -> RowConfig:
    if vocab <= ROW_CONFIGS["small"].block:
        return ROW_CONFIGS["small"]
    return ROW_CONFIGS["half" if dtype.itemsize == 2 else "single"]


# ---- pieces --------------------------------------------------------------------------------------

_FLOOR = -1e4
"""exp of it is 0 in fp32, and 0 * _FLOOR is 0 where 0 * -inf would be NaN."""
_EXP_LIMIT = 60.0
"""Where hdpo.py stops the exponent of a ratio."""
if tl is not None:
    _FLOOR, _EXP_LIMIT = tl.constexpr(_FLOOR), tl.constexpr(_EXP_LIMIT)


@jit
def expm1_jit(x):
    """exp(x) - 1 to fp32's precision near zero too."""
    near = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.25, near, tl.exp(x) - 1)


@jit
def tanh_jit(x):
    gap = expm1_jit(-2 * tl.abs(x))
    size = -gap / (2 + gap)
    return tl.where(x < 0, -size, size)


@jit
def finite_jit(x):
    return tl.abs(x) < float("inf")  # false for NaN too


@jit
def scaled_jit(z, inverse_temperature, softcap, HAS_SOFTCAP: tl.constexpr):
    """s of raw logits z."""
    if HAS_SOFTCAP:
        z = softcap * tanh_jit(z / softcap)
    return z * inverse_temperature


@jit
def block_jit(row_ptr, columns, target, label, V):
    """Raw logits [BLOCK] in fp32, the label's replaced by its exact value: then logprob <= 0 holds
    whatever the others were rounded to. Past the end, where another rank's label may be: -inf."""
    inside = columns < V
    z = tl.load(row_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(inside & (columns == label), target, z)


@jit
def statistics_jit(
    row_ptr, target, label, V, inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(peak, total, moment) of a row: max s, sum e, sum e (s - peak), with e = exp(s - peak).

    Every lane keeps its own three and rescales them when its own maximum moves, with one exp a
    column; the lanes meet once, at the end. NaN anywhere in the row is NaN in total.
    """
    lanes = tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    moment = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + lanes
        z = block_jit(row_ptr, columns, target, label, V)
        s = scaled_jit(z, inverse_temperature, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:  # which makes something finite of the -inf past the end
            s = tl.where(columns < V, s, float("-inf"))
        up = s > peak
        gap = tl.abs(s - peak)
        gap = tl.where(gap > -_FLOOR, -_FLOOR, gap)  # a NaN passes
        e = tl.exp(-gap)
        moment = tl.where(up, (moment - gap * total) * e, moment - gap * e)
        total = tl.where(up, total * e + 1, total + e)
        peak = tl.where(up, s, peak)
    top = tl.max(peak, 0)
    gap = peak - top
    gap = tl.where(gap < _FLOOR, _FLOOR, gap)
    e = tl.exp(gap)
    return top, tl.sum(total * e, 0), tl.sum((moment + gap * total) * e, 0)


@jit
def gradient_jit(
    row_ptr, out_ptr, target, label, V, g, h, peak, log_total, entropy, alive,
    live_ptr, eps, inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_MARK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes dL/dz of a row, zeros where it is not alive. With p the softmax of s,

    dL/ds_j = g (1[j = label] - p_j) - h p_j (log p_j + entropy)
    dL/dz_j = dL/ds_j / temperature * (1 - tanh(z_j / softcap)^2, where there is a softcap)

    HAS_MARK: notes in live [V] the columns in which it is more than eps of what it could be.
    """
    if HAS_MARK:
        bound = eps * inverse_temperature * tl.abs(g)
        if HAS_ENTROPY:
            bound += eps * inverse_temperature * tl.abs(h)
    inverse_total = tl.exp(-log_total)
    for back in range(0, V, BLOCK):
        start = (V - 1) // BLOCK * BLOCK - back
        columns = start + tl.arange(0, BLOCK)
        z = block_jit(row_ptr, columns, target, label, V)
        s = scaled_jit(z, inverse_temperature, softcap, HAS_SOFTCAP) - peak
        s = tl.where(s < _FLOOR, _FLOOR, s)
        p = tl.exp(s) * inverse_total
        if HAS_ENTROPY:
            d = -p * (g + h * (s - log_total + entropy))
        else:
            d = -p * g
        d = tl.where(columns == label, d + g, d) * inverse_temperature
        if HAS_SOFTCAP:
            t = tanh_jit(z / softcap)
            d = d * (1 - t * t)
        d = tl.where(alive, d, 0.0)
        tl.store(out_ptr + columns, d.to(out_ptr.dtype.element_ty), mask=columns < V)
        if HAS_MARK:
            # Every row that marks a column writes the same value there.
            here = (columns < V) & (tl.abs(d) > bound)
            one = tl.full((BLOCK,), 1, live_ptr.dtype.element_ty)
            tl.store(live_ptr + columns, one, mask=here)


@jit
def surrogate_jit(ratio, advantage, low, high, dual, weight):
    """-d/d(log rho) of one channel's surrogate over rho: its advantage where it is unclipped."""
    kept = tl.where(advantage > 0, ratio <= high, (low <= ratio) & (ratio <= dual))
    return tl.where(kept, advantage * weight, 0.0)


@jit
def hdpo_coefficient_jit(
    row, logprob, entropy,
    old_ptr, acc_ptr, tool_ptr, ref_ptr, is_weight_ptr, scale_acc_ptr, scale_tool_ptr,
    w_acc, w_tool, low, high, dual, kl_coef, entropy_coef,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_IS: tl.constexpr, HAS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """(g, h): `hdpo.hdpo_coefficient` of one token."""
    acc, tool = tl.load(acc_ptr + row).to(tl.float32), tl.load(tool_ptr + row).to(tl.float32)
    scale_acc, scale_tool = tl.load(scale_acc_ptr), tl.load(scale_tool_ptr)
    counted = finite_jit(logprob) & finite_jit(acc) & finite_jit(tool)
    log_ratio = 0.0
    if HAS_OLD:
        old = tl.load(old_ptr + row).to(tl.float32)
        counted = counted & finite_jit(old)
        log_ratio = logprob - old
    ratio = tl.exp(tl.where(log_ratio > _EXP_LIMIT, _EXP_LIMIT, log_ratio))
    pull = surrogate_jit(ratio, acc, low, high, dual, w_acc * scale_acc)
    pull += surrogate_jit(ratio, tool, low, high, dual, w_tool * scale_tool)
    if HAS_IS:
        is_weight = tl.load(is_weight_ptr + row).to(tl.float32)
        counted = counted & finite_jit(is_weight)
        pull *= is_weight
    g = tl.where(log_ratio <= _EXP_LIMIT, -pull * ratio, 0.0)
    if HAS_REF:
        ref = tl.load(ref_ptr + row).to(tl.float32)
        counted = counted & finite_jit(ref)
        gap = ref - logprob
        slope = -expm1_jit(tl.where(gap > _EXP_LIMIT, _EXP_LIMIT, gap))
        g += tl.where(gap <= _EXP_LIMIT, kl_coef * scale_acc * slope, 0.0)
    h = 0.0
    if HAS_ENTROPY:
        counted = counted & finite_jit(entropy)
        h = tl.where(counted, -entropy_coef * scale_acc, 0.0)
    return tl.where(counted, g, 0.0), h


# ---- the kernel ----------------------------------------------------------------------------------


@jit
def row_kernel(
    # [C, V] in place, and [C] each
    logits_ptr, target_ptr, label_ptr, logprob_ptr, entropy_ptr,
    # GRADIENT "given": [C] each
    g_ptr, h_ptr,
    # GRADIENT "hdpo": [C] each, then 0-d
    old_ptr, acc_ptr, tool_ptr, ref_ptr, is_weight_ptr, scale_acc_ptr, scale_tool_ptr,
    # HAS_MARK: [V]
    live_ptr,
    stride_logits_c, V, inverse_temperature, softcap, eps,
    w_acc, w_tool, low, high, dual, kl_coef, entropy_coef,
    GRADIENT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_IS: tl.constexpr, HAS_MARK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of a chunk; GRADIENT is "none", "given" or "hdpo"."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_c
    label, target = tl.load(label_ptr + row), tl.load(target_ptr + row)
    peak, total, moment = statistics_jit(
        row_ptr, target, label, V, inverse_temperature, softcap, HAS_SOFTCAP, BLOCK
    )
    log_total = tl.log(total)
    chosen = scaled_jit(target, inverse_temperature, softcap, HAS_SOFTCAP)
    # A softcap would make a finite logprob of a broken hidden state; its target shows what it is.
    logprob = tl.where(finite_jit(target), chosen - peak - log_total, float("nan"))
    entropy = log_total - moment / total
    tl.store(logprob_ptr + row, logprob)
    tl.store(entropy_ptr + row, entropy)
    if GRADIENT != "none":
        if GRADIENT == "given":
            g, h = tl.load(g_ptr + row), 0.0
            if HAS_ENTROPY:
                h = tl.load(h_ptr + row)
        else:
            g, h = hdpo_coefficient_jit(
                row, logprob, entropy,
                old_ptr, acc_ptr, tool_ptr, ref_ptr, is_weight_ptr, scale_acc_ptr, scale_tool_ptr,
                w_acc, w_tool, low, high, dual, kl_coef, entropy_coef,
                HAS_OLD, HAS_REF, HAS_IS, HAS_ENTROPY,
            )  # fmt: skip
        tl.debug_barrier()  # every warp has read the row before any of them writes into it
        gradient_jit(
            row_ptr, row_ptr, target, label, V, g, h, peak, log_total, entropy,
            finite_jit(logprob), live_ptr, eps, inverse_temperature, softcap, HAS_SOFTCAP,
            HAS_ENTROPY, HAS_MARK, BLOCK,
        )  # fmt: skip


@jit
def statistics_kernel(
    # [C, V], then [C] each
    logits_ptr, target_ptr, label_ptr, peak_ptr, total_ptr, moment_ptr,
    stride_logits_c, V, inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first half of `row_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    peak, total, moment = statistics_jit(
        logits_ptr + row * stride_logits_c, tl.load(target_ptr + row), tl.load(label_ptr + row), V,
        inverse_temperature, softcap, HAS_SOFTCAP, BLOCK,
    )  # fmt: skip
    tl.store(peak_ptr + row, peak)
    tl.store(total_ptr + row, total)
    tl.store(moment_ptr + row, moment)


@jit
def gradient_kernel(
    # [C, V] in place, then [C] each
    logits_ptr, target_ptr, label_ptr, peak_ptr, log_total_ptr, entropy_ptr, alive_ptr,
    g_ptr, h_ptr,
    # HAS_MARK: [V]
    live_ptr,
    stride_logits_c, V, inverse_temperature, softcap, eps,
    HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_MARK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The second half of `row_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_c
    h = 0.0
    if HAS_ENTROPY:
        h = tl.load(h_ptr + row)
    gradient_jit(
        row_ptr, row_ptr, tl.load(target_ptr + row), tl.load(label_ptr + row), V,
        tl.load(g_ptr + row), h, tl.load(peak_ptr + row), tl.load(log_total_ptr + row),
        tl.load(entropy_ptr + row), tl.load(alive_ptr + row), live_ptr, eps, inverse_temperature,
        softcap, HAS_SOFTCAP, HAS_ENTROPY, HAS_MARK, BLOCK,
    )  # fmt: skip


# ---- launches ------------------------------------------------------------------------------------


def run(
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    coefficient: Given | HDPOCoefficient | None,
    mark: tuple[Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    logprob, entropy = (torch.empty_like(target) for _ in range(2))
    per_token, scalars, flags = _arguments(coefficient, logprob)
    live, eps = mark or (logprob, 0.0)
    given = (target, label, logprob, entropy, *per_token, live)
    flags |= dict(HAS_MARK=mark is not None)
    _launch(row_kernel, logits, given, head, eps, *scalars, **flags)
    return logprob, entropy


def statistics(
    logits: Tensor, target: Tensor, label: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor]:
    sums = tuple(torch.empty_like(target) for _ in range(3))
    _launch(statistics_kernel, logits, (target, label, *sums), head)
    return sums


def gradient(
    logits: Tensor,
    target: Tensor,
    label: Tensor,
    head: Head,
    peak: Tensor,
    log_total: Tensor,
    entropy: Tensor,
    alive: Tensor,
    g: Tensor,
    h: Tensor | None,
    mark: tuple[Tensor, float] | None = None,
) -> None:
    live, eps = mark or (g, 0.0)
    given = (target, label, peak, log_total, entropy, alive, g.contiguous())
    given += (g if h is None else h.contiguous(), live)
    flags = dict(HAS_ENTROPY=h is not None, HAS_MARK=mark is not None)
    _launch(gradient_kernel, logits, given, head, eps, **flags)


ROW_PASS = RowPass(run, statistics, gradient, copies=0)


def _launch(kernel, logits: Tensor, per_row: tuple[Tensor, ...], head: Head, *scalars, **flags):
    """One program a row of logits [C, V]."""
    count, vocab = logits.shape
    if count == 0:
        return
    block, warps = row_config(vocab, logits.dtype)
    kernel[(count,)](
        logits, *per_row, logits.stride(0), vocab, 1 / head.temperature, head.softcap or 1.0,
        *scalars, HAS_SOFTCAP=head.softcap is not None, BLOCK=block, num_warps=warps, **flags,
    )  # fmt: skip


def _arguments(coefficient: Given | HDPOCoefficient | None, stand_in: Tensor):
    """(tensors, numbers, flags) of `row_kernel` for a coefficient; stand_in is where none is."""
    flags = dict(GRADIENT="none", HAS_ENTROPY=False, HAS_OLD=False, HAS_REF=False, HAS_IS=False)
    tensors: list[Tensor | None] = [None] * 9
    numbers = [0.0] * 7
    if isinstance(coefficient, Given):
        tensors[:2] = coefficient.logprob_grad, coefficient.entropy_grad
        flags |= dict(GRADIENT="given", HAS_ENTROPY=coefficient.entropy_grad is not None)
    elif coefficient is not None:
        t, c = coefficient.targets, coefficient.config
        ref = t.ref_logprob if c.kl_coef > 0 else None
        tensors[2:] = [
            t.old_logprob, t.acc_advantage, t.tool_advantage, ref, t.is_weight,
            *(inverse_count(n, stand_in) for n in (t.n_acc, t.n_tool)),
        ]  # fmt: skip
        dual = 3e38 if c.dual_clip is None else c.dual_clip
        numbers = [c.w_acc, c.w_tool, 1 - c.clip_low, 1 + c.clip_high, dual]
        numbers += [c.kl_coef, c.entropy_coef]
        flags |= dict(
            GRADIENT="hdpo",
            HAS_ENTROPY=c.entropy_coef > 0,
            HAS_OLD=t.old_logprob is not None,
            HAS_REF=ref is not None,
            HAS_IS=t.is_weight is not None,
        )
    return [stand_in if x is None else x.contiguous() for x in tensors], numbers, flags
