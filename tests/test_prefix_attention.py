"""prefix_attention.py: attention over groups that share a prefix."""

from __future__ import annotations

import logging

import pytest
import torch
from attention import (
    BITS16,
    BITS32,
    BITS64,
    LAYOUTS,
    RAGGED,
    assert_exact,
    assert_right,
    make,
    values,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch.utils.checkpoint import checkpoint

from metis_kernels import _impl, _triton, _varlen
from metis_kernels._layout import PrefixLayout
from metis_kernels.prefix_attention import (
    OPERATOR,
    attention_mask,
    merge_torch,
    merge_triton,
    shared_prefix_attention,
)

# ---- the definition ------------------------------------------------------------------------------


def test_the_mask_is_that_of_each_rollout():
    """By cutting the packed rows into rollouts and asking each who sees whom."""
    for layout in LAYOUTS.values():
        for window in (None, 1, 4):
            want = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
            start = 0
            for prefix, lengths in zip(layout.prefixes, layout.responses, strict=True):
                behind = start + prefix
                for n in lengths:
                    rollout = [*range(start, start + prefix), *range(behind, behind + n)]
                    for i, row in enumerate(rollout):
                        first = 0 if window is None else max(i - window + 1, 0)
                        want[row, rollout[first : i + 1]] = True
                    behind += n
                start = behind
            assert torch.equal(attention_mask(layout, window=window), want)
            if window is None:
                assert want.sum() == layout.pairs


# ---- what runs on this CPU -----------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_every_kind_of_layout(name, impl, poisoned_memory):
    layout = LAYOUTS[name]
    assert_exact(layout, *make(layout, BITS64), impl=impl)
    assert_right(layout, *make(layout), impl=impl)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [BITS32, BITS16, torch.float16])
@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_error_beside_torch(head_dim, dtype, impl):
    for peak in (1.0, 6.0):
        assert_right(RAGGED, *make(RAGGED, dtype, (8, 2), head_dim, peak=peak), impl=impl)


@pytest.mark.parametrize("dtype", [BITS32, BITS16])
@pytest.mark.parametrize("options", [{"window": 6}, {"softcap": 2.0}, {"window": 9, "softcap": 5}])
def test_window_and_softcap_dense(dtype, options):
    assert_right(RAGGED, *make(RAGGED, dtype), impl="dense", **options)
    assert_exact(RAGGED, *make(RAGGED, BITS64), impl="dense", **options)


def test_scale_and_heads():
    for heads in ((4, 4), (6, 1)):
        q, k, v, up = make(RAGGED, BITS64, heads)
        assert_exact(RAGGED, q, k, v, up, scale=0.5)


def test_a_window_past_every_rollout_is_none():
    made = make(RAGGED)
    longest = 37 + 11
    whole = values(shared_prefix_attention, *made, RAGGED, impl="torch")
    same = values(shared_prefix_attention, *made, RAGGED, impl="torch", window=longest)
    assert all(map(torch.equal, whole, same))
    with pytest.raises(RuntimeError, match="no sliding window"):
        shared_prefix_attention(*made[:3], RAGGED, impl="torch", window=longest - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 40), st.lists(st.integers(0, 24), min_size=1, max_size=5)),
        max_size=4,
    ),
    st.sampled_from([None, None, 1, 2, 7]),
    st.sampled_from([None, None, 3.0]),
)
def test_any_layout(groups, window, softcap):
    layout = PrefixLayout(tuple(p for p, _ in groups), tuple(tuple(r) for _, r in groups))
    options = dict(window=window, softcap=softcap)
    assert_exact(layout, *make(layout, BITS64, (4, 2), 8), **options)
    assert_right(layout, *make(layout, BITS32, (4, 2), 8), **options)


# ---- bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "dense"])
@pytest.mark.parametrize("dtype", [BITS32, BITS16])
def test_repeatable(impl, dtype):
    made = make(LAYOUTS["long"], dtype)
    first = values(shared_prefix_attention, *made, LAYOUTS["long"], impl=impl)
    for _ in range(10):
        again = values(shared_prefix_attention, *made, LAYOUTS["long"], impl=impl)
        assert all(map(torch.equal, first, again))


def one_by_one(made, layout, impl="auto"):
    """Each group by itself: the same rows again."""
    start, parts = 0, []
    for prefix, lengths in zip(layout.prefixes, layout.responses, strict=True):
        one = PrefixLayout((prefix,), (lengths,))
        rows = slice(start, start + one.tokens)
        start += one.tokens
        leaves = (x.detach()[rows].requires_grad_() for x in made[:3])
        parts.append(values(shared_prefix_attention, *leaves, made[3][rows], one, impl=impl))
    return [torch.cat(x) for x in zip(*parts, strict=True)]


