"""linear_hdpo.py: the fused loss against dense float64 autograd, and the ways it could go wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerance import (
    CONFIGS,
    FORWARD,
    GRADIENT,
    assert_as_good_as_torch,
    assert_close,
    error,
    grads,
    hdpo_problem,
    make_head,
    make_targets,
)
from torch.utils._python_dispatch import TorchDispatchMode

from metis_kernels import (
    HDPOConfig,
    HDPOTargets,
    _impl,
    hdpo_loss,
    linear_hdpo_loss,
    linear_logprobs,
)
from metis_kernels._ops import run_row_sweep
from metis_kernels._sweep import ROW_TILE
from metis_kernels.hdpo import hdpo_coefficient
from metis_kernels.linear_hdpo import linear_hdpo_ref, run_hdpo_sweep

BITS32, BITS16 = torch.float32, torch.bfloat16
FEW = 8
"""Targets, of which the largest error says little."""


def compare(h, w, b, targets, config, **options):
    """The three-way rule over loss, logprobs, entropies and all gradients."""
    exact, s64 = linear_hdpo_ref(h, w, targets, config, bias=b)
    plain, s_plain = linear_hdpo_ref(h, w, targets, config, bias=b, dtype=h.dtype)
    loss, stats = linear_hdpo_loss(h, w, targets, config, bias=b, **options)
    live = targets.live_mask(config)
    assert torch.equal(stats.logprob.isnan(), ~live) and torch.equal(stats.entropy.isnan(), ~live)
    assert (stats.logprob[live] <= 0).all()
    # A token that carries no loss has a logprob in the references and none in the operator.
    for name in ("logprob", "entropy"):
        got, p, t = (getattr(s, name)[live] for s in (stats, s_plain, s64))
        elsewhere = error_of_torch(name, h, w, b, config) if live.sum() < FEW else 0.0
        assert_as_good_as_torch(got, p, t, FORWARD, name, elsewhere)
    assert error(loss, exact) <= FORWARD * loss_error_of_torch(targets, config, s_plain, s64)
    for what, *three in zip(
        ("d_hidden", "d_weight", "d_bias"),
        *(grads(x, h, w, b) for x in (loss, plain, exact)),
        strict=False,
    ):
        assert three[0].isfinite().all()
        assert_as_good_as_torch(*three, GRADIENT, what)
    assert stats.n_active == live.sum() and stats.n_nonfinite == 0
    return stats


def error_of_torch(name, h, w, b, config):
    """Plain torch's largest error of a logprob or an entropy over every row."""
    targets = replace(make_targets(len(h), len(h), len(w), h.device), row=None)
    plain, exact = (
        getattr(linear_hdpo_ref(h, w, targets, config, bias=b, dtype=dtype)[1], name)
        for dtype in (h.dtype, torch.float64)
    )
    return error(plain, exact)


def loss_error_of_torch(targets, config, plain, exact):
    """What plain torch's errors of single tokens make of the loss where none cancels another.

    (The error of one sum is luck: plain torch's may happen to be zero.)
    """
    g, h = hdpo_coefficient(exact.logprob, targets, config, exact.entropy)
    total = (g * (plain.logprob - exact.logprob)).abs().sum()
    if h is not None:
        total += (h * (plain.entropy - exact.entropy)).abs().sum()
    size = 1 + exact.loss_acc.abs() + exact.loss_tool.abs()
    return total + 4 * torch.finfo(torch.promote_types(plain.logprob.dtype, BITS32)).eps * size


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("bias", [False, True])
def test_every_option_in_fp32(name, bias, device, poisoned_memory):
    config = CONFIGS[name]
    compare(*hdpo_problem(bias=bias, device=device, config=config), config, chunk_bytes=30_000)


