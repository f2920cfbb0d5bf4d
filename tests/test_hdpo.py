"""hdpo.py: the loss on logprobs against the printed equation, and its closed-form gradient."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from tolerance import assert_close, make_targets, near_old

from metis_kernels import HDPOConfig, HDPOTargets, hdpo_loss
from metis_kernels.hdpo import hdpo_coefficient, hdpo_loss_ref

CONFIGS = {
    "default": HDPOConfig(),
    "no dual clip": HDPOConfig(dual_clip=None),
    "uneven clip": HDPOConfig(clip_low=0.1, clip_high=0.4, dual_clip=1.5),
    "no clip room": HDPOConfig(clip_low=0.0, clip_high=0.0),
    "tool only": HDPOConfig(w_acc=0.0, w_tool=1.0),
    "kl": HDPOConfig(kl_coef=0.3),
    "entropy": HDPOConfig(entropy_coef=0.2),
    "sequence": HDPOConfig(ratio="sequence"),
    "sequence, all": HDPOConfig(ratio="sequence", kl_coef=0.3, entropy_coef=0.2, dual_clip=1.2),
}


def inputs(count=97, dtype=torch.float64, device="cpu", **over):
    logprob = (-2 * torch.rand(count)).to(device, dtype).requires_grad_()
    entropy = torch.rand(count).to(device, dtype).requires_grad_()
    targets = near_old(make_targets(count, 5, 11, device, **over), logprob)
    return logprob, entropy, targets


def one(logratio, acc=1.0, tool=0.0, **config):
    """Loss, gradient with respect to the logprob, and stats of a single token."""
    old = torch.tensor([-1.0], dtype=torch.float64)
    logprob = (old + logratio).requires_grad_()
    targets = HDPOTargets(
        None, None, old, torch.tensor([acc]).double(), torch.tensor([tool]).double(), 1, 1
    )
    loss, stats = hdpo_loss(logprob, targets, HDPOConfig(**config))
    (grad,) = torch.autograd.grad(loss, logprob)
    return loss.item(), grad.item(), stats


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("count", [1, 2, 97])
def test_loss_and_gradients_match_the_equation(name, count, device):
    config = CONFIGS[name]
    logprob, entropy, targets = inputs(count, device=device)
    loss, stats = hdpo_loss(logprob, targets, config, entropy)
    truth = hdpo_loss_ref(logprob, targets, config, entropy)
    assert_close(loss, truth)
    upstream = torch.tensor(-1.7, dtype=torch.float64, device=device)
    for mine, exact in zip(
        torch.autograd.grad(loss, (logprob, entropy), upstream, allow_unused=True),
        torch.autograd.grad(truth, (logprob, entropy), upstream, allow_unused=True),
        strict=True,
    ):
        assert_close(
            torch.zeros(count) if mine is None else mine,
            torch.zeros(count) if exact is None else exact,
        )
    assert stats.n_nonfinite == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_closed_form_is_the_gradient_of_the_loss(name, device):
    logprob, entropy, targets = inputs(device=device)
    config = CONFIGS[name]
    loss, _ = hdpo_loss(logprob, targets, config, entropy)
    g, h = torch.autograd.grad(loss, (logprob, entropy), allow_unused=True)
    mine, mine_h = hdpo_coefficient(logprob, targets, config, entropy)
    assert_close(mine, g)
    assert (h is None) == (mine_h is None)
    if h is not None:
        assert_close(mine_h, h)


@pytest.mark.parametrize("lr", [math.log(0.8), math.log(1.2), math.log(3.0), 0.0, -1.0, 0.5, 2.0])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_closed_form_at_and_around_every_edge(lr, advantage):
    old = torch.tensor([-5.0], dtype=torch.float64)
    logprob = (old + lr).requires_grad_()
    value = torch.tensor([advantage], dtype=torch.float64)
    targets = HDPOTargets(None, None, old, value, value, 1, 1)
    loss, _ = hdpo_loss(logprob, targets, HDPOConfig())
    (g,) = torch.autograd.grad(loss, logprob)
    assert torch.equal(hdpo_coefficient(logprob, targets, HDPOConfig())[0], g)


def test_the_edge_of_the_clip_range_is_unclipped():
    # The bounds are set to the very ratio that exp gives: it meets them exactly (the differences
    # from 1 are exact). One ulp further out, the gradient is 0.
    for lr, advantage in ((0.4, 1.0), (-0.4, -1.0), (0.4, -1.0)):
        ratio = float(torch.tensor(lr, dtype=torch.float64).exp())
        bounds = {"clip_low": 0.0, "clip_high": 0.0, "dual_clip": 9.0}
        name = "clip_low" if lr < 0 else "clip_high" if advantage > 0 else "dual_clip"
        at = {"clip_low": 1 - ratio, "clip_high": ratio - 1, "dual_clip": ratio}[name]
        past = math.nextafter(at, 0.0) - (0 if name == "dual_clip" else 1e-15)
        old = torch.zeros(1, dtype=torch.float64)
        logprob = torch.tensor([lr], dtype=torch.float64, requires_grad=True)
        targets = HDPOTargets(None, None, old, torch.full((1,), advantage).double(), old, 1, 1)
        for limit, want in ((at, -ratio * advantage), (past, 0.0)):
            config = HDPOConfig(**(bounds | {name: limit}))
            loss, _ = hdpo_loss(logprob, targets, config)
            (g,) = torch.autograd.grad(loss, logprob)
            assert g.item() == want, (name, limit)
            assert torch.equal(hdpo_coefficient(logprob, targets, config)[0], g)
    # The ratio 1 with no clip room at all is an edge on both sides.
    for advantage in (1.0, -1.0):
        _, g, _ = one(0.0, advantage, clip_low=0.0, clip_high=0.0)
        assert g == -advantage


def test_known_values():
    assert one(math.log(1.1))[0] == pytest.approx(-1.1)
    assert one(math.log(1.5))[:2] == (pytest.approx(-1.2), 0.0)
    assert one(math.log(0.5))[:2] == (pytest.approx(-0.5), pytest.approx(-0.5))
    assert one(math.log(0.5), -1.0)[:2] == (pytest.approx(0.8), 0.0)
    assert one(math.log(1.5), -1.0)[:2] == (pytest.approx(1.5), pytest.approx(1.5))
    assert one(math.log(5.0), -1.0)[:2] == (pytest.approx(3.0), 0.0)
    assert one(math.log(5.0), -1.0, dual_clip=None)[1] == pytest.approx(5.0)


def test_each_surrogate_is_clipped_by_its_own_sign():
    # Ratio 1.5: the positive accuracy surrogate is clipped, the negative tool one is not. The sum
    # of the advantages (0) would have no loss and no gradient at all.
    loss, g, stats = one(math.log(1.5), 1.0, -1.0, w_tool=1.0)
    assert loss == pytest.approx(-1.2 + 1.5)
    assert g == pytest.approx(1.5)
    assert (stats.clip_fraction_acc, stats.clip_fraction_tool) == (1, 0)


def test_first_ratio_is_exactly_one():
    logprob, _, targets = inputs(dtype=torch.float32)
    for old in (logprob.detach(), None):
        _, stats = hdpo_loss(logprob, replace(targets, old_logprob=old), HDPOConfig())
        assert stats.ratio_max == 1 and stats.approx_kl == 0
        loss, _ = hdpo_loss(
            logprob, replace(targets, old_logprob=old, is_weight=None), HDPOConfig(w_tool=0)
        )
        (g,) = torch.autograd.grad(loss, logprob)
        assert torch.equal(g, -targets.acc_advantage * (1 / torch.tensor(float(targets.n_acc))))


@pytest.mark.parametrize("count", [0, torch.tensor(0), torch.tensor(0.0), torch.tensor(0).int()])
@pytest.mark.parametrize("name", ["default", "sequence, all"])
def test_a_count_of_zero_is_exactly_zero(count, name):
    logprob, entropy, targets = inputs()
    targets = replace(targets, n_acc=count, n_tool=count)
    loss, stats = hdpo_loss(logprob, targets, CONFIGS[name], entropy)
    assert loss == 0 and stats.loss_acc == 0 and stats.loss_tool == 0
    (g,) = torch.autograd.grad(loss, logprob)
    assert torch.equal(g, torch.zeros_like(g))
    assert torch.equal(hdpo_coefficient(logprob, targets, CONFIGS[name], entropy)[0], g)


def test_counts_as_tensors_equal_counts_as_numbers():
    logprob, entropy, targets = inputs(dtype=torch.float32)
    as_tensors = replace(targets, n_acc=torch.tensor(194), n_tool=torch.tensor(97.0))
    a, _ = hdpo_loss(logprob, targets, HDPOConfig(), entropy)
    b, _ = hdpo_loss(logprob, as_tensors, HDPOConfig(), entropy)
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["default", "kl", "sequence, all"])
def test_no_tokens(name):
    logprob, entropy, targets = inputs(0)
    loss, stats = hdpo_loss(logprob, targets, CONFIGS[name], entropy)
    loss.backward()
    assert loss == 0 and stats.n_active == 0 and stats.ratio_max == 0 and stats.approx_kl == 0
    assert logprob.grad.shape == (0,)


@pytest.mark.parametrize("name", ["default", "kl", "sequence, all"])
def test_micro_batches_add_up(name):
    logprob, entropy, targets = inputs(96)
    whole, _ = hdpo_loss(logprob, targets, CONFIGS[name], entropy)
    parts = [torch.arange(0, 8), torch.arange(8, 60), torch.arange(60, 96)]
    split = sum(hdpo_loss(logprob[i], targets.take(i), CONFIGS[name], entropy[i])[0] for i in parts)
    assert_close(split, whole)
    assert_close(*(torch.autograd.grad(x, logprob)[0] for x in (split, whole)))


@pytest.mark.parametrize("name", ["default", "sequence, all"])
def test_order_of_tokens_does_not_matter(name):
    logprob, entropy, targets = inputs()
    order = torch.randperm(97)
    a, sa = hdpo_loss(logprob, targets, CONFIGS[name], entropy)
    b, sb = hdpo_loss(logprob[order], targets.take(order), CONFIGS[name], entropy[order])
    assert_close(b, a)
    assert_close(*(torch.autograd.grad(x, logprob)[0] for x in (b, a)))
    assert sa.n_active == sb.n_active and sa.ratio_max == pytest.approx(float(sb.ratio_max))


def test_names_of_responses_do_not_matter():
    logprob, _, targets = inputs()
    renamed = replace(targets, sequence=10**9 - 13 * targets.sequence)
    config = CONFIGS["sequence"]
    assert torch.equal(*(hdpo_loss(logprob, t, config)[0] for t in (targets, renamed)))


@pytest.mark.parametrize("name", ["default", "sequence, all"])
def test_batch_form_equals_flat_form_and_ignores_masked_tokens(name):
    config = CONFIGS[name]
    b, t = 6, 9
    mask = torch.rand(b, t) < 0.7
    mask[2] = False
    logprob, entropy, targets = inputs(b * t)
    targets = replace(targets, row=None, label=None, sequence=None)
    square = {
        n: getattr(targets, n).view(b, t) for n in ("old_logprob", "ref_logprob", "is_weight")
    }
    advantages = {n: torch.randn(b, 1) for n in ("acc_advantage", "tool_advantage")}
    grid = replace(targets, **square, **advantages)
    loss, stats = hdpo_loss(logprob.view(b, t), grid, config, entropy.view(b, t), mask=mask)
    keep = mask.flatten().nonzero().flatten()
    wide = {n: v.expand(b, t).reshape(-1) for n, v in advantages.items()}
    flat = replace(targets, **wide, sequence=torch.arange(b * t) // t).take(keep)
    truth = hdpo_loss_ref(logprob[keep], flat, config, entropy[keep])
    assert_close(loss, truth)
    assert stats.n_active == mask.sum()
    grad, exact = (torch.autograd.grad(x, logprob)[0] for x in (loss, truth))
    assert_close(grad, exact)

    def spoil(x):
        return torch.where(mask, x.view(b, t), float("nan"))

    spoiled = replace(grid, **{n: spoil(v) for n, v in square.items()})
    again, other = hdpo_loss(spoil(logprob), spoiled, config, spoil(entropy), mask=mask)
    assert torch.equal(again, loss) and other.n_nonfinite == 0
    for n in ("loss_acc", "loss_tool", "clip_fraction_acc", "approx_kl", "ratio_max"):
        assert torch.equal(getattr(stats, n), getattr(other, n)), n
    assert torch.equal(torch.autograd.grad(again, logprob)[0], grad)


@pytest.mark.parametrize("where", ["logprob", "old_logprob", "acc_advantage", "is_weight"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_non_finite_token_stays_alone_and_is_counted(where, bad, ratio):
    logprob, _, targets = inputs(dtype=torch.float32)
    config = HDPOConfig(ratio=ratio)
    rest = torch.tensor([i for i in range(97) if i != 12])
    without, _ = hdpo_loss(logprob[rest], targets.take(rest), config)
    (exact,) = torch.autograd.grad(without, logprob)
    spoiled = logprob.detach().clone()
    if where == "logprob":
        spoiled[12] = bad
    else:
        value = getattr(targets, where).clone()
        value[12] = bad
        targets = replace(targets, **{where: value})
    spoiled.requires_grad_()
    loss, stats = hdpo_loss(spoiled, targets, config)
    (g,) = torch.autograd.grad(loss, spoiled)
    assert stats.n_nonfinite == 1
    assert_close(loss, without, what="loss")
    assert g[12] == 0
    assert_close(g, exact, what="gradient")
    assert torch.equal(
        hdpo_coefficient(spoiled, targets, config)[0].isfinite(), torch.ones(97, dtype=torch.bool)
    )


def test_a_huge_ratio_has_a_finite_gradient():
    for advantage in (1.0, -1.0):
        for lr in (50.0, 200.0, 1e4):
            loss, g, _ = one(lr, advantage, dual_clip=None)
            assert math.isfinite(loss) and math.isfinite(g)
    targets = make_targets(1, 1, 1, ref_logprob=torch.tensor([500.0]), old_logprob=torch.zeros(1))
    logprob = torch.zeros(1, requires_grad=True)
    config = HDPOConfig(kl_coef=0.1)
    loss, _ = hdpo_loss(logprob, targets, config)
    loss.backward()
    assert logprob.grad.isfinite().all()
    assert_close(hdpo_coefficient(logprob, targets, config)[0], logprob.grad)


def test_tokens_without_advantage_are_in_no_statistic():
    logprob, _, targets = inputs()
    live = (targets.acc_advantage != 0) | (targets.tool_advantage != 0)
    assert 0 < live.sum() < 97
    _, stats = hdpo_loss(logprob, targets, HDPOConfig())
    ratio = (logprob - targets.old_logprob).exp()[live]
    assert stats.n_active == live.sum()
    assert stats.ratio_max == pytest.approx(ratio.max().item())
    assert stats.approx_kl == pytest.approx((ratio - 1 - ratio.log()).mean().item())
    acc, r = targets.acc_advantage, (logprob - targets.old_logprob).exp()
    clipped = ((acc > 0) & (r > 1.2)) | ((acc < 0) & ((r < 0.8) | (r > 3)))
    assert stats.clip_fraction_acc == pytest.approx(float(clipped.sum() / (acc != 0).sum()))
    dead = torch.where(live, 0.0, float("nan"))
    again, other = hdpo_loss(logprob + dead, targets, HDPOConfig())
    assert torch.equal(again, hdpo_loss(logprob, targets, HDPOConfig())[0])
    assert other.n_nonfinite == 0
    with_kl, _ = hdpo_loss(logprob, targets, HDPOConfig(kl_coef=0.1))
    assert _.n_active == 97


def test_is_weight_is_a_constant_and_kl_ignores_it():
    logprob, entropy, targets = inputs()
    weight = targets.is_weight.double().requires_grad_()
    targets = replace(targets, is_weight=weight)
    loss, _ = hdpo_loss(logprob, targets, HDPOConfig(kl_coef=0.2), entropy)
    assert torch.autograd.grad(loss, weight, allow_unused=True) == (None,)
    only_kl = HDPOConfig(w_acc=0, w_tool=0, kl_coef=0.2)
    doubled = replace(targets, is_weight=2 * weight.detach())
    assert torch.equal(*(hdpo_loss(logprob, t, only_kl)[0] for t in (targets, doubled)))


def test_low_precision_logprobs_are_computed_in_fp32():
    logprob, _, targets = inputs(dtype=torch.float32)
    rounded = logprob.detach().bfloat16()
    a, _ = hdpo_loss(rounded, targets, HDPOConfig())
    b, _ = hdpo_loss(rounded.float(), targets, HDPOConfig())
    assert a.dtype == torch.float32 and torch.equal(a, b)


def test_gradcheck():
    logprob, entropy, targets = inputs(13)
    config = HDPOConfig(kl_coef=0.1, entropy_coef=0.1, ratio="sequence")
    assert torch.autograd.gradcheck(
        lambda lp, en: hdpo_loss(lp, targets, config, en)[0], (logprob, entropy)
    )


def test_repeats_bitwise():
    logprob, entropy, targets = inputs(2000, torch.float32)
    config = CONFIGS["sequence, all"]
    first, _ = hdpo_loss(logprob, targets, config, entropy)
    (g,) = torch.autograd.grad(first, logprob)
    for _ in range(50):
        loss, _ = hdpo_loss(logprob, targets, config, entropy)
        assert torch.equal(loss, first)
        assert torch.equal(torch.autograd.grad(loss, logprob)[0], g)


def test_targets_move_and_remember_which_tokens_carry_loss():
    targets = make_targets(20, 5, 11)
    moved = targets.to("cpu")
    assert torch.equal(moved._live, targets.live_index(HDPOConfig()))
    assert torch.equal(moved.live_index(HDPOConfig(kl_coef=0.1)), torch.arange(20))
    assert moved.take(torch.tensor([0, 1]))._live is None


@pytest.mark.parametrize(
    "field, value",
    [
        ("w_acc", -1.0),
        ("w_tool", float("nan")),
        ("clip_low", 1.5),
        ("clip_high", -0.1),
        ("dual_clip", 1.0),
        ("dual_clip", 0.0),
        ("tool_norm", "batch"),
        ("ratio", "group"),
        ("kl_coef", float("inf")),
        ("entropy_coef", -1),
        ("temperature", 0.0),
        ("softcap", -3.0),
        ("softcap", 0.0),
        ("logits_dtype", torch.bfloat16),
        ("w_acc", "1"),
        ("temperature", None),
    ],
)
def test_config_refuses(field, value):
    with pytest.raises(ValueError, match=field) as error:
        HDPOConfig(**{field: value})
    assert repr(value) in str(error.value)


def test_config_accepts_its_limits():
    HDPOConfig(clip_low=1.0, clip_high=0.0, dual_clip=None, w_acc=0, logits_dtype=torch.float32)
    with pytest.raises(AttributeError):
        HDPOConfig().w_acc = 2.0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"acc_advantage": torch.zeros(3)}, r"acc_advantage \[97\].*got \[3\]"),
        ({"old_logprob": torch.zeros(97, 2)}, r"old_logprob \[97\].*got \[97, 2\]"),
        ({"old_logprob": torch.zeros(97).long()}, "old_logprob in a floating dtype.*int64"),
        ({"sequence": torch.zeros(97)}, "sequence in an integer dtype.*float32"),
        ({"n_acc": torch.zeros(2)}, r"n_acc 0-d, got \[2\]"),
        ({"n_tool": -1}, "n_tool must be a finite count >= 0, got -1"),
        ({"n_acc": float("nan")}, "n_acc must be"),
        ({"label": torch.zeros(97, device="meta").long()}, "label on cpu, got meta"),
    ],
)
def test_targets_refuse(change, message):
    logprob, _, targets = inputs()
    with pytest.raises(ValueError, match=message):
        hdpo_loss(logprob, replace(targets, **change), HDPOConfig())


def test_missing_inputs_are_named():
    logprob, entropy, targets = inputs()
    bare = replace(targets, ref_logprob=None, sequence=None)
    for config, message in (
        (HDPOConfig(kl_coef=0.1), "kl_coef is 0.1, so targets.ref_logprob"),
        (HDPOConfig(entropy_coef=0.1), "entropy_coef is 0.1, so entropy"),
        (HDPOConfig(ratio="sequence"), "targets.sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            hdpo_loss(logprob, bare, config)
    with pytest.raises(ValueError, match=r"entropy \[97\]"):
        hdpo_loss(logprob, targets, HDPOConfig(), entropy[:5])
    with pytest.raises(ValueError, match="mask in torch.bool"):
        hdpo_loss(logprob, targets, HDPOConfig(), mask=torch.ones(97))
    with pytest.raises(ValueError, match="logprob in a floating dtype"):
        hdpo_loss(torch.zeros(97).long(), targets, HDPOConfig())
    with pytest.raises(ValueError, match=r"row in \[0, 3\)"):
        targets.validate(tokens=3)
    with pytest.raises(ValueError, match=r"label in \[0, 5\)"):
        targets.validate(vocab=5)