@pytest.mark.parametrize("dtype", [BITS32, BITS64])
def test_a_group_alone_has_the_bits_that_it_has_in_a_batch(dtype):
    layout = PrefixLayout((300, 41, 0), ((270, 33), (30, 7, 64, 64), (5,)))
    made = make(layout, dtype, (8, 2), 64)
    whole = values(shared_prefix_attention, *made, layout)
    assert all(map(torch.equal, whole, one_by_one(made, layout)))


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_siblings_and_other_groups_are_not_seen(impl):
    """Changed tokens change their own response alone. NaN, too, where no mask is what hides it."""
    q, k, v, _ = (x.detach() for x in make(RAGGED))
    before = shared_prefix_attention(q, k, v, RAGGED, impl=impl)
    start = 37  # the first response of the first group
    for bad in (2.5,) if impl == "dense" else (2.5, float("nan")):
        spoiled = [x.clone() for x in (q, k, v)]
        for x in spoiled:
            x[start : start + 11] = bad
        after = shared_prefix_attention(*spoiled, RAGGED, impl=impl)
        changed = (before != after).flatten(1).any(1).nonzero().flatten()
        assert changed.tolist() == list(range(start, start + 11))


# ---- the merge -----------------------------------------------------------------------------------


def halves(count, heads=3, head_dim=8, dtype=BITS32, spread=4.0, device="cpu"):
    outs = torch.randn(2, count, heads, head_dim).to(device, dtype)
    return *outs, *(spread * torch.randn(2, heads, count)).to(device)


def merged_ref(out, other, lse, other_lse):
    """(out, lse) in float64, from the sums themselves."""
    a, b = (x.double().exp().t().unsqueeze(2) for x in (lse, other_lse))
    return (out * a + other * b) / (a + b), torch.log(a + b).squeeze(2).t()


@pytest.fixture(
    params=["torch", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)],
)
def merge(request):
    """-> (the function, the device of its tensors)"""
    if request.param == "torch":
        return merge_torch, "cpu"
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = "cuda" if request.param == "cuda" else "cpu"
    reason = _triton.unavailable(torch.device(device))
    if reason is not None:
        pytest.skip(reason)
    return merge_triton, device


@pytest.mark.parametrize("head_dim", [8, 64, 96, 256])
@pytest.mark.parametrize("dtype", [BITS32, BITS16, torch.float16])
@pytest.mark.parametrize("contiguous", [True, False])
def test_merging(head_dim, dtype, contiguous, merge):
    merge, device = merge
    total = 50
    out, _, lse, _ = halves(total, head_dim=head_dim, dtype=dtype, device=device)
    rows = slice(9, 42) if contiguous else torch.arange(2, total, 3, device=device)
    count = len(range(total)[rows]) if contiguous else len(rows)
    _, other, _, other_lse = halves(count, head_dim=head_dim, dtype=dtype, device=device)
    want, want_lse = out.double(), lse.double()
    want[rows], want_lse[:, rows] = merged_ref(out[rows], other, lse[:, rows], other_lse)
    merge(out, lse, rows, other, other_lse)
    assert_close(out, want, 1 if dtype != BITS32 else 8)
    assert_close(lse, want_lse, 8)
    rest = torch.ones(total, dtype=torch.bool, device=device)
    rest[rows] = False
    assert torch.equal(out[rest].double(), want[rest])
    assert torch.equal(lse[:, rest].double(), want_lse[:, rest])


def test_merging_outputs_that_lie_head_by_head(merge):
    merge, device = merge
    out, other, lse, other_lse = halves(21, device=device)
    want, want_lse = merged_ref(out, other, lse, other_lse)
    out, other = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (out, other))
    merge(out, lse, slice(0, 21), other, other_lse)
    assert_close(out, want, 8)
    assert_close(lse, want_lse, 8)


def test_merging_what_weighs_nothing_and_what_is_broken(merge):
    merge, device = merge
    out, other, lse, other_lse = halves(6, device=device)
    other_lse[:, 0], lse[:, 1], lse[:, 2], other_lse[:, 3] = -1e4, -float("inf"), 1e4, float("nan")
    mine, theirs = out.clone(), other.clone()
    merge(out, lse, slice(0, 6), other, other_lse)
    assert torch.equal(out[0], mine[0]) and torch.equal(out[1], theirs[1])
    assert torch.equal(out[2], mine[2]) and (lse[:, 2] == 1e4).all()
    assert out[3].isnan().all() and lse[:, 3].isnan().all()
    assert out[[0, 1, 2, 4, 5]].isfinite().all()