@pytest.mark.parametrize(
    ("name", "logits_dtype"),
    [
        *((name, None) for name in ("default", "softcap", "sequence", "everything")),
        *((name, BITS32) for name in ("default", "everything")),
    ],
)
def test_options_in_bf16(name, logits_dtype, device, poisoned_memory):
    config = replace(CONFIGS[name], logits_dtype=logits_dtype)
    # Enough tokens for the largest error of ours and of torch's to be alike in distribution.
    given = hdpo_problem(64, 64, 127, 203, BITS16, device, bias=True, config=config)
    compare(*given, config, chunk_bytes=60_000)


@pytest.mark.parametrize(
    "tokens, hidden, vocab, count",
    [
        (1, 1, 1, 1),
        (3, 5, 1, 9),
        (4, 3, 7, 1),
        (17, 33, 127, 50),
        (5, 1, 127, 17),
        (9, 24, 50257, 19),
    ],
)
@pytest.mark.parametrize("dtype", [BITS32, torch.float64])
def test_odd_shapes(tokens, hidden, vocab, count, dtype, device, poisoned_memory):
    config = HDPOConfig(entropy_coef=0.1, temperature=0.9)
    given = hdpo_problem(tokens, hidden, vocab, count, dtype, device, bias=True, config=config)
    compare(*given, config)


@pytest.mark.parametrize("vocab", [151_936, 152_064])
def test_vocabularies_of_real_models(vocab, device):
    # Small H: the vocabulary's tail is what is under test, and 2 cores have to do it.
    given = hdpo_problem(5, 8, vocab, 12, BITS32, device)
    stats = compare(*given, HDPOConfig(), chunk_bytes=1 << 25)
    # The tail bug of others shows as a label in the last tile with a positive logprob.
    assert (given[3].label[::2] == vocab - 1).all() and stats.logprob.nan_to_num(-1).max() <= 0


def test_peaked_labels_in_bf16_never_exceed_probability_one(device):
    # With the label's logit exact and the others rounded, a logprob could come out positive.
    h, w, _ = make_head(64, 64, 127, BITS16, device, peak=25.0)
    label = (h.float() @ w.float().t()).argmax(1)
    targets = replace(make_targets(64, 64, 127, device), row=None, label=label)
    _, stats = linear_hdpo_loss(h, w, targets, HDPOConfig(kl_coef=0.1))
    assert (stats.logprob <= 0).all() and stats.logprob.max() > -1e-3


@pytest.mark.parametrize("shift", [-300.0, 300.0])
def test_logits_all_far_below_or_above_zero(shift, device):
    h, w, _ = make_head(12, 16, 33, device=device)
    b = torch.full((33,), shift, device=device).requires_grad_()
    targets = make_targets(12, 12, 33, device)
    loss, stats = linear_hdpo_loss(h, w, targets, HDPOConfig(kl_coef=0.1), bias=b)
    exact, s64 = linear_hdpo_ref(h, w, targets, HDPOConfig(kl_coef=0.1))
    # A constant bias changes no logprob; fp32 holds logits of 300 to 3e-5.
    assert error(stats.logprob, s64.logprob) < 2e-4
    assert error(loss, exact) < 1e-3 * float(exact.abs())


@pytest.mark.parametrize("case", ["no tokens", "all zero", "no rows"])
@pytest.mark.parametrize("name", ["default", "sequence"])
def test_no_active_token_still_backpropagates_exact_zeros(case, name, device, poisoned_memory):
    config = replace(CONFIGS[name], kl_coef=0.0, entropy_coef=0.0)
    tokens, count = (0 if case == "no rows" else 5), (7 if case == "all zero" else 0)
    h, w, b = make_head(5, 8, 13, device=device, bias=True)
    h = h.detach()[:tokens].requires_grad_()
    zero = torch.zeros(count)
    targets = make_targets(count, tokens, 13, device, acc_advantage=zero, tool_advantage=zero)
    loss, stats = linear_hdpo_loss(h, w, targets, config, bias=b)
    for x, g in zip((h, w, b), grads(loss, h, w, b), strict=True):
        assert torch.equal(g, torch.zeros_like(x))
    assert loss == 0 and stats.n_active == 0
    assert stats.logprob.shape == (count,) and stats.logprob.isnan().all()


