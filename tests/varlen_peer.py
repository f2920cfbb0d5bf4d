"""Variable-length attention in plain torch behind the signatures of the CUDA kernels, so that the
code around those runs here. It checks what a kernel would silently misread."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import Tensor


def _spans(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int):
    for cu, longest in ((cu_q, max_q), (cu_k, max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous() and cu[0] == 0
        assert (cu.diff() > 0).all() and cu.diff().max() <= longest
    assert len(cu_q) == len(cu_k)
    for i in range(len(cu_q) - 1):
        yield slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())


def _scores(q, k, causal, scale, left, right, softcap):
    """Raw scores [Hq, n, m] and, of those that are seen, what the softmax sees (else -inf)."""
    raw = q.transpose(0, 1) @ k.transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0).mT
    raw = raw * scale
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    right = 0 if causal else right
    hidden = (behind < -right) if right >= 0 else torch.zeros_like(behind, dtype=torch.bool)
    if left >= 0:
        hidden |= behind > left
    return raw, capped.masked_fill(hidden, float("-inf"))


def _read(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0


def forward(q, k, v, cu_q, cu_k, max_q, max_k, *options):
    """-> out [Tq, Hq, D], lse [Hq, Tq]"""
    _read(q, k, v)
    assert max_q > 1, "the kernel for decoding"
    assert cu_q[-1] == len(q) and cu_k[-1] == len(k) == len(v)
    out, lse = torch.empty_like(q), q.new_full((q.shape[1], len(q)), float("nan"))
    for rows, keys in _spans(cu_q, cu_k, max_q, max_k):
        _, scores = _scores(q[rows], k[keys], *options)
        values = v[keys].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0)
        out[rows] = (scores.softmax(-1) @ values).transpose(0, 1)
        lse[:, rows] = scores.logsumexp(-1)
    return out, lse


def backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, *options):
    """From the out and lse that it is given, like the kernels, without a second softmax."""
    _read(d_out, q, k, v, out)
    assert lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
    d_q, d_k, d_v = (torch.full_like(x, float("nan")) for x in (q, k, v))
    share = q.shape[1] // k.shape[1]
    for rows, keys in _spans(cu_q, cu_k, max_q, max_k):
        raw, scores = _scores(q[rows], k[keys], *options)
        d, o, queries = (x[rows].transpose(0, 1) for x in (d_out, out, q))
        one, other = (x[keys].transpose(0, 1).repeat_interleave(share, 0) for x in (k, v))
        p = (scores - lse[:, rows, None]).exp()
        d_scores = p * (d @ other.mT - (d * o).sum(-1, keepdim=True)) * options[1]
        if options[-1]:
            d_scores = d_scores * (1 - torch.tanh(raw / options[-1]) ** 2)

        def summed(x):
            return x.unflatten(0, (-1, share)).sum(1).transpose(0, 1)

        d_q[rows] = (d_scores @ one).transpose(0, 1)
        d_k[keys], d_v[keys] = summed(d_scores.mT @ queries), summed(p.mT @ d)
    return d_q, d_k, d_v


# ---- torch.ops.aten ------------------------------------------------------------------------------


def in_aten(pad: int | None = None) -> torch.library.Library:
    """Registers the peer as torch's flash kernels for CPU tensors (its schemas are torch's), for as
    long as the result lives. pad: the LSE is [B, Hq, the longest + pad], as of older kernels."""

    def to_padded(lse, cu, max_q):
        held = lse.new_full((len(cu) - 1, len(lse), max_q + pad), float("nan"))
        for i, (a, b) in enumerate(zip(cu.tolist(), cu[1:].tolist(), strict=False)):
            held[i, :, : b - a] = lse[:, a:b]
        return held

    def attend(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None,
        window_size_left=None, window_size_right=None, **unused,
    ):  # fmt: skip
        assert (
            dropout_p == 0
            and not return_debug_mask
            and not any(x is not None for x in unused.values())
        )
        spans = (cu_q, cu_k, max_q, max_k)
        out, lse = forward(
            q, k, v, *spans, is_causal, scale, window_size_left, window_size_right, 0
        )
        if pad is not None:
            lse = to_padded(lse, cu_q, max_q)
        return out, lse, *(q.new_zeros(0) for _ in range(3))

    def gradient(
        d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, is_causal, rng_state, unused,
        *, scale=None, window_size_left=None, window_size_right=None,
    ):  # fmt: skip
        assert dropout_p == 0
        if pad is not None:
            assert lse.shape[2] == max_q + pad
            parts = zip(lse, cu_q.diff().tolist(), strict=True)
            lse = torch.cat([part[:, :n] for part, n in parts], 1)
        spans = (cu_q, cu_k, max_q, max_k)
        options = (is_causal, scale, window_size_left, window_size_right, 0)
        return backward(d_out, q, k, v, out, lse, *spans, *options)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", attend, "CPU")
    library.impl("_flash_attention_backward", gradient, "CPU")
    return library


# ---- the package flash_attn ----------------------------------------------------------------------


def as_flash_attn(monkeypatch, version: str) -> list[bool]:
    """Puts a package of that version in the place of flash_attn, with the signatures that it had
    -> a list to which each backward appends whether it was to be deterministic."""
    asked: list[bool] = []

    def forward_26(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size, softcap, alibi_slopes, return_softmax, block_table,
    ):  # fmt: skip
        assert dropout_p == 0 and alibi_slopes is block_table is None and not return_softmax
        spans = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        out, lse = forward(q, k, v, *spans, causal, softmax_scale, *window_size, softcap)
        return out, q, k, v, out, lse, None, None

    def backward_26(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        assert dropout_p == 0 and alibi_slopes is None
        asked.append(deterministic)
        spans = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        options = (causal, softmax_scale, *window_size, softcap)
        made = backward(dout, q, k, v, out, softmax_lse, *spans, *options)
        for held, value in zip((dq, dk, dv), made, strict=True):
            held.copy_(value)

    def forward_27(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        out, *_, lse, _, _ = forward_26(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
            softmax_scale, causal, (window_size_left, window_size_right), softcap, alibi_slopes,
            return_softmax, block_table,
        )  # fmt: skip
        return out, lse, None, None

    def backward_27(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        backward_26(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, dropout_p, softmax_scale, causal, (window_size_left, window_size_right),
            softcap, alibi_slopes, deterministic,
        )  # fmt: skip

    old = version.startswith("2.6")
    package, module = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.__version__ = version
    module._flash_attn_varlen_forward = forward_26 if old else forward_27
    module._flash_attn_varlen_backward = backward_26 if old else backward_27
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    return asked
