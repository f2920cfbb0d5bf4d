"""Logits -> logprob and entropy of each token, without a second copy of the logits in fp32.

For callers whose logits exist already. Legend: S tokens, V vocabulary; "work" is float64 for
float64 logits, else float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metis_kernels import _cpp, _impl, _triton
from metis_kernels._rows import FLOOR, Head, row_sum
from metis_kernels._triton import gradient_jit, jit, statistics_jit, tl
from metis_kernels.hdpo import check_range

_CHUNK_BYTES = 1 << 26


def logprobs_ref(
    logits: Tensor, label: Tensor, *, temperature: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Dense, by autograd (logits of -inf included, in the outputs though not in their gradient)."""
    logp = torch.log_softmax(logits.to(dtype) / temperature, -1)
    logprob = logp.gather(-1, label.long().unsqueeze(-1)).squeeze(-1)
    return logprob, torch.special.entr(logp.exp()).sum(-1)


# ---- Triton --------------------------------------------------------------------------------------


@jit
def forward_kernel(
    # [S, V], then [S] each
    logits_ptr, label_ptr, logprob_ptr, entropy_ptr, peak_ptr, log_total_ptr,
    stride_logits_s, V, inverse_temperature, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: reads its logits once."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * stride_logits_s
    label = tl.load(label_ptr + token)
    target = tl.load(row_ptr + label).to(tl.float32)
    peak, total, moment = statistics_jit(
        row_ptr, target, label, V, inverse_temperature, 1.0, False, BLOCK
    )
    log_total = tl.log(total)
    tl.store(logprob_ptr + token, target * inverse_temperature - peak - log_total)
    tl.store(entropy_ptr + token, log_total - moment / total)
    tl.store(peak_ptr + token, peak)
    tl.store(log_total_ptr + token, log_total)


@jit
def backward_kernel(
    # [S, V] each, then [S] each
    logits_ptr, d_logits_ptr, label_ptr, entropy_ptr, peak_ptr, log_total_ptr, g_ptr, h_ptr,
    stride_logits_s, stride_d_logits_s, V, inverse_temperature,
    HAS_G: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: reads its logits once and writes their gradient once."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * stride_logits_s
    label = tl.load(label_ptr + token)
    target = tl.load(row_ptr + label).to(tl.float32)
    g, h = 0.0, 0.0
    if HAS_G:
        g = tl.load(g_ptr + token)
    if HAS_ENTROPY:
        h = tl.load(h_ptr + token)
    # A token that nobody asks about has no gradient, even where its logits are NaN.
    gradient_jit(
        row_ptr, d_logits_ptr + token * stride_d_logits_s, target, label, V, g, h,
        tl.load(peak_ptr + token), tl.load(log_total_ptr + token), tl.load(entropy_ptr + token),
        (g != 0) | (h != 0), label_ptr, 0.0, inverse_temperature, 1.0, False, HAS_ENTROPY, False,
        BLOCK,
    )  # fmt: skip


class Halves(NamedTuple):
    """An implementation: both on logits [S, V] and label [S].

    forward(logits, label, temperature) -> (logprob, entropy, peak, log_total), [S] each
    backward(logits, label, entropy, peak, log_total, g, h, temperature) -> d_logits [S, V]; g and
    h, the gradients with respect to logprob and entropy, are [S] or None

    The two halves of the log-sum-exp stay apart: their sum is rounded at the size of the logits,
    and that error would be in every probability of the row.
    """

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., Tensor]


def forward_triton(
    logits: Tensor, label: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = _side_by_side(logits)
    sums = tuple(
        torch.empty(len(label), dtype=torch.float32, device=logits.device) for _ in range(4)
    )
    block, warps = _triton.row_config(logits.shape[1], logits.dtype)
    if len(label):
        forward_kernel[(len(label),)](
            logits, label, *sums, logits.stride(0), logits.shape[1], 1 / temperature,
            BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return sums


def backward_triton(
    logits: Tensor,
    label: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    temperature: float,
) -> Tensor:
    logits = _side_by_side(logits)
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    block, warps = _triton.row_config(logits.shape[1], logits.dtype)
    upstream = (peak if x is None else x.contiguous() for x in (g, h))
    if len(label):
        backward_kernel[(len(label),)](
            logits, d_logits, label, entropy, peak, log_total, *upstream, logits.stride(0),
            d_logits.stride(0), logits.shape[1], 1 / temperature,
            HAS_G=g is not None, HAS_ENTROPY=h is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return d_logits


def _side_by_side(logits: Tensor) -> Tensor:
    """logits, copied where the columns of a row do not lie next to one another."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


# ---- C++ -----------------------------------------------------------------------------------------


def forward_cpp(
    logits: Tensor, label: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = _side_by_side(logits)
    target = _own_logit(logits, label)
    peak, total, moment = _cpp.statistics(logits, target, label, _head(logits, temperature))
    log_total = total.log()
    return target / temperature - peak - log_total, log_total - moment / total, peak, log_total


def backward_cpp(
    logits: Tensor,
    label: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    temperature: float,
) -> Tensor:
    logits = _side_by_side(logits)
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    g = torch.zeros_like(peak) if g is None else g
    # A token that nobody asks about has no gradient, even where its logits are NaN.
    asked = g != 0 if h is None else (g != 0) | (h != 0)
    target, head = _own_logit(logits, label), _head(logits, temperature)
    given = (target, label, head, peak, log_total, entropy, asked, g, h)
    _cpp.gradient(logits, *given, out=d_logits)
    return d_logits


def _own_logit(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(1, label.unsqueeze(1)).squeeze(1).float()


def _head(logits: Tensor, temperature: float) -> Head:
    """One whose options say what is done to logits that are there already."""
    return Head(logits, temperature=temperature)


# ---- torch ---------------------------------------------------------------------------------------


def forward_torch(
    logits: Tensor, label: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chunk by chunk: no second copy of the logits in fp32."""
    work = torch.promote_types(logits.dtype, torch.float32)
    logprob, entropy, peak, log_totals = (
        torch.empty(len(label), dtype=work, device=logits.device) for _ in range(4)
    )
    for part in _chunks(logits):
        scaled = logits[part].to(work) / temperature
        top = scaled.amax(1, keepdim=True)
        shifted = scaled.sub_(top)
        chosen = shifted.gather(1, label[part].unsqueeze(1)).squeeze(1)
        shifted.clamp_(min=FLOOR)
        probs = shifted.exp()
        total = row_sum(probs)
        log_total = total.log()
        logprob[part] = chosen - log_total
        entropy[part] = log_total - row_sum(probs.mul_(shifted)) / total
        peak[part], log_totals[part] = top.squeeze(1), log_total
    return logprob, entropy, peak, log_totals


def backward_torch(
    logits: Tensor,
    label: Tensor,
    entropy: Tensor,
    peak: Tensor,
    log_total: Tensor,
    g: Tensor | None,
    h: Tensor | None,
    temperature: float,
) -> Tensor:
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    for part in _chunks(logits):
        log_p = logits[part].to(peak.dtype) / temperature
        log_p = log_p.sub_(peak[part].unsqueeze(1)).sub_(log_total[part].unsqueeze(1))
        probs = log_p.clamp_(min=FLOOR).exp()
        idle = torch.ones_like(peak[part], dtype=torch.bool)
        slope = torch.zeros_like(peak[part]).unsqueeze(1)
        if g is not None:
            idle &= g[part] == 0
            slope = slope - g[part].unsqueeze(1)
        if h is not None:
            idle &= h[part] == 0
            slope = slope - h[part].unsqueeze(1) * log_p.add_(entropy[part].unsqueeze(1))
        probs.mul_(slope)
        if g is not None:
            probs.scatter_add_(1, label[part].unsqueeze(1), g[part].unsqueeze(1))
        # A token that nobody asks about has no gradient, even where its logits are NaN.
        probs.div_(temperature).masked_fill_(idle.unsqueeze(1), 0)
        d_logits[part] = probs
    return d_logits


def _chunks(logits: Tensor) -> list[slice]:
    """Slices of rows whose working copies fit _CHUNK_BYTES."""
    count, vocab = logits.shape
    size = max(_CHUNK_BYTES // (vocab * 8), 1)
    return [slice(i, min(i + size, count)) for i in range(0, count, size)]


_impl.register("logprobs", "triton", Halves(forward_triton, backward_triton), _triton.unavailable)
_impl.register("logprobs", "cpp", Halves(forward_cpp, backward_cpp), _cpp.unavailable)
_impl.register("logprobs", "torch", Halves(forward_torch, backward_torch))


# ---- operators, autograd -------------------------------------------------------------------------


@torch.library.custom_op(
    "metis_kernels::logprobs",
    mutates_args=(),
    schema="(Tensor logits, Tensor label, float temperature, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def logprobs_op(logits, label, temperature, impl):
    halves = _impl.implementation("logprobs", impl, logits.device, logits.dtype)
    return halves.forward(logits, label, temperature)


@logprobs_op.register_fake
def _(logits, label, temperature, impl):
    work = torch.promote_types(logits.dtype, torch.float32)
    return tuple(logits.new_empty(label.shape, dtype=work) for _ in range(4))


@torch.library.custom_op(
    "metis_kernels::logprobs_backward",
    mutates_args=(),
    schema="(Tensor logits, Tensor label, Tensor entropy, Tensor peak, Tensor log_total, "
    "Tensor? g, Tensor? h, float temperature, str impl) -> Tensor",
)
def logprobs_backward_op(logits, label, entropy, peak, log_total, g, h, temperature, impl):
    halves = _impl.implementation("logprobs", impl, logits.device, logits.dtype)
    return halves.backward(logits, label, entropy, peak, log_total, g, h, temperature)


@logprobs_backward_op.register_fake
def _(logits, *rest):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class LogProbs(torch.autograd.Function):
    """Keeps the logits, which exist anyway, and three numbers per token."""

    @staticmethod
    def forward(ctx, logits, label, temperature, impl):
        logprob, entropy, peak, log_total = logprobs_op(logits, label, temperature, impl)
        ctx.save_for_backward(logits, label, entropy, peak, log_total)
        ctx.options = temperature, impl
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_logprob, d_entropy):
        if d_logprob is None and d_entropy is None:
            return None, None, None, None
        given = (*ctx.saved_tensors, d_logprob, d_entropy, *ctx.options)
        return logprobs_backward_op(*given), None, None, None


def logprobs(
    logits: Tensor, label: Tensor, *, temperature: float = 1.0, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(logprob [...], entropy [...]) of label [...] under softmax(logits [..., V] / temperature).

    Floating logits of any layout; both outputs are fp32 (fp64 for fp64) and differentiable. A logit
    of -inf is a token that cannot be: probability 0, no entropy, no gradient. A row of NaN, or of
    nothing but -inf, gives NaN in its own outputs and in its own gradient, unless its upstream
    gradients are exactly 0: then 0.
    Raises ValueError where shapes, dtypes, devices or (on the CPU) the range of label disagree;
    RuntimeError where impl cannot run here.
    """
    if not logits.is_floating_point():
        raise ValueError(f"expected logits in a floating dtype, got {logits.dtype}")
    if logits.dim() < 1 or logits.shape[:-1] != label.shape or logits.shape[-1] == 0:
        raise ValueError(
            f"expected logits [..., V] and label [...], V >= 1, got {list(logits.shape)} and "
            f"{list(label.shape)}"
        )
    if label.dtype == torch.bool or label.is_floating_point():
        raise ValueError(f"expected label in an integer dtype, got {label.dtype}")
    if label.device != logits.device:
        raise ValueError(f"expected label on {logits.device} as logits are, got {label.device}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number > 0, got {temperature}")
    check_range("label", label, logits.shape[-1], "entries of the vocabulary")
    flat = logits.reshape(-1, logits.shape[-1])
    logprob, entropy = LogProbs.apply(flat, label.reshape(-1).long(), float(temperature), impl)
    return logprob.view(label.shape), entropy.view(label.shape)
