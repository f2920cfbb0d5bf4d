"""advantages.py against a loop over Python floats."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from tolerance import assert_close

from metis_kernels import Advantages, hdpo_advantages, hdpo_normalizers, tool_reward
from metis_kernels.advantages import hdpo_advantages_ref

REWARDS = [0.0, 0.1, 0.9, 1.0, 1 / 3, -2.5]


def batch(rows, device="cpu", dtype=torch.float64):
    """rows of (group, acc, calls, correct, scored, truncated) as keyword arguments."""
    columns = list(zip(*rows, strict=True)) if rows else [()] * 6
    group, acc, calls, correct, scored, truncated = columns
    correct = torch.tensor(correct, dtype=torch.bool, device=device)
    calls = torch.tensor(calls, dtype=torch.long, device=device)
    return {
        "acc_reward": torch.tensor(acc, dtype=dtype, device=device),
        "tool_reward": tool_reward(calls, correct).to(dtype),
        "correct": correct,
        "group": torch.tensor(group, dtype=torch.long, device=device),
        "scored": torch.tensor(scored, dtype=torch.bool, device=device),
        "truncated": torch.tensor(truncated, dtype=torch.bool, device=device),
    }


rollouts = st.lists(
    st.tuples(
        st.sampled_from([-7, 0, 3, 2**40]),
        st.sampled_from(REWARDS),
        st.integers(0, 4),
        st.booleans(),
        st.sampled_from([True, True, True, False]),
        st.sampled_from([False, False, False, True]),
    ),
    max_size=24,
)


@hypothesis.given(rollouts, st.sampled_from(["std", "none"]))
@hypothesis.settings(max_examples=150, deadline=None)
def test_equals_the_loop(rows, scale):
    given = batch(rows)
    mine = hdpo_advantages(**given, scale=scale)
    acc, tool = hdpo_advantages_ref(**given, scale=scale)
    for got, want in ((mine.acc, acc), (mine.tool, tool)):
        want = torch.tensor(want, dtype=torch.float64)
        assert torch.allclose(got, want, rtol=1e-9, atol=1e-12)
        # Exact zeros: outside the compared, and in a group without any comparison. (A rollout at
        # the mean of its group is 0 up to rounding only, in the loop as well.)
        assert not got[~given["scored"]].any()
        for g in set(given["group"].tolist()):
            inside = given["group"] == g
            assert want[inside].any() or not got[inside].any()
    assert not mine.tool[~given["correct"] | given["truncated"]].any()
    assert torch.equal(mine.acc_signal, mine.acc != 0)
    assert torch.equal(mine.tool_signal, mine.tool != 0)


@hypothesis.given(rollouts, st.randoms(use_true_random=False))
@hypothesis.settings(max_examples=60, deadline=None)
def test_permuting_rollouts_permutes_the_bits(rows, random):
    order = list(range(len(rows)))
    random.shuffle(order)
    a = hdpo_advantages(**batch(rows, dtype=torch.float32))
    b = hdpo_advantages(**batch([rows[i] for i in order], dtype=torch.float32))
    for name in ("acc", "tool", "qualifies"):
        assert torch.equal(getattr(a, name)[order], getattr(b, name)), name


def test_permutation_is_bitwise_where_sums_are_inexact(device):
    n = 260  # more than a block; of float64 rewards: sums of float32 ones are exact in float64
    reward = torch.rand(n, device=device, dtype=torch.float64)
    group = torch.randint(0, 20, (n,), device=device)
    right = torch.rand(n, device=device) < 0.5
    order = torch.randperm(n, device=device)
    a = hdpo_advantages(reward, reward, right, group)
    b = hdpo_advantages(reward[order], reward[order], right[order], group[order])
    assert torch.equal(a.acc[order], b.acc) and torch.equal(a.tool[order], b.tool)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.9, 1e-8, 1e20])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tied_group_is_exactly_zero(value, size, dtype, device):
    # Means of equal floats round: a third of 0.1 + 0.1 + 0.1 is not 0.1.
    reward = torch.full((size,), value, device=device, dtype=dtype)
    ones = torch.ones(size, dtype=torch.bool, device=device)
    mine = hdpo_advantages(reward, reward, ones, torch.zeros(size, device=device).long())
    assert not mine.acc.any() and not mine.tool.any()
    assert torch.equal(mine.qualifies, ones if size > 1 else ~ones)


def test_worked_example():
    right = torch.tensor([True, True, False])
    calls = torch.tensor([0, 2, 5])
    reward = tool_reward(calls, right)
    assert_close(reward, torch.tensor([1, 1 / 3, 0]), 1)
    got = hdpo_advantages(torch.tensor([1.0, 1.0, 0.1]), reward, right, torch.zeros(3).long())
    assert_close(got.tool, torch.tensor([0.5**0.5, -(0.5**0.5), 0]), 100)
    # mean 0.7, deviations 0.3, 0.3, -0.6: the sample variance is 0.54 / 2.
    assert_close(got.acc, torch.tensor([0.3, 0.3, -0.6]) / 0.27**0.5, 100)
    assert got.qualifies.tolist() == [True, True, False]


def test_scale_and_eps():
    reward, group = torch.tensor([0.0, 1.0]).double(), torch.zeros(2).long()
    right = torch.ones(2, dtype=torch.bool)
    raw = hdpo_advantages(reward, reward, right, group, scale="none")
    assert raw.acc.tolist() == [-0.5, 0.5] == raw.tool.tolist()
    soft = hdpo_advantages(reward, reward, right, group, eps=0.5)
    assert soft.acc[1] == pytest.approx(0.5 / (0.5**0.5 + 0.5))


def test_an_unscored_rollout_is_in_no_mean_whatever_it_holds():
    group = torch.tensor([4, 4, 4, 4])
    scored = torch.tensor([True, True, False, True])
    nan = float("nan")
    reward = torch.tensor([1.0, 0.0, nan, 0.5])
    right = torch.tensor([True, True, True, True])
    got = hdpo_advantages(reward, reward, right, group, scored=scored)
    rest = hdpo_advantages(reward[scored], reward[scored], right[scored], group[scored])
    assert torch.equal(got.acc[scored], rest.acc) and torch.equal(got.tool[scored], rest.tool)
    assert got.acc[2] == 0 and got.tool[2] == 0 and not got.qualifies[2]
    # Left alone by its unscored sibling, a rollout has nothing to be compared with.
    pair = hdpo_advantages(
        reward[:2], reward[:2], right[:2], group[:2], scored=torch.tensor([True, False])
    )
    assert not pair.acc.any() and not pair.tool.any() and not pair.qualifies.any()


def test_a_truncated_rollout_leaves_q_only():
    group = torch.zeros(3).long()
    acc, tool = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.5, 0.25])
    right = torch.ones(3, dtype=torch.bool)
    cut = torch.tensor([False, False, True])
    got = hdpo_advantages(acc, tool, right, group, truncated=cut)
    assert got.tool[2] == 0 and got.tool[0] == -got.tool[1] != 0
    assert got.acc[2] != 0 and got.qualifies.tolist() == [True, True, False]


def test_a_tied_q_qualifies_without_signal():
    right = torch.tensor([True, True, False])
    reward = torch.tensor([0.5, 0.5, 0.0])
    got = hdpo_advantages(reward, reward, right, torch.zeros(3).long())
    assert got.qualifies.tolist() == [True, True, False]
    assert not got.tool_signal.any() and got.acc_signal.all()


def test_nothing_and_dtypes(device):
    none = torch.zeros(0, device=device)
    got = hdpo_advantages(none, none, none.bool(), none.long())
    assert got.acc.shape == (0,) and got.qualifies.dtype == torch.bool
    assert tool_reward(none.long(), none.bool()).dtype == torch.float32
    half = torch.tensor([0.0, 1.0], dtype=torch.bfloat16, device=device)
    group = torch.zeros(2, device=device).int()
    assert hdpo_advantages(half, half, half, group).acc.dtype == torch.bfloat16


def test_no_gradient_flows():
    reward = torch.tensor([0.0, 1.0], requires_grad=True)
    got = hdpo_advantages(reward, reward, torch.ones(2), torch.zeros(2).long())
    assert not got.acc.requires_grad


def test_normalizers():
    flags = {
        "acc": [1.0, 0.0, -1.0, 0.0, 0.0],
        "tool": [0.5, 0.0, -0.5, 0.0, 0.0],
        "qualifies": [True, True, True, False, False],
    }
    acc, tool = torch.tensor(flags["acc"]), torch.tensor(flags["tool"])
    adv = Advantages(acc, tool, torch.tensor(flags["qualifies"]), acc != 0, tool != 0)
    tokens = torch.tensor([1, 10, 100, 1000, 10000])
    scored = torch.tensor([True, True, True, True, False])
    for norm, want in (("signal", 101), ("qualifying", 111), ("all", 1111)):
        n_acc, n_tool = hdpo_normalizers(adv, tokens, scored, norm)
        assert (int(n_acc), int(n_tool)) == (1111, want)
        assert n_acc.dtype == n_tool.dtype == torch.int64 and n_acc.dim() == 0
    assert int(hdpo_normalizers(adv, tokens)[0]) == 11111
    # What is counted per rank and summed is what is counted at once.
    halves = [
        hdpo_normalizers(
            Advantages(
                *(
                    getattr(adv, f)[i]
                    for f in ("acc", "tool", "qualifies", "acc_signal", "tool_signal")
                )
            ),
            tokens[i],
            scored[i],
        )
        for i in (slice(0, 2), slice(2, 5))
    ]
    assert [int(sum(h)) for h in zip(*halves, strict=True)] == [1111, 101]


def test_refusals():
    two, ids = torch.zeros(2), torch.zeros(2).long()
    right = torch.ones(2, dtype=torch.bool)
    cases = [
        (lambda: hdpo_advantages(torch.zeros(3), two, right, ids), r"acc_reward \[2\].*got \[3\]"),
        (lambda: hdpo_advantages(ids, two, right, ids), "acc_reward in a floating dtype"),
        (lambda: hdpo_advantages(two, two, right, two), "group .* of integers"),
        (lambda: hdpo_advantages(two, two, right, ids, scale="var"), "scale must be"),
        (lambda: hdpo_advantages(two, two, right, ids, eps=-1), "eps must be"),
        (lambda: hdpo_advantages(two / 0, two, right, ids), "finite acc_reward"),
        (lambda: tool_reward(ids - 1, right), "tool_calls >= 0, got -1"),
        (lambda: tool_reward(ids, torch.ones(3)), r"correct \[2\]"),
    ]
    adv = hdpo_advantages(two, two, right, ids)
    cases += [
        (lambda: hdpo_normalizers(adv, two), "tokens as integers"),
        (lambda: hdpo_normalizers(adv, ids, tool_norm="x"), "tool_norm must be one of"),
        (lambda: hdpo_normalizers(adv, ids[:1]), r"tokens \[2\]"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
