"""Inputs of attention over shared prefixes, and when its results count as right."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tolerance import FORWARD, GRADIENT, assert_as_good_as_torch, error

from metis_kernels._layout import PrefixLayout
from metis_kernels.prefix_attention import (
    attention_mask,
    shared_prefix_attention,
    shared_prefix_attention_ref,
)

BITS64, BITS32, BITS16 = torch.float64, torch.float32, torch.bfloat16
RAGGED = PrefixLayout((37, 0, 20, 5), ((11, 0, 3), (7,), (0,), (4, 27, 1)))
LAYOUTS = {
    "ragged": RAGGED,
    "one group": PrefixLayout((21,), ((5, 9, 1),)),
    "a group behind another": PrefixLayout((0, 21), ((6, 2), (5, 9))),
    "plain packing": PrefixLayout((0, 0), ((6, 2), (300,))),
    "prefixes alone": PrefixLayout((6, 3), ((0,), (0, 0))),
    "single tokens": PrefixLayout((1, 1), ((1, 1), (1,))),
    "long": PrefixLayout((300, 10), ((270, 8), (40,))),
    "nothing": PrefixLayout((), ()),
    "empty groups": PrefixLayout((0, 0), ((0,), (0, 0))),
}


def make(layout, dtype=BITS32, heads=(8, 2), head_dim=16, device="cpu", peak=3.0):
    """(q, k, v, upstream); the larger peak is, the nearer a row's attention is to one key."""
    q = peak * torch.randn(layout.tokens, heads[0], head_dim)
    k, v = torch.randn(2, layout.tokens, heads[1], head_dim)
    up = torch.randn_like(q)
    q, k, v = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
    return q, k, v, up.to(device)


def plain(q, k, v, layout, window=None, softcap=None):
    """torch's own attention under the dense mask, in the dtype of q."""
    mask = attention_mask(layout, window=window, device=q.device)
    share = q.shape[1] // k.shape[1]
    q, k, v = q.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(share, 0) for x in (k, v))
    if softcap is None:
        heads = (x[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask)[0].transpose(0, 1)
    scores = softcap * torch.tanh(q @ k.mT * q.shape[2] ** -0.5 / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1, dtype=BITS32).to(q.dtype) @ v).transpose(0, 1)


def values(attend, q, k, v, up, *given, **options):
    """(out, d_q, d_k, d_v)"""
    out = attend(q, k, v, *given, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), up.to(out.dtype))


def assert_right(layout, *made, impl="auto", **options):
    got = values(shared_prefix_attention, *made, layout, impl=impl, **options)
    other = values(plain, *made, layout, **options)
    exact = values(shared_prefix_attention_ref, *made, layout, **options)
    for name, *three in zip(("out", "d_q", "d_k", "d_v"), got, other, exact, strict=True):
        if layout.tokens and three[2].abs().max() < 1e-12:  # d_q where every row sees one key
            largest = max(float(x.abs().max()) for x in exact)
            bound = 8 * torch.finfo(made[0].dtype).eps * largest
            assert three[0].abs().max() <= max(bound, GRADIENT * float(three[1].abs().max()))
            continue
        factor = FORWARD if name == "out" else GRADIENT
        assert_as_good_as_torch(*three, factor, f"{name} {options}")


def assert_exact(layout, *made, **options):
    """In float64, so that nothing but the right pairs of rows will do."""
    got = values(shared_prefix_attention, *made, layout, **options)
    options.pop("impl", None)
    want = values(shared_prefix_attention_ref, *made, layout, **options)
    largest = max((float(x.abs().max()) for x in want if x.numel()), default=0.0)
    for name, a, b in zip(("out", "d_q", "d_k", "d_v"), got, want, strict=True):
        assert error(a, b) <= 1e-13 * largest, name