def test_counts_of_zero_are_exactly_zero(device):
    h, w, _, targets = hdpo_problem(device=device)
    for zero in (0, torch.tensor(0, device=device)):
        loss, stats = linear_hdpo_loss(
            h,
            w,
            replace(targets, n_acc=zero, n_tool=zero),
            HDPOConfig(kl_coef=0.1, entropy_coef=0.1),
        )
        assert loss == 0 and stats.loss_tool == 0
        assert not any(g.any() for g in grads(loss, h, w))


def test_empty_tool_channel_is_the_accuracy_channel_alone():
    h, w, _, targets = hdpo_problem()
    zero = torch.zeros_like(targets.tool_advantage)
    empty = replace(targets, tool_advantage=zero, n_tool=0)
    a, _ = linear_hdpo_loss(h, w, empty, HDPOConfig())
    b, _ = linear_hdpo_loss(h, w, empty, HDPOConfig(w_tool=0.0))
    assert torch.equal(a, b) and a != 0


def test_equals_hdpo_loss_of_its_own_logprobs():
    h, w, b, targets = hdpo_problem(bias=True)
    loss, stats = linear_hdpo_loss(h, w, targets, HDPOConfig(), bias=b)
    again, other = hdpo_loss(stats.logprob, targets, HDPOConfig())
    assert_close(again, loss)
    for name in ("n_active", "n_nonfinite", "ratio_max", "clip_fraction_acc"):
        assert torch.equal(getattr(stats, name), getattr(other, name)), name


def test_repeated_rows_are_summed():
    h, w, _, targets = hdpo_problem(tokens=3, count=60)
    compare(h, w, None, targets, HDPOConfig(kl_coef=0.1), chunk_bytes=20_000)
    none = replace(targets.take(torch.arange(3)), row=None)
    a = linear_hdpo_loss(h, w, none, HDPOConfig())[0]
    b = linear_hdpo_loss(h, w, replace(none, row=torch.arange(3)), HDPOConfig())[0]
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["default", "everything"])
def test_micro_batches_add_up(name):
    config = CONFIGS[name]
    h, w, _, targets = hdpo_problem(count=64, config=config)
    whole, _ = linear_hdpo_loss(h, w, targets, config)
    parts = [torch.arange(0, 5), torch.arange(5, 40), torch.arange(40, 64)]
    split = sum(linear_hdpo_loss(h, w, targets.take(i), config)[0] for i in parts)
    assert_close(split, whole)
    for a, b in zip(grads(split, h, w), grads(whole, h, w), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("name", ["everything", "sequence"])
def test_order_of_tokens_does_not_matter(name):
    config = CONFIGS[name]
    h, w, _, targets = hdpo_problem(config=config)
    order = torch.randperm(41)
    a, sa = linear_hdpo_loss(h, w, targets, config)
    b, sb = linear_hdpo_loss(h, w, targets.take(order), config)
    assert_close(b, a)
    assert torch.equal(sa.logprob[order], sb.logprob)
    for x, y in zip(grads(b, h, w), grads(a, h, w), strict=True):
        assert_close(x, y)


def test_rows_that_no_token_names_change_nothing():
    h, w, _, targets = hdpo_problem(tokens=30)
    used = torch.zeros(30, dtype=torch.bool)
    used[targets.row] = True
    spoiled = torch.where(used[:, None], h.detach(), float("nan")).requires_grad_()
    a, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    b, _ = linear_hdpo_loss(spoiled, w, targets, HDPOConfig())
    assert not used.all() and torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(grads(a, h, w), grads(b, spoiled, w), strict=True))


