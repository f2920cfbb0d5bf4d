"""Attention over sequences of unequal length that lie one behind the other: the flash kernels that
are there, each behind the same two functions.

Forward returns the log-sum-exp (LSE) of each query's scores as well, and backward takes output and
LSE from whoever has them: from this call, or merged from several calls over disjoint keys.

Legend: Tq and Tk rows of queries and keys, Hq and Hkv heads, D columns of a head; a span is one of
the B sequences of a call. A leaf: it imports torch, and flash_attn where that is asked for.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rows = slice | Tensor
"""Of a tensor [T, ...]: a range, which is read where it lies, or indices [N] without repetition."""


class Spans(NamedTuple):
    """Which queries meet which keys in one call: the i-th span of queries the i-th of keys."""

    cu_q: Tensor
    """[B + 1] int32"""
    cu_k: Tensor
    max_q: int
    max_k: int


class Call(NamedTuple):
    """How they meet. Causal: aligned at the last query and key, and with a window, if any."""

    causal: bool
    scale: float
    window: int | None
    softcap: float | None

    @property
    def window_left(self) -> int:
        """Keys ahead of the aligned one, as flash counts them; -1: all."""
        return -1 if self.window is None else self.window - 1

    @property
    def window_right(self) -> int:
        return -1 if self.window is None else 0


class Attended(NamedTuple):
    out: Tensor
    """[Tq, Hq, D]"""
    lse: Tensor
    """[Hq, Tq] contiguous, fp32 (fp64 for fp64)"""
    padded: int
    """M where the kernel itself keeps the LSE as [B, Hq, M], else 0; its backward wants it so."""


class Varlen(NamedTuple):
    """An implementation of variable-length attention.

    forward(q [Tq, Hq, D], k [Tk, Hkv, D], v, spans, call) -> Attended
    backward(d_out, q, k, v, attended, spans, call) -> (d_q, d_k, d_v)
    """

    forward: Callable[[Tensor, Tensor, Tensor, Spans, Call], Attended]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


# ---- flash kernels on CUDA -----------------------------------------------------------------------

MAX_HEAD_DIM = 256
FLASH_DTYPES = (torch.float16, torch.bfloat16)


def _flash_limits(dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    if dtype is not None and dtype not in FLASH_DTYPES:
        return (
            f"flash kernels compute in float16 and bfloat16, got {dtype}; cast, or take "
            'impl="dense" and its mask of [n, n] for each group of n rows'
        )
    if head_dim is not None and (head_dim > MAX_HEAD_DIM or head_dim % 8):
        return (
            f"flash kernels take heads of a multiple of 8, at most {MAX_HEAD_DIM}, got {head_dim}"
        )
    return None


def _flash_device(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"flash kernels run on CUDA devices, not on {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash kernels need compute capability 8.0 (Ampere) or newer"
    return None


def _readable(x: Tensor) -> Tensor:
    """x as flash reads it, in pieces of 16 bytes along the last dimension; copied where need be."""
    apart = any(stride * x.element_size() % 16 for stride in x.stride()[:-1])
    if x.stride(-1) != 1 or apart or x.data_ptr() % 16:
        return x.clone(memory_format=torch.contiguous_format)
    return x


def _longest(spans: Spans) -> tuple[int, int]:
    """Bounds for flash. Of at least two queries: one alone takes a path that is made for decoding,
    whose LSE lies otherwise."""
    return max(spans.max_q, 2), spans.max_k


def _places(spans: Spans, count: int) -> tuple[Tensor, Tensor]:
    """(span, position in it) of each of count queries."""
    lengths = spans.cu_q.diff()
    span = torch.repeat_interleave(
        torch.arange(len(lengths), device=lengths.device), lengths, output_size=count
    )
    return span, torch.arange(count, device=lengths.device) - spans.cu_q[span]


def _attended(out: Tensor, lse: Tensor, spans: Spans) -> Attended:
    """From what a flash kernel returns: an LSE [Hq, Tq], or [B, Hq, M] from older ones."""
    if lse.dim() == 2:
        return Attended(out, lse, 0)
    span, position = _places(spans, len(out))
    return Attended(out, lse[span, :, position].t().contiguous(), lse.shape[2])


def _flash_lse(attended: Attended, spans: Spans) -> Tensor:
    """The way back."""
    if not attended.padded:
        return attended.lse
    span, position = _places(spans, attended.lse.shape[1])
    shape = (len(spans.cu_q) - 1, len(attended.lse), attended.padded)
    lse = attended.lse.new_zeros(shape)
    lse[span, :, position] = attended.lse.t()
    return lse


def forward_aten(q: Tensor, k: Tensor, v: Tensor, spans: Spans, call: Call) -> Attended:
    q, k, v = map(_readable, (q, k, v))
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, *spans[:2], *_longest(spans), 0.0, call.causal, False, **_aten_options(call)
    )
    return _attended(out, lse, spans)


def backward_aten(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, spans: Spans, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    read = map(_readable, (d_out, q, k, v, attended.out))
    # Of dropout, which there is none of.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
    return torch.ops.aten._flash_attention_backward(
        *read, _flash_lse(attended, spans), *spans[:2], *_longest(spans), 0.0, call.causal, *state,
        **_aten_options(call),
    )  # fmt: skip


def _aten_options(call: Call) -> dict[str, Any]:
    window = dict(window_size_left=call.window_left, window_size_right=call.window_right)
    return dict(scale=call.scale, **window)


def unavailable_flash_attn(
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    head_dim: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> str | None:
    return _flash_device(device) or _flash_attn()[2] or _flash_limits(dtype, head_dim)


@cache
def _flash_attn() -> tuple[Any, bool, str | None]:
    """(the module with flash-attn's kernels, whether it is older than 2.7, why there is none)."""
    try:
        version = importlib.import_module("flash_attn").__version__
        module = importlib.import_module("flash_attn.flash_attn_interface")
    except ModuleNotFoundError:
        return None, False, "flash_attn is not installed: pip install flash-attn"
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        return None, False, f"flash_attn does not load beside torch {torch.__version__}: {error}"
    major, minor = (int(n) for n in re.findall(r"\d+", version)[:2])
    if not (2, 6) <= (major, minor) < (3, 0):
        return None, False, f"flash_attn is {version}; its interface is known from 2.6 to 2.x"
    return module, (major, minor) < (2, 7), None


def _flash_attn_options(call: Call, old: bool) -> dict[str, Any]:
    options = dict(dropout_p=0.0, softmax_scale=call.scale, causal=call.causal, alibi_slopes=None)
    options |= dict(softcap=call.softcap or 0.0)
    if old:
        return options | dict(window_size=(call.window_left, call.window_right))
    return options | dict(window_size_left=call.window_left, window_size_right=call.window_right)


def forward_flash_attn(q: Tensor, k: Tensor, v: Tensor, spans: Spans, call: Call) -> Attended:
    module, old, _ = _flash_attn()
    q, k, v = (_readable(x.detach()) for x in (q, k, v))
    result = module._flash_attn_varlen_forward(
        q, k, v, *spans[:2], *_longest(spans), return_softmax=False, block_table=None,
        **_flash_attn_options(call, old),
    )  # fmt: skip
    # 2.6: (out, q, k, v, out_padded, lse, ...); then: (out, lse, ...).
    return _attended(result[0], result[5 if old else 1], spans)


def backward_flash_attn(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, spans: Spans, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    module, old, _ = _flash_attn()
    read = map(_readable, (d_out, q, k, v, attended.out))
    gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
    module._flash_attn_varlen_backward(
        *read, _flash_lse(attended, spans), *gradients, *spans[:2], *_longest(spans),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_flash_attn_options(call, old),
    )  # fmt: skip
    return gradients


# ---- torch's flash kernel on a CPU ---------------------------------------------------------------

_ALONE = 256
"""Segments that are longer make a call of their own, unpadded."""


def _padded(n: int) -> int:
    """n rounded up by less than an eighth, or to a multiple of 8. It depends on n alone, and so
    does how the kernel cuts a segment: the same bits in every batch."""
    step = max(8, 1 << max(n.bit_length() - 4, 0))
    return -(-n // step) * step


class Batch(NamedTuple):
    """Segments of one padded length L."""

    rows: Rows
    """[B, L]; past a segment's end its last row stands in, which no other row of it sees."""
    valid: Tensor | None
    """[B, L] bool; None: a range, all of it."""

    def take(self, x: Tensor) -> Tensor:
        """[B, H, L, D] from [T, H, D]"""
        return (x[self.rows][None] if self.valid is None else x[self.rows]).transpose(1, 2)

    def put(self, x: Tensor, values: Tensor) -> None:
        values = values.transpose(1, 2)
        if self.valid is None:
            x[self.rows] = values[0]
        else:
            x[self.rows[self.valid]] = values[self.valid]


@lru_cache(maxsize=64)
def _batches(cu: tuple[int, ...]) -> list[Batch]:
    """The segments that start and end at cu, each in one batch."""
    starts: dict[int, list[tuple[int, int]]] = {}
    made = []
    for start, stop in zip(cu, cu[1:], strict=False):
        if stop - start > _ALONE:
            made.append(Batch(slice(start, stop), None))
        elif stop > start:
            starts.setdefault(_padded(stop - start), []).append((start, stop))
    for length, members in starts.items():
        first, stop = torch.tensor(members).t().unsqueeze(2)
        rows = first + torch.arange(length)
        made.append(Batch(rows.clamp(max=stop - 1), rows < stop))
    return made


def _pairs(spans: Spans, causal: bool) -> Iterator[tuple[Batch, Batch]]:
    """(queries, keys) of each dense call. Causal spans meet themselves."""
    cu_q, cu_k = (tuple(cu.tolist()) for cu in spans[:2])
    if causal:
        yield from ((batch, batch) for batch in _batches(cu_q))
        return
    for i in range(len(cu_q) - 1):
        yield tuple(Batch(slice(cu[i], cu[i + 1]), None) for cu in (cu_q, cu_k))


def forward_cpu(q: Tensor, k: Tensor, v: Tensor, spans: Spans, call: Call) -> Attended:
    q, k, v = map(_side_by_side, (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    for queries, keys in _pairs(spans, call.causal):
        some = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries.take(q), keys.take(k), keys.take(v), 0.0, call.causal, scale=call.scale
        )
        queries.put(out, some[0])
        queries.put(lse, some[1])
    return Attended(out, lse.t().contiguous(), 0)


def backward_cpu(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attended: Attended, spans: Spans, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    d_out, q, k, v, out = map(_side_by_side, (d_out, q, k, v, attended.out))
    lse = attended.lse.t().contiguous()
    gradients = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for queries, keys in _pairs(spans, call.causal):
        upstream = queries.take(d_out)
        if queries.valid is not None:
            upstream = upstream * queries.valid[:, None, :, None]
        some = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            upstream, queries.take(q), keys.take(k), keys.take(v), queries.take(out),
            queries.take(lse), 0.0, call.causal, scale=call.scale,
        )  # fmt: skip
        for total, batch, values in zip(gradients, (queries, keys, keys), some, strict=True):
            batch.put(total, values)
    return gradients


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


CPU_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def unavailable_torch(
    device: torch.device,
    dtype: torch.dtype | None = None,
    *,
    head_dim: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> str | None:
    if softcap is not None:
        return "torch's flash kernels have no softcap"
    if device.type == "cpu":
        if window is not None:
            return "torch's flash kernel for CPUs has no sliding window"
        if dtype is not None and dtype not in CPU_DTYPES:
            return f"torch's flash kernel for CPUs does not take {dtype}"
        return None
    if device.type == "cuda" and not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    return _flash_device(device) or _flash_limits(dtype, head_dim)


FLASH_ATTN = Varlen(forward_flash_attn, backward_flash_attn)
ON_CUDA = Varlen(forward_aten, backward_aten)
ON_CPU = Varlen(forward_cpu, backward_cpu)
