"""linear_logprobs.py: logprob, entropy and cross-entropy of a head against dense float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import (
    FORWARD,
    GRADIENT,
    assert_as_good_as_torch,
    assert_close,
    error,
    make_head,
)

from metis_kernels import linear_cross_entropy, linear_logprobs
from metis_kernels.linear_logprobs import linear_logprobs_ref

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 6.0},
    "both": {"temperature": 1.3, "softcap": 6.0},
}
BITS32, BITS16 = torch.float32, torch.bfloat16


def labels(count, vocab, device="cpu"):
    label = torch.randint(0, vocab, (count,))
    label[::2] = vocab - 1
    return label.to(device)


def upstreams(count, device="cpu"):
    return [torch.randn(count).to(device) for _ in range(2)]


def grads(outputs, inputs, ups):
    return torch.autograd.grad(
        outputs,
        [x for x in inputs if x is not None],
        [u.to(o) for u, o in zip(ups, outputs, strict=True)],
    )


@pytest.mark.parametrize(
    "dtype, wide, name",
    [
        *((BITS32, None, name) for name in OPTIONS),
        *((BITS16, wide, name) for wide in (None, BITS32) for name in ("plain", "both")),
    ],
)
def test_outputs_and_both_gradients(dtype, wide, name, device, poisoned_memory):
    h, w, b = make_head(64, 48, 127, dtype, device, bias=True)
    row = torch.randint(0, 64, (150,), device=device)
    label, ups = labels(150, 127, device), upstreams(150, device)
    mine = linear_logprobs(
        h, w, label, row, bias=b, logits_dtype=wide, chunk_bytes=50_000, **OPTIONS[name]
    )
    plain, exact = (
        linear_logprobs_ref(h, w, label, row, bias=b, dtype=d, **OPTIONS[name])
        for d in (dtype, torch.float64)
    )
    assert (mine[0] <= 0).all() and mine[0].dtype == torch.float32
    for three in zip(mine, plain, exact, strict=True):
        assert_as_good_as_torch(*three, FORWARD)
    for three in zip(*(grads(o, (h, w, b), ups) for o in (mine, plain, exact)), strict=True):
        assert_as_good_as_torch(*three, GRADIENT)


@pytest.mark.parametrize("vocab, hidden", [(1, 3), (7, 1), (127, 9), (50257, 16), (151936, 4)])
def test_odd_vocabularies(vocab, hidden, device, poisoned_memory):
    tokens = 19 if vocab < 100_000 else 6  # the interpreter takes seconds a token
    h, w, _ = make_head(tokens, hidden, vocab, device=device)
    label, ups = labels(tokens, vocab, device), upstreams(tokens, device)
    mine = linear_logprobs(h, w, label)
    plain, exact = (linear_logprobs_ref(h, w, label, dtype=d) for d in (BITS32, torch.float64))
    assert (mine[0] <= 0).all() and (mine[1] >= -1e-5).all()
    for three in zip(mine, plain, exact, strict=True):
        assert_as_good_as_torch(*three, FORWARD)
    for three in zip(*(grads(o, (h, w), ups) for o in (mine, plain, exact)), strict=True):
        assert_as_good_as_torch(*three, GRADIENT)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone(which):
    h, w, _ = make_head(20, 16, 33)
    label = labels(20, 33)
    mine, exact = linear_logprobs(h, w, label), linear_logprobs_ref(h, w, label)
    for a, b in zip(
        torch.autograd.grad(mine[which].square().sum(), (h, w)),
        torch.autograd.grad(exact[which].square().sum(), (h, w)),
        strict=True,
    ):
        assert_close(a, b)


def test_gradcheck():
    h, w, b = make_head(4, 3, 6, torch.float64, bias=True, peak=1.0)
    row, label = torch.tensor([0, 0, 3, 1, 2]), labels(5, 6)
    assert torch.autograd.gradcheck(
        lambda *x: linear_logprobs(x[0], x[1], label, row, bias=x[2], softcap=3.0), (h, w, b)
    )


def test_batched_form():
    h, w, _ = make_head(12, 8, 15)
    label = labels(12, 15)
    flat = linear_logprobs(h, w, label)
    grid = linear_logprobs(h.view(3, 4, 8), w, label.view(3, 4))
    for a, b in zip(flat, grid, strict=True):
        assert b.shape == (3, 4) and torch.equal(a, b.flatten())


def test_frozen_weight_gets_no_gradient_and_no_grad_saves_nothing():
    h, w, _ = make_head(12, 8, 15)
    w = w.detach()
    out, _ = linear_logprobs(h, w, labels(12, 15))
    assert out.requires_grad
    out.sum().backward()
    assert w.grad is None and h.grad is not None
    with torch.no_grad():
        assert linear_logprobs(h, w, labels(12, 15))[0].grad_fn is None


def test_nothing(device):
    h, w, _ = make_head(4, 8, 15, device=device)
    none = torch.zeros(0, dtype=torch.long, device=device)
    lp, en = linear_logprobs(h, w, none, none)
    (lp.sum() + en.sum() + linear_cross_entropy(h, w, none, none)).backward()
    assert lp.shape == (0,) and not h.grad.any() and not w.grad.any()


def test_a_non_finite_row_passes_no_gradient_on():
    h, w, _ = make_head(12, 8, 15)
    label, ups = labels(12, 15), upstreams(12)
    spoiled = h.detach().clone()
    spoiled[5] = float("nan")
    spoiled.requires_grad_()
    keep = torch.tensor([i for i in range(12) if i != 5])
    mine = linear_logprobs(spoiled, w, label)
    assert mine[0][5].isnan() and mine[0][keep].isfinite().all()
    exact = linear_logprobs_ref(h, w, label[keep], keep)
    for a, b in zip(
        grads(mine, (spoiled, w), ups), grads(exact, (h, w), [u[keep] for u in ups]), strict=True
    ):
        assert_close(a, b)


def test_a_non_finite_upstream_is_not_hidden():
    h, w, _ = make_head(12, 8, 15)
    lp, _ = linear_logprobs(h, w, labels(12, 15))
    (lp.sum() * float("nan")).backward()
    assert h.grad.isnan().all() and w.grad.isnan().all()


@pytest.mark.parametrize("dtype", [BITS32, BITS16])
@pytest.mark.parametrize("name", ["plain", "both"])
def test_cross_entropy(dtype, name, device, poisoned_memory):
    h, w, b = make_head(64, 48, 127, dtype, device, bias=True)
    label = labels(64, 127, device)
    label[3:9] = -100
    keep = (label != -100).nonzero().flatten()
    loss = linear_cross_entropy(h, w, label, bias=b, chunk_bytes=50_000, **OPTIONS[name])

    def dense(d):
        lp, _ = linear_logprobs_ref(h, w, label[keep], keep, bias=b, dtype=d, **OPTIONS[name])
        return -lp.mean()

    plain, exact = dense(dtype), dense(torch.float64)
    assert error(loss, exact) <= 2 * error(plain, exact) + 1e-5 * float(exact.detach())
    up = [torch.tensor(-2.5)]
    for three in zip(*(grads([x], (h, w, b), up) for x in (loss, plain, exact)), strict=True):
        assert_as_good_as_torch(*three, GRADIENT)


def test_cross_entropy_equals_torch():
    h, w, _ = make_head(30, 16, 33)
    label = labels(30, 33)
    label[::4] = -100
    mine = linear_cross_entropy(h, w, label)
    theirs = torch.nn.functional.cross_entropy(h @ w.t(), label)
    assert_close(mine, theirs)
    for a, b in zip(*(torch.autograd.grad(x, (h, w)) for x in (mine, theirs)), strict=True):
        assert_close(a, b)


def test_cross_entropy_split_with_one_count_equals_the_whole():
    h, w, _ = make_head(30, 16, 33)
    label = labels(30, 33)
    whole = linear_cross_entropy(h, w, label, n=torch.tensor(30))
    parts = sum(
        linear_cross_entropy(h, w, label[i], torch.arange(30)[i], n=30)
        for i in (slice(0, 7), slice(7, 30))
    )
    assert_close(parts, whole)
    for a, b in zip(*(torch.autograd.grad(x, (h, w)) for x in (parts, whole)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("n", [0, torch.tensor(0)])
def test_cross_entropy_of_no_tokens_is_exactly_zero(n):
    h, w, _ = make_head(5, 8, 15)
    for label, count in ((labels(5, 15), n), (torch.full((5,), -100), None)):
        loss = linear_cross_entropy(h, w, label, n=count)
        assert loss == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, (h, w)))


def test_an_ignored_row_is_never_read():
    h, w, _ = make_head(12, 8, 15)
    label = labels(12, 15)
    label[4] = -100
    spoiled = h.detach().clone()
    spoiled[4] = float("nan")
    spoiled.requires_grad_()
    a, b = linear_cross_entropy(h, w, label), linear_cross_entropy(spoiled, w, label)
    assert torch.equal(a, b)
    for x, y in zip(
        torch.autograd.grad(a, (h, w)), torch.autograd.grad(b, (spoiled, w)), strict=True
    ):
        assert torch.equal(x, y)


def test_cross_entropy_does_not_hide_a_non_finite_row():
    h, w, _ = make_head(12, 8, 15)
    spoiled = h.detach().clone()
    spoiled[4] = float("nan")
    assert linear_cross_entropy(spoiled, w, labels(12, 15)).isnan()


def test_errors_name_both_sides():
    h, w, _ = make_head(12, 8, 15)
    label = labels(12, 15)
    cases = [
        ((h, w, label[:5]), {}, r"label \[12\].*got \[5\]"),
        ((h, w, label, label[:5]), {}, r"row \[12\] as label is, got \[5\]"),
        ((h, w, label + 1), {}, r"label in \[0, 15\).*to 15"),
        ((h, w[:, :5], label), {}, r"got \[12, 8\] and \[15, 5\]"),
        ((h, w, label), {"temperature": 0.0}, "temperature must be .* > 0, got 0.0"),
        ((h, w, label), {"softcap": -1.0}, "softcap must be .* got -1.0"),
        ((h, w, label), {"logits_dtype": BITS16}, "logits_dtype must be"),
        ((h, w, label.view(3, 4)), {}, r"label \[S\], got \[3, 4\]"),
    ]
    for op in (linear_logprobs, linear_cross_entropy):
        for args, options, message in cases:
            with pytest.raises(ValueError, match=message):
                op(*args, **options)
    for n, message in ((-1, "n must be"), (torch.ones(2), r"n 0-d, got \[2\]")):
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(h, w, label, n=n)
    with pytest.raises(ValueError, match="got -100"):
        linear_logprobs(h, w, torch.full((12,), -100))