@pytest.mark.parametrize("name", ["default", "sequence"])
def test_tokens_without_advantage_are_not_computed(name):
    config = replace(CONFIGS[name], kl_coef=0.0, entropy_coef=0.0)
    h, w, _, targets = hdpo_problem(tokens=41, row=torch.arange(41), config=config)
    dead = torch.arange(41) // 4 % 2 == 0
    keep = (~dead).float()
    targets = replace(
        targets,
        acc_advantage=targets.acc_advantage * keep,
        tool_advantage=targets.tool_advantage * keep,
    )
    a, sa = linear_hdpo_loss(h, w, targets, config)
    spoiled = torch.where(dead[:, None], float("nan"), h.detach()).requires_grad_()
    b, sb = linear_hdpo_loss(spoiled, w, targets, config)
    assert torch.equal(a, b) and sb.n_nonfinite == 0 and sb.n_active == sa.n_active
    assert sb.logprob[dead].isnan().all()
    for x, y in zip(grads(a, h, w), grads(b, spoiled, w), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["default", "everything", "sequence"])
def test_a_non_finite_row_stays_in_its_row_and_is_reported(name, poison):
    config = CONFIGS[name]
    h, w, b, targets = hdpo_problem(tokens=41, row=torch.arange(41), bias=True, config=config)
    bad = 7
    assert targets.live_mask(config)[bad]
    spoiled = h.detach().clone()
    spoiled[bad, 3] = poison
    spoiled.requires_grad_()
    loss, stats = linear_hdpo_loss(spoiled, w, targets, config, bias=b, chunk_bytes=30_000)
    rest = torch.tensor([i for i in range(41) if i != bad])
    exact, _ = linear_hdpo_ref(h, w, targets.take(rest), config, bias=b)
    assert stats.n_nonfinite == 1 and not stats.logprob[bad].isfinite()
    assert stats.logprob[rest][targets.live_mask(config)[rest]].isfinite().all()
    assert_close(loss, exact, 256)
    for got, want in zip(grads(loss, spoiled, w, b), grads(exact, h, w, b), strict=True):
        assert_close(got, want, 256)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias", "all"])
@pytest.mark.parametrize("name", ["default", "sequence"])
def test_frozen_inputs_cost_nothing(frozen, name):
    config = CONFIGS[name]
    h, w, b, targets = hdpo_problem(bias=True, config=config)
    exact = linear_hdpo_ref(h, w, targets, config, bias=b)[0]
    want = dict(zip("hwb", grads(exact, h, w, b), strict=True))
    leaves = {"h": h, "w": w, "b": b}
    for letter, word in zip("hwb", ("hidden", "weight", "bias"), strict=True):
        leaves[letter].requires_grad_(word not in frozen and frozen != "all")
    with Allocations() as seen:
        loss, _ = linear_hdpo_loss(h, w, targets, config, bias=b, chunk_bytes=30_000)
        open_ = {k: v for k, v in leaves.items() if v.requires_grad}
        assert loss.requires_grad == bool(open_)
        got = dict(zip(open_, grads(loss, *open_.values()), strict=True)) if open_ else {}
    for letter, value in got.items():
        assert_close(value, want[letter])
    made = (127, 32) in seen.shapes
    assert made == w.requires_grad, "a [V, H] buffer exists exactly where somebody wants d_weight"


OPERATORS = {
    torch.ops.metis_kernels.hdpo_sweep.default: run_hdpo_sweep,
    torch.ops.metis_kernels.row_sweep.default: run_row_sweep,
}