def test_the_operator_on_the_interpreted_merge(monkeypatch):
    reason = _triton.unavailable(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)

    def merge(attended, crossing, other):
        merge_triton(*attended[:2], crossing.response, *other[:2])

    monkeypatch.setattr("metis_kernels.prefix_attention._merge", merge)
    for name in ("ragged", "one group"):
        for dtype in (BITS32, BITS16):
            assert_right(LAYOUTS[name], *make(LAYOUTS[name], dtype), impl="torch")


# ---- callers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["torch", "dense"])
def test_strided_inputs(impl):
    made = make(RAGGED, BITS64)
    views = [x.detach().transpose(0, 1).contiguous()[None].transpose(1, 2)[0] for x in made[:3]]
    wide = [torch.stack([x.detach(), x.detach()], 3)[..., 1] for x in made[:3]]
    for leaves in (views, wide):
        leaves = [x.requires_grad_() for x in leaves]
        assert_exact(RAGGED, *leaves, made[3], impl=impl)
        ones = torch.ones(()).expand(made[3].shape)  # what .sum() sends back
        assert_exact(RAGGED, *leaves, ones, impl=impl)


def test_under_checkpoint_and_without_gradients():
    q, k, v, up = make(RAGGED)
    whole = values(shared_prefix_attention, q, k, v, up, RAGGED)

    def again(*x, use_reentrant):
        attend = lambda q, k, v: shared_prefix_attention(q, k, v, RAGGED)  # noqa: E731
        return checkpoint(attend, *x, use_reentrant=use_reentrant)

    for reentrant in (False, True):
        out = again(q, k, v, use_reentrant=reentrant)
        assert torch.equal(out, whole[0])
        for x in (q, k, v):
            x.grad = None
        out.backward(up)
        assert all(torch.equal(x.grad, g) for x, g in zip((q, k, v), whole[1:], strict=True))
    with torch.no_grad():
        assert torch.equal(shared_prefix_attention(q, k, v, RAGGED), whole[0])


def test_some_gradients_alone():
    q, k, v, up = make(RAGGED)
    _, _, want, _ = values(shared_prefix_attention, q, k, v, up, RAGGED)
    out = shared_prefix_attention(q.detach(), k, v.detach(), RAGGED)
    assert torch.equal(torch.autograd.grad(out, k, up)[0], want)


def test_under_compile():
    """One break, no trace of the layout: another layout compiles nothing anew."""
    graphs = []

    def counting(module, example):
        graphs.append(module)
        return module.forward

    @torch.compile(backend=counting, dynamic=True)
    def layer(q, k, v, layout):
        return shared_prefix_attention(q * 2, k, v, layout) + 1

    for name in ("ragged", "one group", "long"):
        made = make(LAYOUTS[name])
        got = values(layer, *made, LAYOUTS[name])
        want = values(lambda q, *x: shared_prefix_attention(q * 2, *x) + 1, *made, LAYOUTS[name])
        assert all(map(torch.equal, got, want))
    assert len(graphs) == 2


def test_under_autocast():
    q, k, v, _ = make(RAGGED)
    with torch.autocast("cpu", BITS16):
        out = shared_prefix_attention(q, k, v.to(BITS16), RAGGED)
    half = [x.to(BITS16) for x in (q, k, v)]
    assert out.dtype == BITS16 and torch.equal(out, shared_prefix_attention(*half, RAGGED))


def test_gradcheck():
    layout = PrefixLayout((3, 0), ((2, 2), (1,)))
    q, k, v, _ = make(layout, BITS64, (2, 1), 8, peak=1.0)
    for impl in ("torch", "dense"):
        attend = lambda *x: shared_prefix_attention(*x, layout, impl=impl)  # noqa: B023, E731
        assert torch.autograd.gradcheck(attend, (q, k, v))


# ---- what runs, and what is refused --------------------------------------------------------------


def test_auto_takes_what_can_run_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(_impl, "_announced", set())
    q, k, v, _ = make(RAGGED)
    with caplog.at_level(logging.INFO, "metis_kernels"):
        for options in ({}, {}, {"window": 5}, {"softcap": 2.0}):
            shared_prefix_attention(q, k, v, RAGGED, **options)
    said = [r.getMessage().removeprefix(f"{OPERATOR} on cpu: ") for r in caplog.records]
    assert said == ["impl=auto chose torch", "impl=auto chose dense"]


