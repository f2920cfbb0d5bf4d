"""_filter.py: what is lost with the columns that are left out, and when none may be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerance import CONFIGS, assert_close, grads, hdpo_problem, make_head, make_targets, near_old

from metis_kernels import HDPOConfig, _sweep, linear_hdpo_loss
from metis_kernels._filter import Columns, Verdict
from metis_kernels.linear_hdpo import linear_hdpo_ref


def relative(got, exact):
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def sharp(config, device, peak=16.0):
    """A policy that is sure of itself over 3001 columns: (hidden, weight, bias, targets)."""
    h, w, b = make_head(48, 64, 3001, device=device, peak=peak, bias=True)
    targets = make_targets(64, 48, 3001, device)
    with torch.no_grad():
        b *= 0.1
        every = replace(config, kl_coef=1.0, ratio="token")
        _, stats = linear_hdpo_ref(h, w, targets, every, bias=b)
    return h, w, b, near_old(targets, stats.logprob)


@pytest.mark.parametrize(
    "name, choice, chunk_bytes",
    [
        ("default", 2.4e-4, None),
        ("default", "auto", None),
        ("softcap", "auto", None),
        ("softcap", 2.4e-4, 1 << 20),
        ("sequence", 2.4e-4, 1 << 20),
    ],
)
def test_dropped_columns_cost_less_than_rounding_to_bf16(name, choice, chunk_bytes, device):
    config = replace(CONFIGS[name], softcap=CONFIGS[name].softcap and 60.0)
    h, w, b, targets = sharp(config, device)
    exact, _ = linear_hdpo_ref(h, w, targets, config, bias=b)
    options = dict(bias=b, chunk_bytes=chunk_bytes)
    loss, stats = linear_hdpo_loss(h, w, targets, config, grad_filter=choice, **options)
    plain, same = linear_hdpo_loss(h, w, targets, config, **options)
    assert torch.equal(loss, plain)
    assert torch.equal(stats.logprob.nan_to_num(1), same.logprob.nan_to_num(1))
    got, want = grads(loss, h, w, b), grads(exact, h, w, b)
    assert max(relative(x, y) for x, y in zip(got, want, strict=True)) < 2**-9
    assert torch.equal(got[2], grads(plain, b)[0]), "d_bias is exact"
    silent = (got[1] == 0).all(1).float().mean()
    assert silent > 0.9, "most columns must have been dropped for this to say anything"


def test_the_dropped_mass_goes_to_where_it_came_from(device, monkeypatch):
    h, w, b, targets = sharp(HDPOConfig(), device)
    with torch.no_grad():
        w += 2.0  # a mean row of the head along which dropped mass would be missed
    exact = grads(linear_hdpo_ref(h, w, targets, HDPOConfig(), bias=b)[0], h)[0]

    def loss_error():
        loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig(), bias=b, grad_filter=2.4e-4)
        return relative(grads(loss, h)[0], exact)

    corrected = loss_error()
    monkeypatch.setattr(Columns, "d_hidden", lambda self, d_logits, kept: kept @ self.head)
    assert corrected < 2**-9 and corrected < loss_error() / 4


def test_auto_refuses_a_loss_that_the_energy_does_not_show(device):
    """A tail whose mean under the policy is not its plain mean: d_hidden would lose 1 % while
    d(logits) lose a thousandth."""
    h, w, b, targets = sharp(HDPOConfig(), device, peak=11.0)
    exact = grads(linear_hdpo_ref(h, w, targets, HDPOConfig(), bias=b)[0], h)[0]
    losses = {
        choice: linear_hdpo_loss(h, w, targets, HDPOConfig(), bias=b, grad_filter=choice)[0]
        for choice in (2.4e-4, "auto")
    }
    error_of = {choice: relative(grads(loss, h)[0], exact) for choice, loss in losses.items()}
    assert error_of["auto"] < 2**-9 < error_of[2.4e-4]


def test_auto_takes_all_columns_for_an_entropy_bonus_of_the_tail(device):
    config = CONFIGS["entropy"]
    h, w, b, targets = sharp(config, device)
    losses = (
        linear_hdpo_loss(h, w, targets, config, bias=b, grad_filter=choice)[0]
        for choice in (None, "auto")
    )
    plain, auto = (grads(loss, h, w, b) for loss in losses)
    assert all(torch.equal(x, y) for x, y in zip(plain, auto, strict=True))


def test_a_filter_of_zero_is_exact(device):
    h, w, b, targets = hdpo_problem(bias=True, device=device)
    plain, _ = linear_hdpo_loss(h, w, targets, HDPOConfig(), bias=b)
    loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig(), bias=b, grad_filter=0.0)
    for x, y in zip(grads(loss, h, w, b), grads(plain, h, w, b), strict=True):
        assert_close(x, y)


def test_auto_takes_all_columns_where_that_is_cheaper_or_safer(device):
    gen = torch.Generator().manual_seed(0)
    h = (0.1 * torch.randn(23, 32, generator=gen)).to(device).requires_grad_()
    w = torch.randn(500, 32, generator=gen).to(device).requires_grad_()
    targets = make_targets(41, 23, 500, device)
    losses = [
        linear_hdpo_loss(h, w, targets, HDPOConfig(), chunk_bytes=100_000, grad_filter=choice)[0]
        for choice in (None, "auto", 2.4e-4)
    ]
    flat, auto, forced = (grads(loss, h, w) for loss in losses)
    assert all(torch.equal(x, y) for x, y in zip(flat, auto, strict=True))
    assert relative(forced[1], flat[1]) < 1e-2


@pytest.mark.parametrize("wrong", ["always", -0.1, 1.0, float("nan")])
def test_a_filter_that_is_none(wrong):
    h, w, _, targets = hdpo_problem()
    with pytest.raises(ValueError, match="grad_filter must be"):
        linear_hdpo_loss(h, w, targets, HDPOConfig(), grad_filter=wrong)


def test_the_host_asks_only_after_the_next_product_has_been_launched(monkeypatch):
    seen = []

    def logged(name, function):
        def call(*given):
            seen.append(name)
            return function(*given)

        return call

    monkeypatch.setattr(_sweep, "_project", logged("product", _sweep._project))
    monkeypatch.setattr(Verdict, "columns", logged("asked", Verdict.columns))
    h, w, b, targets = sharp(HDPOConfig(), "cpu")
    options = dict(bias=b, chunk_bytes=2 * 16 * 3001 * 4, impl="torch")
    linear_hdpo_loss(h, w, targets, HDPOConfig(), grad_filter=2.4e-4, **options)
    chunks = seen.count("product")
    assert chunks > 2
    assert seen == ["product", *["product", "asked"] * (chunks - 1), "asked"]