class Allocations(TorchDispatchMode):
    """The shapes of tensors that operations returned, and the bytes of the largest new storage."""

    def __init__(self):
        super().__init__()
        self.shapes, self.largest, self.products = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in OPERATORS:  # opaque to a mode; what it does counts too
            with self:
                return OPERATORS[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.shapes.add(tuple(x.shape))
                self.largest = max(self.largest, x.untyped_storage().nbytes())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return out


def test_no_logits_of_all_tokens_ever_exist():
    tokens, vocab, hidden = 1000, 997, 8
    h, w, _, targets = hdpo_problem(tokens, hidden, vocab, tokens)
    for config in (HDPOConfig(), CONFIGS["everything"], CONFIGS["sequence"]):
        with Allocations() as seen:
            loss, _ = linear_hdpo_loss(h, w, targets, config, chunk_bytes=1_000_000)
            grads(loss, h, w)
        assert seen.largest <= 1_000_000, f"{seen.largest} bytes at once"
        assert not any(s[-1:] == (vocab,) and s[0] > 300 for s in seen.shapes if len(s) == 2)


def test_no_gradient_work_under_no_grad_and_none_in_backward():
    h, w, _, targets = hdpo_problem()
    with torch.no_grad(), Allocations() as seen:
        loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    assert seen.products == 1 and not loss.requires_grad
    with Allocations() as seen:
        loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    assert seen.products == 3
    with Allocations() as seen:
        grads(loss, h, w)
    assert seen.products == 0


def test_strided_transposed_and_expanded_inputs():
    h, w, _, targets = hdpo_problem()
    exact = linear_hdpo_ref(h, w, targets, HDPOConfig())[0]
    want = grads(exact, h, w)
    wide = torch.randn(23, 64)
    wide[:, ::2] = h.detach()
    views = {
        "strided": (wide[:, ::2], torch.stack([w.detach(), w.detach()], 1)[:, 1]),
        "transposed": (h.detach().t().contiguous().t(), w.detach().t().contiguous().t()),
    }
    for name, (hv, wv) in views.items():
        assert not hv.is_contiguous() and not wv.is_contiguous()
        hv, wv = hv.requires_grad_(), wv.requires_grad_()
        column = torch.stack([targets.label, targets.label], 1)[:, 0]
        loss, _ = linear_hdpo_loss(hv, wv, replace(targets, label=column), HDPOConfig())
        assert_close(loss, exact, what=name)
        for a, b in zip(grads(loss, hv, wv), want, strict=True):
            assert_close(a, b, what=name)
    row = h.detach()[:1].requires_grad_()
    flat = torch.tensor(0.5)
    same = replace(
        targets,
        row=None,
        label=torch.tensor(3).expand(41),
        acc_advantage=flat.expand(41),
        old_logprob=None,
    )
    loss, _ = linear_hdpo_loss(row.expand(41, -1), w, same, HDPOConfig())
    exact, _ = linear_hdpo_ref(row.expand(41, -1), w, same, HDPOConfig())
    for a, b in zip(grads(loss, row, w), grads(exact, row, w), strict=True):
        assert_close(a, b, what="expanded")


def test_batched_hidden_is_flattened():
    h, w, _, targets = hdpo_problem(tokens=24)
    a, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    b, _ = linear_hdpo_loss(h.view(4, 6, -1), w, targets, HDPOConfig())
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(grads(a, h), grads(b, h), strict=True))


def test_a_tied_head_adds_up():
    def run(loss_of):
        table = torch.nn.Parameter(torch.linspace(-1, 1, 13 * 8).view(13, 8).sin())
        mixer = torch.nn.Parameter(torch.eye(8) * 1.5)
        ids = torch.arange(12) % 13
        loss = loss_of(table[ids] @ mixer, table)
        loss.backward()
        return table.grad, mixer.grad

    targets = make_targets(12, 12, 13)
    config = HDPOConfig(kl_coef=0.1)
    mine = run(lambda h, w: linear_hdpo_loss(h, w, targets, config)[0])
    exact = run(lambda h, w: linear_hdpo_ref(h, w, targets, config)[0])
    for a, b in zip(mine, exact, strict=True):
        assert_close(a, b)


def test_backward_twice_and_accumulating():
    h, w, _, targets = hdpo_problem()
    loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    (loss * 2).backward(retain_graph=True)
    first = w.grad.clone()
    loss.backward()
    assert_close(w.grad, 1.5 * first)