def test_reasons():
    def reason(impl, device="cpu", dtype=None, **options):
        return _impl.unavailable_reason(OPERATOR, impl, device, dtype, **options)

    assert reason("torch", dtype=BITS32) is reason("dense", "cuda", BITS64, softcap=1.0) is None
    assert "not on cpu" in reason("flash_attn")
    assert "no softcap" in reason("torch", softcap=1.0)
    assert "no sliding window" in reason("torch", window=3)
    assert "does not take torch.float8" in reason("torch", dtype=torch.float8_e4m3fn)
    limits = _varlen._flash_limits
    assert 'got torch.float32; cast, or take impl="dense"' in limits(BITS32, 64)
    assert "at most 256, got 320" in limits(BITS16, 320) and "got 100" in limits(BITS16, 100)
    assert limits(BITS16, 96) is limits(None, None) is None
    if not torch.cuda.is_available():
        for impl in ("flash_attn", "torch"):
            assert reason(impl, "cuda")


def test_errors_name_both_sides():
    q, k, v, _ = make(RAGGED)
    cases = [
        ((q[1:], k[1:], v[1:]), {}, "layout has 115 tokens but q, k and v have 114 rows"),
        ((q, k[:, :, :8], v[:, :, :8]), {}, r"same T and D.*got \[115, 8, 16\], \[115, 2, 8\]"),
        ((q[:, :7], k, v), {}, r"Hq a multiple of Hkv, got \[115, 7, 16\], \[115, 2, 16\]"),
        ((q, k, v[:, :1]), {}, r"v as k, got .*\[115, 1, 16\]"),
        ((q[None], k, v), {}, r"expected q \[T, Hq, D\]"),
        ((q[..., :0], k[..., :0], v[..., :0]), {}, r"expected q \[T, Hq, D\]"),
        ((q, k.half(), v), {}, "one dtype, got torch.float32, torch.float16, torch.float32"),
        ((q.long(), k.long(), v.long()), {}, "floating dtype, got torch.int64"),
        ((q, k.to("meta"), v), {}, "k and v on cpu as q is, got meta, cpu"),
        ((q, k, v), {"window": 0}, "window must be at least 1.*got 0"),
        ((q, k, v), {"softcap": -1.0}, "softcap must be a number > 0.*got -1.0"),
        ((q, k, v), {"impl": "triton"}, "impl must be one of .*'flash_attn', 'torch', 'dense'"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            shared_prefix_attention(*args, RAGGED, **options)
    with pytest.raises(
        RuntimeError, match='impl="flash_attn" cannot run on cpu: flash kernels run'
    ):
        shared_prefix_attention(q, k, v, RAGGED, impl="flash_attn")


# ---- on a GPU ------------------------------------------------------------------------------------


@pytest.fixture(params=["flash_attn", "torch", "dense"])
def on_gpu(request):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    reason = _impl.unavailable_reason(OPERATOR, request.param, "cuda", BITS16)
    if reason is not None:
        pytest.skip(reason)
    return request.param


GPU_LAYOUTS = [layout for layout in LAYOUTS.values() if layout.tokens]
GPU_LAYOUTS.append(PrefixLayout((700, 130), ((300, 129, 1), (64, 1, 500))))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [BITS16, torch.float16])
def test_error_beside_torch_on_a_gpu(head_dim, dtype, on_gpu):
    for layout in GPU_LAYOUTS:
        made = make(layout, dtype, (8, 2), head_dim, "cuda")
        for options in ({}, {"window": 1}, {"window": 40}, {"softcap": 5.0}):
            if options.get("softcap") and on_gpu == "torch":
                continue
            assert_right(layout, *made, impl=on_gpu, **options)


@pytest.mark.gpu
def test_bits_on_a_gpu(on_gpu):
    """Outputs in every batch; gradients from run to run, where torch is told to."""
    if on_gpu == "dense":
        pytest.skip("as torch's own attention under a mask: nothing is promised")
    layout = GPU_LAYOUTS[-1]
    made = make(layout, BITS16, (8, 2), 128, "cuda")
    whole = shared_prefix_attention(*made[:3], layout, impl=on_gpu)
    assert torch.equal(whole, one_by_one(made, layout, impl=on_gpu)[0])
    torch.use_deterministic_algorithms(True)
    try:
        first = values(shared_prefix_attention, *made, layout, impl=on_gpu)
        for _ in range(20):
            again = values(shared_prefix_attention, *made, layout, impl=on_gpu)
            assert all(map(torch.equal, first, again))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_single_precision_on_a_gpu_is_dense():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert_right(RAGGED, *make(RAGGED, BITS32, device="cuda"))
    assert _impl.resolve(OPERATOR, "auto", "cuda", BITS32, head_dim=16) == "dense"
