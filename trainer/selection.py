"""Which rollouts a step of RL learns from, and what they tell of its questions.

Two things go wrong silently when groups are taken as they come. Groups without signal waste the
step: dynamic sampling (DAPO, arXiv 2503.14476) draws others in their place. And a call that was
once unlearned where it was needed does not come back, for a group that never calls says nothing of
calls: counterfactual rollouts compare both actions on every question.

A counterfactual rollout is the policy's own but for its first action, which is opened in its place
if it chose the other. It takes part in the accuracy channel alone, and its opening is learned from
like any other token. Why so, and not weighted by its importance p / b (LOG.md has the numbers):
weighted, its gradient has the expectation of the policy's own, which vanishes with p, so nothing
comes back. Unweighted, an action of two still moves towards the better one, as the sign of its
advantage is that of the difference whatever the odds; only the pace is not the policy's. In the
tool channel a rare call among right answers would be punished the more the rarer it is, and stay
lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

import metis_kernels as mk
from trainer.config import RLConfig
from trainer.types import Mode, Rollout


def group_modes(config: RLConfig) -> list[Mode]:
    """How the rollouts of a group are played: the policy's own first."""
    free = config.group_size - config.forced_calls - config.forced_answers
    return (
        ["allowed"] * free
        + ["forced"] * config.forced_calls
        + ["forbidden"] * config.forced_answers
    )


def group_advantages(rollouts: Sequence[Rollout], config: RLConfig) -> mk.Advantages:
    """Advantages [N] of rollouts that lie group after group. What was forced to call or to answer
    is in the accuracy channel alone."""
    scored = torch.tensor([rollout.scored for rollout in rollouts])
    calls = torch.tensor([rollout.calls for rollout in rollouts])
    correct = torch.tensor([rollout.correct for rollout in rollouts])
    acc_reward = torch.tensor([rollout.accuracy_reward for rollout in rollouts])
    if config.reward == "coupled":
        acc_reward = acc_reward + config.coupled_alpha / (calls + 1)
    return mk.hdpo_advantages(
        acc_reward,
        mk.tool_reward(calls, correct),
        correct,
        torch.arange(len(rollouts)) // config.group_size,
        scored=scored,
        truncated=torch.tensor([r.status == "truncated" or r.mode != "allowed" for r in rollouts]),
    )


def has_signal(advantages: mk.Advantages, config: RLConfig) -> Tensor:
    """[groups] bool: whether a group moves the policy in either channel."""
    signal = advantages.acc_signal.clone()
    if config.reward == "decoupled" and config.loss.w_tool:
        signal |= advantages.tool_signal
    return signal.reshape(-1, config.group_size).any(1)


def channel_shares(
    rollouts: Sequence[Rollout], advantages: mk.Advantages, config: RLConfig
) -> dict[str, Any]:
    """The implicit curriculum: which channel moves the policy, and in how many groups.

    `gradient_share/tool` is the tool channel's part of sum |d loss / d logprob| over the tokens of
    the step, at ratio 1: accuracy first, while groups are still wrong, and economy only once they
    are right. None where neither moves it.
    """
    w_tool = config.loss.w_tool if config.reward == "decoupled" else 0.0
    tokens = torch.tensor([sum(rollout.policy) for rollout in rollouts])
    scored = torch.tensor([rollout.scored for rollout in rollouts])
    n_acc, n_tool = mk.hdpo_normalizers(advantages, tokens, scored, config.loss.tool_norm)
    pull = {
        "acc": config.loss.w_acc * advantages.acc / n_acc.clamp_min(1),
        "tool": w_tool * advantages.tool / n_tool.clamp_min(1),
    }
    total = {name: float((one.abs() * tokens).sum()) for name, one in pull.items()}
    both = sum(total.values())
    acc, tool = (
        flags.reshape(-1, config.group_size).any(1)
        for flags in (advantages.acc_signal, advantages.tool_signal & bool(w_tool))
    )
    return {
        "gradient_share/acc": total["acc"] / both if both else None,
        "gradient_share/tool": total["tool"] / both if both else None,
        "groups/acc_signal": acc.float().mean(),
        "groups/tool_signal": tool.float().mean(),
    }


def pass_rates(rollouts: Sequence[Rollout], config: RLConfig) -> dict[str, float]:
    """Shares of the groups in which all, or none, of the policy's own scored rollouts are right."""
    size = config.group_size
    rates = [_pass_rate(rollouts[n : n + size]) for n in range(0, len(rollouts), size)]
    known = [rate for rate in rates if rate is not None]
    count = max(len(known), 1)
    return {
        "groups/all_right": sum(rate == 1 for rate in known) / count,
        "groups/all_wrong": sum(rate == 0 for rate in known) / count,
    }


def _pass_rate(group: Sequence[Rollout]) -> float | None:
    own = [r.correct for r in group if r.scored and r.mode == "allowed"]
    return sum(own) / len(own) if own else None


def arbitration(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """How often forced calls and forced answers were right in a step; empty without any."""
    values = {}
    for mode, name in (("forced", "call"), ("forbidden", "answer")):
        those = [r.correct for r in rollouts if r.scored and r.mode == mode]
        if those:
            values[f"forced_{name}_accuracy"] = sum(those) / len(those)
    return values


def group_records(
    step: int, rollouts: Sequence[Rollout], config: RLConfig, silent: Sequence[bool]
) -> Iterator[dict[str, Any]]:
    """One record a group for groups.jsonl: the pass-rate history of every prompt. Rates are over
    the policy's own scored rollouts; None where there is none. silent [groups]: dropped for want of
    a signal."""
    size = config.group_size
    for number, start in enumerate(range(0, len(rollouts), size)):
        group = rollouts[start : start + size]
        own = [r for r in group if r.scored and r.mode == "allowed"]
        yield {
            "step": step,
            "question": group[0].question.id,
            "kind": group[0].question.kind,
            "rollouts": len(own),
            "pass_rate": _pass_rate(group),
            "tool_rate": sum(r.calls > 0 for r in own) / len(own) if own else None,
            "dropped": bool(silent[number]),
            **arbitration(group),
        }