@pytest.mark.parametrize("dtype", [BITS32, BITS16])
def test_repeats_bitwise(dtype, device):
    config = CONFIGS["everything"]
    h, w, b, targets = hdpo_problem(40, 32, 300, 100, dtype, device, bias=True, config=config)
    first = None
    # The interpreter takes a second a run and has no threads that could differ.
    for _ in range(2 if _impl.CPU_IMPLEMENTATIONS[0] == "triton" else 100):
        loss, stats = linear_hdpo_loss(h, w, targets, config, bias=b, chunk_bytes=1 << 17)
        now = [loss, stats.logprob, stats.entropy, *grads(loss, h, w, b)]
        first = first or now
        assert all(torch.equal(x, y) for x, y in zip(first, now, strict=True))


def needs_blas_that_keeps_rows(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Skips where torch's own product gives a row other bits in a batch of another size, even in
    whole tiles: no operator over it can be bitwise there."""
    rows = hidden.detach().repeat(4, 1)[: 8 * ROW_TILE]
    products = [rows[:n] @ weight.detach().T for n in (16, 32, 48, 112, 128)]
    if not all(torch.equal(p, products[-1][: len(p)]) for p in products):
        pytest.skip(f"this BLAS gives a row of {hidden.dtype} other bits in another batch")


@pytest.mark.parametrize("dtype", [BITS32, BITS16, torch.float64])
@pytest.mark.parametrize("vocab, hidden", [(127, 16), (50257, 32)])
def test_a_row_alone_equals_the_row_in_a_batch(dtype, vocab, hidden):
    # On the CPU, bitwise: rows reach BLAS in whole tiles (`_sweep.ROW_TILE`). Measured, not
    # promised by any BLAS; on a GPU cuBLAS chooses by shape.
    config = HDPOConfig(kl_coef=0.1)
    h, w, _, targets = hdpo_problem(
        40, hidden, vocab, 40, dtype, row=torch.arange(40), config=config
    )
    needs_blas_that_keeps_rows(h, w)
    _, whole = linear_hdpo_loss(h, w, targets, config)
    for index in ([0], [39], [5, 6], list(range(3, 20)), list(range(33))):
        index = torch.tensor(index)
        loss, stats = linear_hdpo_loss(h, w, targets.take(index), config)
        assert torch.equal(stats.logprob, whole.logprob[index])
        assert torch.equal(stats.entropy, whole.entropy[index])


@pytest.mark.parametrize("dtype", [BITS32, BITS16])
@pytest.mark.parametrize("logits_dtype", [None, BITS32])
def test_first_ratio_is_exactly_one(dtype, logits_dtype):
    # Old logprobs are taken over all tokens, the loss only meets those with an advantage.
    h, w, b, targets = hdpo_problem(100, 32, 1000, 100, dtype, row=torch.arange(100), bias=True)
    needs_blas_that_keeps_rows(h, w)
    same = {"temperature": 0.8, "softcap": 20.0, "logits_dtype": logits_dtype}
    with torch.no_grad():
        old, _ = linear_logprobs(h, w, targets.label, targets.row, bias=b, **same)
    _, stats = linear_hdpo_loss(
        h, w, replace(targets, old_logprob=old), HDPOConfig(**same), bias=b, chunk_bytes=1 << 18
    )
    assert stats.ratio_max == 1 and stats.approx_kl == 0 and 0 < stats.n_active < 100
    assert stats.clip_fraction_acc == 0


@pytest.mark.parametrize("dtype", [BITS32, BITS16])
def test_error_is_flat_in_the_number_of_chunks(dtype):
    # Few rows of hidden, and all tokens on one side: the sum over chunks is what is under test.
    h, w, _, targets = hdpo_problem(16, 16, 61, 800, dtype, acc_advantage=torch.rand(800) + 0.5)
    exact = grads(linear_hdpo_ref(h, w, targets, HDPOConfig())[0], h, w)
    errors = []
    for chunks in (1, 5, 50):
        bytes_ = 61 * (dtype.itemsize + 8) * 800 // chunks
        loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig(), chunk_bytes=bytes_)
        errors.append([error(a, b) for a, b in zip(grads(loss, h, w), exact, strict=True)])
    for one, five, fifty in zip(*errors, strict=True):
        assert max(five, fifty) <= 2 * one + 1e-9, errors


def test_autocast_changes_nothing():
    h, w, _, targets = hdpo_problem()
    a, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    with torch.autocast("cpu", torch.bfloat16):
        b, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(grads(a, h, w), grads(b, h, w), strict=True))


def test_targets_from_to_give_the_same(device):
    h, w, _, targets = hdpo_problem()
    a, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    moved = targets.to(device)
    b, _ = linear_hdpo_loss(h.to(device), w.to(device), moved, HDPOConfig())
    assert_close(b.cpu(), a)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": torch.zeros(127, 31)}, r"one H, got \[23, 32\] and \[127, 31\]"),
        ({"weight": torch.zeros(127, 32).double()}, "torch.float32 and torch.float64"),
        ({"weight": torch.zeros(0, 32)}, "vocabulary of at least 1"),
        ({"hidden": torch.zeros(32)}, r"hidden \[T, H\].*got \[32\]"),
        ({"bias": torch.zeros(5)}, r"bias \[127\].*got \[5\]"),
        ({"bias": torch.zeros(127).double()}, "bias in torch.float32, got torch.float64"),
        ({"weight": torch.zeros(127, 32, device="meta")}, "weight on cpu.*got meta"),
        ({"chunk_bytes": 0}, "chunk_bytes must be > 0, got 0"),
        ({"label": torch.full((41,), 127)}, r"label in \[0, 127\) .*got 127 to 127"),
        ({"label": torch.full((41,), -100)}, "got -100 to -100"),
        ({"label": torch.zeros(41)}, "label in an integer dtype, got torch.float32"),
        ({"label": None}, r"targets.label \[S\], got None"),
        ({"row": torch.full((41,), 23)}, r"row in \[0, 23\) .*got 23 to 23"),
        ({"row": None}, r"label \[23\].*got \[41\]"),
        ({"acc_advantage": torch.zeros(9)}, r"\[9\].*got \[41\]"),
    ],
)
def test_errors_name_both_sides(change, message):
    h, w, _, targets = hdpo_problem()
    fields = {k: change.pop(k) for k in list(change) if hasattr(targets, k)}
    given = {
        "hidden": h,
        "weight": w,
        "targets": replace(targets, **fields),
        "config": HDPOConfig(),
    } | change
    with pytest.raises(ValueError, match=message):
        linear_hdpo_loss(**given)


def test_gradcheck():
    for name in ("everything", "sequence"):
        given = hdpo_problem(4, 3, 6, 9, torch.float64, bias=True, config=CONFIGS[name])
        h, w, b, targets = given
        assert torch.autograd.gradcheck(
            lambda h, w, b, t=targets, c=CONFIGS[name]: linear_hdpo_loss(h, w, t, c, bias=b)[0],
            (h, w, b),
        )


def test_worked_example_of_shared_prefix_targets():
    # Both rollouts of one prompt read the last prefix row: its gradient is the sum of theirs.
    h = torch.randn(5, 4, requires_grad=True)
    w = torch.randn(6, 4)
    advantage = torch.tensor([0.7, -0.7, -0.7])
    targets = HDPOTargets(
        torch.tensor([1, 1, 3]), torch.tensor([2, 4, 5]), None, advantage, torch.zeros(3), 3, 0
    )
    loss, _ = linear_hdpo_loss(h, w, targets, HDPOConfig())
    (g,) = grads(loss, h, upstream=1.0)
    p = torch.softmax(h.detach() @ w.t(), -1)
    one_hot = torch.nn.functional.one_hot(torch.tensor([2, 4, 5]), 6)
    rows = torch.tensor([1, 1, 3])
    per_token = (-advantage / 3)[:, None] * ((one_hot - p[rows]) @ w)
    assert_close(g, torch.zeros(5, 4).index_add(0, rows, per_token))
