"""Attention over groups of rollouts that share a prefix, which is stored and attended once.

    | prefix g0 | r00 | r01 | r02 || prefix g1 | r10 | r11 ...

A token of a prefix sees its prefix causally; a token of a response sees its whole prefix, and its
own response causally. Two variable-length calls of a flash kernel compute that:

    1   every prefix and every response by itself, causal
    2   the responses of a group against the group's prefix, not causal

and each response row has two outputs, of disjoint keys, which its log-sum-exps (LSE) merge:

    lse = log(exp(lse_1) + exp(lse_2))      out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

A flash backward computes the probabilities anew as p = exp(score - lse), and the gradient of a
score as p (d_out . v - d_out . out): with the merged out and lse each call's own backward is
therefore exact, and what both give for a row is added. A layer with a sliding window is one call
instead, since a response sees another part of its prefix from row to row: each segment against the
end of its prefix (gathered, once a response) and itself.

Bits: everything here is repeatable, as far as the kernels are. On a CPU they are, and a group alone
has the bits that it has in a batch in float32 and float64. On CUDA a group's outputs do not depend
on the batch; gradients do, to rounding, and repeat only under
torch.use_deterministic_algorithms(True), as flash's d_q is summed by atomics otherwise.

Legend: T rows, Hq and Hkv heads, D columns of a head; R rows of responses that have a prefix;
a span is a sequence of a variable-length call.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from metis_kernels import _impl, _triton, _varlen
from metis_kernels._layout import PrefixLayout
from metis_kernels._triton import jit, tl
from metis_kernels._varlen import Attended, Call, Rows, Spans, Varlen

OPERATOR = "shared_prefix_attention"


def attention_mask(
    layout: PrefixLayout, *, window: int | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """[T, T] bool: whether the token of a row sees the token of a column. The definition."""
    group, segment, position = [], [], []
    for g, (prefix, lengths) in enumerate(zip(layout.prefixes, layout.responses, strict=True)):
        for s, (start, n) in enumerate([(0, prefix), *((prefix, n) for n in lengths)]):
            group += [g] * n
            segment += [s] * n
            position += range(start, start + n)
    group, segment, position = (torch.tensor(x, device=device) for x in (group, segment, position))
    seen = (group[:, None] == group) & ((segment[:, None] == segment) | (segment == 0))
    gap = position[:, None] - position
    return seen & (gap >= 0) & (gap < (window or layout.tokens + 1))


def shared_prefix_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The full [Hq, T, T] of scores, by autograd."""
    mask = attention_mask(layout, window=window, device=q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return _explicit(q.to(dtype), k.to(dtype), v.to(dtype), mask, scale, softcap)


# ---- which rows ----------------------------------------------------------------------------------


def _groups(layout: PrefixLayout) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """(first row, prefix, responses) of each group."""
    start = 0
    for prefix, lengths in zip(layout.prefixes, layout.responses, strict=True):
        yield start, prefix, lengths
        start += prefix + sum(lengths)


class Crossing(NamedTuple):
    """The second call."""

    response: Rows
    prefix: Rows
    spans: Spans


@lru_cache(maxsize=64)
def _crossing(layout: PrefixLayout, device: torch.device) -> Crossing | None:
    on = layout.on(device)
    spans = Spans(on.cu_response, on.cu_prefix, on.max_response, on.max_prefix)
    if len(on.cu_prefix) > 2:
        return Crossing(on.response_rows, on.prefix_rows, spans)
    for start, prefix, lengths in _groups(layout):
        if prefix and sum(lengths):
            middle = start + prefix
            return Crossing(slice(middle, middle + sum(lengths)), slice(start, middle), spans)
    return None


class Windowed(NamedTuple):
    """The one call of a layer with a window: K keys, among them every row once as its own
    segment's, and the end of a prefix once for each of its responses."""

    rows: Tensor
    """[K] int64: where the keys lie"""
    own: Tensor
    """[T] int64: where among the keys a row is its own segment's"""
    ends: list[tuple[slice, Tensor]]
    """Group by group: (rows [n] of a prefix's end, where among the keys [responses * n])"""
    spans: Spans


@lru_cache(maxsize=64)
def _windowed(layout: PrefixLayout, device: torch.device, window: int) -> Windowed:
    rows: list[int] = []
    own: list[int] = []
    ends: list[tuple[slice, Tensor]] = []
    keys: list[int] = []
    for start, prefix, lengths in _groups(layout):
        middle = start + prefix
        end = range(middle - min(prefix, window - 1), middle)
        copies: list[int] = []
        first = start
        for number, n in enumerate((prefix, *lengths)):
            if not n:
                continue
            ahead = end if number else ()
            copies += range(len(rows), len(rows) + len(ahead))
            rows += ahead
            own += range(len(rows), len(rows) + n)
            rows += range(first, first + n)
            keys.append(len(ahead) + n)
            first += n
        if copies:
            ends.append((slice(end.start, end.stop), torch.tensor(copies, device=device)))
    on = layout.on(device)
    cu_k = torch.tensor([0, *accumulate(keys)], dtype=torch.int32, device=device)
    indices = (torch.tensor(x, dtype=torch.int64, device=device) for x in (rows, own))
    spans = Spans(on.cu_segments, cu_k, on.max_segment, max(keys, default=0))
    return Windowed(*indices, ends, spans)


# ---- the merge -----------------------------------------------------------------------------------


@jit
def merge_kernel(
    # [T, Hq, D] and [Hq, T], both in place; [R, Hq, D] and [Hq, R]; [R]
    out_ptr, lse_ptr, other_ptr, other_lse_ptr, rows_ptr,
    stride_out_t, stride_out_h, stride_lse_h, stride_other_t, stride_other_h, stride_other_lse_h, R,
    D: tl.constexpr, HAS_ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of rows of one head: reads both outputs, writes one."""
    head = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = at < R
    row = at
    if HAS_ROWS:
        row = tl.load(rows_ptr + at, mask=inside, other=0)
    lse_ptrs = lse_ptr + head * stride_lse_h + row
    mine = tl.load(lse_ptrs, mask=inside, other=0.0)
    theirs = tl.load(other_lse_ptr + head * stride_other_lse_h + at, mask=inside, other=0.0)
    peak = tl.where(mine > theirs, mine, theirs)
    share, other_share = tl.exp(mine - peak), tl.exp(theirs - peak)
    total = share + other_share
    columns = tl.arange(0, BLOCK_D)
    fits = inside[:, None] & (columns < D)[None, :]
    out_ptrs = out_ptr + head * stride_out_h + row[:, None] * stride_out_t + columns[None, :]
    other_ptr += head * stride_other_h
    out = tl.load(out_ptrs, mask=fits, other=0.0).to(tl.float32)
    other = tl.load(
        other_ptr + at[:, None] * stride_other_t + columns[None, :], mask=fits, other=0.0
    )
    other = other.to(tl.float32) * (other_share / total)[:, None]
    # Said outright, so that both of HAS_ROWS round alike.
    out = tl.fma(out, (share / total)[:, None].broadcast_to(out.shape), other)
    tl.store(out_ptrs, out, mask=fits)
    tl.store(lse_ptrs, peak + tl.log(total), mask=inside)


MERGE_ELEMENTS, MERGE_WARPS = 2048, 4
"""Of a block: sixteen a thread, two 16-byte loads of each operand in bf16."""


def merge_block(head_dim: int) -> tuple[int, int]:
    """(rows, columns) of a block."""
    columns = max(16, 1 << (head_dim - 1).bit_length())
    return max(MERGE_ELEMENTS // columns, 1), columns


def merge_triton(out: Tensor, lse: Tensor, rows: Rows, other: Tensor, other_lse: Tensor) -> None:
    """In place: what lies at rows of out [T, Hq, D] and lse [Hq, T], with other [R, Hq, D] and its
    other_lse [Hq, R]. The last dimension of each lies side by side."""
    if isinstance(rows, slice):
        out, lse = out[rows], lse[:, rows]
    count, heads, head_dim = other.shape
    block_r, block_d = merge_block(head_dim)
    merge_kernel[(-(-count // block_r), heads)](
        out, lse, other, other_lse, None if isinstance(rows, slice) else rows,
        *out.stride()[:2], lse.stride(0), *other.stride()[:2], other_lse.stride(0), count,
        D=head_dim, HAS_ROWS=not isinstance(rows, slice), BLOCK_R=block_r, BLOCK_D=block_d,
        num_warps=MERGE_WARPS,
    )  # fmt: skip


def merge_torch(out: Tensor, lse: Tensor, rows: Rows, other: Tensor, other_lse: Tensor) -> None:
    """The same."""
    mine, theirs = lse[:, rows].contiguous(), other_lse.contiguous()
    peak = torch.maximum(mine, theirs)
    share, other_share = (mine - peak).exp_(), (theirs - peak).exp_()
    total = share + other_share
    # Not exp(lse - the new lse): what that is rounded to, at the size of scores, would be in out.
    share, other_share = (x.div_(total).t().unsqueeze(2) for x in (share, other_share))
    out[rows] = torch.addcmul(out[rows] * share, other.to(lse.dtype), other_share).to(out.dtype)
    lse[:, rows] = peak + total.log_()


def _merge(attended: Attended, crossing: Crossing, other: Attended) -> None:
    """The first call's result in place, with the second's."""
    out, lse = attended[:2]
    if out.is_cuda:
        fused = _triton.unavailable(out.device, out.dtype) is None
        merge = merge_triton if fused else merge_torch
        merge(out, lse, crossing.response, other.out, other.lse)
        return
    # Group by group: torch computes the last few numbers of a tensor with other instructions, so
    # that the bits of a row would depend on how many there are.
    cu = crossing.spans.cu_q.tolist()
    for start, stop in zip(cu, cu[1:], strict=False):
        part = slice(start, stop)
        rows = crossing.response[part] if len(cu) > 2 else crossing.response
        merge_torch(out, lse, rows, other.out[part], other.lse[:, part])


# ---- forward and backward on any implementation --------------------------------------------------


def _segments(layout: PrefixLayout, device: torch.device) -> Spans:
    on = layout.on(device)
    return Spans(on.cu_segments, on.cu_segments, on.max_segment, on.max_segment)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, call: Call, varlen: Varlen
) -> tuple[Attended, int]:
    """(everything at every row, `Attended.padded` of the second call)."""
    crossing = _crossing(layout, q.device)
    if crossing is None:
        return varlen.forward(q, k, v, _segments(layout, q.device), call), 0
    if call.window is not None:
        plan = _windowed(layout, q.device, call.window)
        return varlen.forward(q, k[plan.rows], v[plan.rows], plan.spans, call), 0
    whole = varlen.forward(q, k, v, _segments(layout, q.device), call)
    rows, prefix, spans = crossing
    across = call._replace(causal=False)
    other = varlen.forward(q[rows], k[prefix], v[prefix], spans, across)
    _merge(whole, crossing, other)
    return whole, other.padded


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, padded: int,
    layout: PrefixLayout, call: Call, varlen: Varlen,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    crossing = _crossing(layout, q.device)
    given = (d_out, q, k, v, attended)
    if crossing is None:
        return varlen.backward(*given, _segments(layout, q.device), call)
    if call.window is not None:
        plan = _windowed(layout, q.device, call.window)
        keys = (k[plan.rows], v[plan.rows])
        d_q, *d_keys = varlen.backward(d_out, q, *keys, attended, plan.spans, call)
        return d_q, *(_folded(d, plan) for d in d_keys)
    d_q, d_k, d_v = varlen.backward(*given, _segments(layout, q.device), call)
    rows, prefix, spans = crossing
    part = Attended(attended.out[rows], attended.lse[:, rows].contiguous(), padded)
    across = call._replace(causal=False)
    given = (d_out[rows], q[rows], k[prefix], v[prefix], part)
    more = varlen.backward(*given, spans, across)
    for total, where, extra in zip((d_q, d_k, d_v), (rows, prefix, prefix), more, strict=True):
        _add(total, where, extra)
    return d_q, d_k, d_v


def _add(total: Tensor, rows: Rows, extra: Tensor) -> None:
    """total[rows] += extra, without atomics."""
    if isinstance(rows, slice):
        total[rows] += extra
    else:
        total.index_copy_(0, rows, total.index_select(0, rows).add_(extra))


def _folded(d_keys: Tensor, plan: Windowed) -> Tensor:
    """[T, Hkv, D] from the gradients [K, Hkv, D] of the keys of a windowed call."""
    total = d_keys[plan.own]
    work = torch.promote_types(d_keys.dtype, torch.float32)
    for rows, copies in plan.ends:
        n = rows.stop - rows.start
        extra = d_keys[copies].unflatten(0, (-1, n)).sum(0, dtype=work)
        total[rows] = (total[rows] + extra).to(total.dtype)
    return total


class PrefixAttention(torch.autograd.Function):
    """Keeps q, k, v, the output and the LSE, as flash attention does."""

    @staticmethod
    def forward(ctx, q, k, v, layout, call, varlen):
        attended, padded = _forward(q, k, v, layout, call, varlen)
        ctx.save_for_backward(q, k, v, attended.out, attended.lse)
        ctx.given = attended.padded, padded, layout, call, varlen
        return attended.out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        whole, *given = ctx.given
        return *_backward(d_out, q, k, v, Attended(out, lse, whole), *given), None, None, None


# ---- dense ---------------------------------------------------------------------------------------


def dense(q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, call: Call) -> Tensor:
    """Group by group under a mask [n, n], by autograd. A NaN reaches all of its group: what a mask
    hides is multiplied with 0."""
    outs = []
    for start, prefix, lengths in _groups(layout):
        group = PrefixLayout((prefix,), (lengths,))
        if not group.tokens:
            continue
        rows = slice(start, start + group.tokens)
        mask = attention_mask(group, window=call.window, device=q.device)
        attend = _sdpa if call.softcap is None else _explicit
        outs.append(attend(q[rows], k[rows], v[rows], mask, call.scale, call.softcap))
    return torch.cat(outs)


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[Hq, n, D] of all three."""
    share = q.shape[1] // k.shape[1]
    return q.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(share, 0) for x in (k, v))


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: None) -> Tensor:
    heads = (x[None] for x in _heads_first(q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale)[0].transpose(0, 1)


def _explicit(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None
) -> Tensor:
    dtype, work = q.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = (x.to(work) for x in _heads_first(q, k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    probs = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return (probs @ v).transpose(0, 1).to(dtype)


# ---- the operator --------------------------------------------------------------------------------

_impl.declare(OPERATOR, ("flash_attn", "torch", "dense"))
_impl.register(
    OPERATOR,
    "flash_attn",
    lambda device: _varlen.FLASH_ATTN,
    _varlen.unavailable_flash_attn,
)
_impl.register(
    OPERATOR,
    "torch",
    lambda device: _varlen.ON_CPU if device.type == "cpu" else _varlen.ON_CUDA,
    _varlen.unavailable_torch,
)
_impl.register(OPERATOR, "dense", lambda device: None)


# torch.compile calls it as it stands: a layout is another one in every batch, so that a graph with
# it inside would be compiled anew each time. (torch.compiler.disable, but without importing the
# compiler, which takes as long as torch itself, along with this package.)
@torch._disable_dynamo
def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: PrefixLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """q [T, Hq, D], k and v [T, Hkv, D], rows as layout has them -> [T, Hq, D], differentiable.

    Query head h reads key head h // (Hq / Hkv). scale: 1 / sqrt(D) unless told. window w: a token
    sees the keys at most w - 1 positions ahead of it, counted along prefix and response. softcap c:
    a score s becomes c tanh(s / c).
    impl: "flash_attn" (the package, 2.6 or newer; CUDA, half precision), "torch" (torch's own flash
    kernels; on CUDA in half precision and without softcap, on a CPU in every dtype but with neither
    window nor softcap), "dense" (everything; a mask [n, n] for each group of n rows), or "auto":
    the first of them that can run. Under autocast q, k, v are cast as by torch's own attention.
    torch.compile leaves it as it is (a break in the graph).
    Raises ValueError where shapes, dtypes, devices and layout disagree; RuntimeError where impl
    cannot run here.
    """
    _check(q, k, v, layout, window, softcap)
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        wanted = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x.to(wanted) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"expected q, k and v in one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if window is not None and window >= _longest_rollout(layout):
        window = None
    scale = q.shape[2] ** -0.5 if scale is None else float(scale)
    given = dict(head_dim=q.shape[2], window=window, softcap=softcap)
    varlen = _impl.implementation(OPERATOR, impl, q.device, q.dtype, **given)(q.device)
    if not layout.tokens:
        return q * (k.sum() + v.sum())  # nothing, but with a gradient for each
    call = Call(True, scale, window, softcap)
    if varlen is None:
        return dense(q, k, v, layout, call)
    return PrefixAttention.apply(q, k, v, layout, call, varlen)


def _longest_rollout(layout: PrefixLayout) -> int:
    groups = zip(layout.prefixes, layout.responses, strict=True)
    return max((prefix + max(lengths) for prefix, lengths in groups), default=0)


def _check(
    q: Tensor, k: Tensor, v: Tensor, layout: PrefixLayout, window: int | None, softcap: float | None
) -> None:
    shapes = f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or 0 in q.shape[1:] + k.shape[1:]:
        raise ValueError(f"expected q [T, Hq, D], k [T, Hkv, D] and v as k, got {shapes}")
    if q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"expected q and k with the same T and D and Hq a multiple of Hkv, got {shapes}"
        )
    if layout.tokens != len(q):
        raise ValueError(f"the layout has {layout.tokens} tokens but q, k and v have {len(q)} rows")
    if not q.is_floating_point():
        raise ValueError(f"expected q, k and v in a floating dtype, got {q.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"expected k and v on {q.device} as q is, got {k.device}, {v.device}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be a number > 0, or None for none, got {softcap}")
