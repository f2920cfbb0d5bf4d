"""logprobs.py: logprob and entropy of logits that exist already."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from tolerance import FORWARD, GRADIENT, assert_as_good_as_torch, assert_close

from metis_kernels import logprobs
from metis_kernels.logprobs import logprobs_ref

BITS32, BITS16 = torch.float32, torch.bfloat16


def peaked(shape, dtype=BITS32, device="cpu"):
    logits = torch.randn(shape)
    if shape[-1] > 1:
        logits[..., -1] += 12 * (torch.rand(shape[:-1]) < 0.5)
    label = torch.randint(0, shape[-1], shape[:-1])
    label.flatten()[::2] = shape[-1] - 1
    return logits.to(device, dtype).requires_grad_(), label.to(device)


@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 1), (33, 127), (3, 4, 50), (2, 50257)])
@pytest.mark.parametrize("dtype", [BITS32, BITS16, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_outputs_and_gradients(shape, dtype, temperature, device, poisoned_memory):
    logits, label = peaked(shape, dtype, device)
    mine = logprobs(logits, label, temperature=temperature)
    plain, exact = (
        logprobs_ref(logits, label, temperature=temperature, dtype=d)
        for d in (torch.promote_types(dtype, BITS32), torch.float64)
    )
    ups = [torch.randn(shape[:-1], device=device) for _ in mine]
    assert (mine[0] <= 0).all()

    def grad(outputs):
        scaled = [u.to(o) for u, o in zip(ups, outputs, strict=True)]
        return torch.autograd.grad(outputs, logits, scaled)[0]

    for three in zip(mine, plain, exact, strict=True):
        assert_as_good_as_torch(*three, FORWARD)
    assert_as_good_as_torch(grad(mine), grad(plain), grad(exact), GRADIENT)


def test_many_chunks_equal_one(monkeypatch):
    logits, label = peaked((100, 50))
    whole = logprobs(logits, label)
    module = import_module("metis_kernels.logprobs")  # the package's name is the function's
    monkeypatch.setattr(module, "_CHUNK_BYTES", 50 * 8 * 7)
    assert len(module._chunks(logits)) == 15
    parts = logprobs(logits, label)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a, b)
    both = [
        torch.autograd.grad(x[0].sum() + x[1].square().sum(), logits)[0] for x in (whole, parts)
    ]
    assert torch.equal(*both)


def test_impossible_tokens(device):
    logits, label = peaked((20, 30), device=device)
    with torch.no_grad():
        logits[:, 3:17] = -math.inf
    label[:] = torch.randint(17, 30, (20,))
    lp, en = logprobs(logits, label)
    rest = torch.cat([logits[:, :3], logits[:, 17:]], 1)
    exact = logprobs_ref(rest, label - 14)
    assert_close(lp, exact[0])
    assert_close(en, exact[1])
    up = torch.randn(20, device=device)
    (g,) = torch.autograd.grad((lp * up + en * up.flip(0)).sum(), logits)
    (want,) = torch.autograd.grad((exact[0] * up + exact[1] * up.flip(0)).sum(), logits)
    assert not g[:, 3:17].any()
    assert_close(g, want)


def test_an_impossible_label_is_minus_infinity_with_a_finite_gradient():
    logits = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    lp, en = logprobs(logits, torch.tensor([1]))
    assert lp == -math.inf and en.isfinite().all()
    lp.sum().backward()
    assert_close(logits.grad, torch.tensor([[0, 1, 0]]) - torch.softmax(logits.detach(), -1))


@pytest.mark.parametrize("bad", [float("nan"), math.inf, -math.inf])
def test_a_broken_row_stays_in_its_row(bad):
    logits, label = peaked((9, 13))
    clean = logprobs(logits, label)
    spoiled = logits.detach().clone()
    spoiled[4] = bad
    spoiled.requires_grad_()
    lp, en = logprobs(spoiled, label)
    keep = [0, 1, 2, 3, 5, 6, 7, 8]
    assert lp[4].isnan() and en[4].isnan()
    assert torch.equal(lp[keep], clean[0][keep]) and torch.equal(en[keep], clean[1][keep])
    (g,) = torch.autograd.grad(lp.sum() + en.sum(), spoiled, retain_graph=True)
    (want,) = torch.autograd.grad(clean[0].sum() + clean[1].sum(), logits)
    assert torch.equal(g[keep], want[keep]) and g[4].isnan().any()
    # Nobody asks about the broken token: no gradient for it.
    (g,) = torch.autograd.grad(lp[keep].sum() + en[keep].sum(), spoiled)
    assert torch.equal(g[keep], want[keep]) and not g[4].any()


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_all_far_below_or_above_zero(shift):
    logits, label = peaked((9, 13), torch.float64)
    a, b = logprobs(logits, label), logprobs(logits + shift, label)
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, atol=1e-9)


def test_strided_and_expanded():
    logits, label = peaked((9, 13))
    exact = logprobs_ref(logits, label)[0]
    (want,) = torch.autograd.grad(exact.sum(), logits)
    plain = logits.detach()
    for view in (plain.t().contiguous().t(), torch.stack([plain, plain], 2)[..., 1]):
        view = view.requires_grad_()
        lp, _ = logprobs(view, label)
        assert_close(lp, exact)
        assert_close(torch.autograd.grad(lp.sum(), view)[0], want)
    one = logits.detach()[:1].requires_grad_()
    lp, _ = logprobs(one.expand(9, -1), label)
    exact = logprobs_ref(one.expand(9, -1), label)[0]
    assert_close(*(torch.autograd.grad(x.sum(), one)[0] for x in (lp, exact)))


def test_a_row_alone_equals_the_row_in_a_batch(device):
    for vocab in (127, 50257):
        logits, label = peaked((5, vocab), device=device)
        whole = logprobs(logits, label)
        for i in range(5):
            alone = logprobs(logits[i : i + 1], label[i : i + 1])
            assert all(torch.equal(a, b[i : i + 1]) for a, b in zip(alone, whole, strict=True))


def test_gradcheck():
    logits, label = peaked((4, 6), torch.float64)
    assert torch.autograd.gradcheck(lambda x: logprobs(x, label, temperature=0.8), logits)


def test_errors_name_both_sides():
    logits, label = peaked((4, 6))
    cases = [
        ((logits, label[:2]), {}, r"got \[4, 6\] and \[2\]"),
        ((logits, label + 6), {}, r"label in \[0, 6\)"),
        ((logits, label.float()), {}, "label in an integer dtype, got torch.float32"),
        ((logits.long(), label), {}, "logits in a floating dtype, got torch.int64"),
        ((logits, label), {"temperature": -1.0}, "temperature must be .* got -1.0"),
        ((torch.zeros(4, 0), label), {}, "V >= 1"),
        ((logits, label.to("meta")), {}, "label on cpu.*got meta"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            logprobs(*args, **options)
