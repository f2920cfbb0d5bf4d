"""Decoupled, group-normalised advantages: one for being right, one for how few tools it took.

Legend: N rollouts of one batch, in any order; g the group (prompt) of a rollout; Q_g the rollouts
of g that answered correctly (arXiv 2604.08545; the equations are DESIGN's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metis_kernels import _impl, _triton
from metis_kernels._triton import jit, tl, triton
from metis_kernels.hdpo import index_sum


@dataclass(frozen=True)
class Advantages:
    """Both channels of N rollouts. Zero is exact, and means: no comparison, so no gradient.

    Example: one group with answers (right, right, wrong) and (0, 2, 5) tool calls has tool
    rewards (1, 1/3, 0), tool advantages (0.71, -0.71, 0) and qualifies (True, True, False).
    """

    acc: Tensor
    """[N] accuracy advantage, floating dtype of the rewards."""
    tool: Tensor
    """[N] tool advantage, same dtype."""
    qualifies: Tensor
    """[N] bool: in Q, and Q has at least two members."""
    acc_signal: Tensor
    """[N] bool: acc differs from 0."""
    tool_signal: Tensor
    """[N] bool: tool differs from 0."""


def tool_reward(tool_calls: Tensor, correct: Tensor) -> Tensor:
    """1 / (calls + 1) for a correct answer, else 0: [N] float32 (float64 for float64 calls).

    tool_calls [N] counts, correct [N] bool or 0/1. Raises ValueError for shapes that differ and,
    on the CPU, for a negative count.
    """
    _same_shape("correct", correct, "tool_calls", tool_calls)
    if tool_calls.device.type == "cpu" and tool_calls.numel() and tool_calls.min() < 0:
        raise ValueError(f"expected tool_calls >= 0, got {tool_calls.min().item()}")
    dtype = torch.float64 if tool_calls.dtype == torch.float64 else torch.float32
    return torch.where(correct != 0, (tool_calls.to(dtype) + 1).reciprocal(), 0)


def hdpo_advantages_ref(
    acc_reward: Tensor,
    tool_reward: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    scored: Tensor | None = None,
    truncated: Tensor | None = None,
    eps: float = 1e-6,
    scale: Literal["std", "none"] = "std",
) -> tuple[list[float], list[float]]:
    """The equations as loops over Python floats: (acc, tool), each N long."""
    n = group.numel()
    acc, tool = [0.0] * n, [0.0] * n
    for g in set(group.tolist()):
        members = [i for i in range(n) if group[i] == g and (scored is None or bool(scored[i]))]
        q = [i for i in members if correct[i] and not (truncated is not None and truncated[i])]
        for chosen, reward, out in ((members, acc_reward, acc), (q, tool_reward, tool)):
            r = [float(reward[i]) for i in chosen]
            if len(r) < 2 or max(r) == min(r):
                continue
            mean = math.fsum(r) / len(r)
            std = math.sqrt(math.fsum((x - mean) ** 2 for x in r) / (len(r) - 1))
            for i, x in zip(chosen, r, strict=True):
                out[i] = (x - mean) / (std + eps) if scale == "std" else x - mean
    return acc, tool


# ---- Triton --------------------------------------------------------------------------------------


@jit
def member_jit(
    rollout, N, g, group_ptr, correct_ptr, scored_ptr, truncated_ptr,
    QUALIFYING: tl.constexpr, HAS_SCORED: tl.constexpr, HAS_TRUNCATED: tl.constexpr,
):  # fmt: skip
    """Which rollouts of group g are compared; QUALIFYING: which of them are in Q_g."""
    inside = rollout < N
    member = inside & (tl.load(group_ptr + rollout, mask=inside, other=0) == g)
    if HAS_SCORED:
        member = member & (tl.load(scored_ptr + rollout, mask=inside, other=0) != 0)
    if QUALIFYING:
        member = member & (tl.load(correct_ptr + rollout, mask=inside, other=0) != 0)
        if HAS_TRUNCATED:
            member = member & (tl.load(truncated_ptr + rollout, mask=inside, other=1) == 0)
    return member


@jit
def channel_jit(
    reward_ptr, row, N, eps, group_ptr, correct_ptr, scored_ptr, truncated_ptr,
    QUALIFYING: tl.constexpr, HAS_SCORED: tl.constexpr, HAS_TRUNCATED: tl.constexpr,
    STD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(advantage, whether it is compared at all) of one rollout in one channel.

    Rewards are taken as y in [0, 1] between the group's lowest and highest, and sums over them are
    sums of integers, multiples of 1 / unit: no order of the rollouts can change a bit of them.
    """
    g = tl.load(group_ptr + row)
    lanes = tl.arange(0, BLOCK)
    high = tl.full((), float("-inf"), tl.float64)
    low = tl.full((), float("inf"), tl.float64)
    count = tl.full((), 0, tl.int64)
    broken = tl.full((), 0, tl.int32)
    for start in range(0, N, BLOCK):
        member = member_jit(
            start + lanes, N, g, group_ptr, correct_ptr, scored_ptr, truncated_ptr,
            QUALIFYING, HAS_SCORED, HAS_TRUNCATED,
        )  # fmt: skip
        x = tl.load(reward_ptr + start + lanes, mask=member, other=0.0).to(tl.float64)
        broken = tl.maximum(broken, tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1), 0))
        high = tl.maximum(high, tl.max(tl.where(member, x, float("-inf")), 0))
        low = tl.minimum(low, tl.min(tl.where(member, x, float("inf")), 0))
        count += tl.sum(member.to(tl.int64), 0)
    mine = member_jit(
        row, N, g, group_ptr, correct_ptr, scored_ptr, truncated_ptr,
        QUALIFYING, HAS_SCORED, HAS_TRUNCATED,
    )  # fmt: skip
    compared = mine & (count >= 2)
    differ = compared & (high > low) & (broken == 0)
    spread = tl.where(differ, high - low, 1.0)
    low = tl.where(differ, low, 0.0)
    stop = tl.where(differ, N, 0)  # where nothing differs, there is nothing to sum

    unit = tl.full((), 4611686018427387904.0, tl.float64)  # 2^62; count * unit stays below 2^63
    room = tl.full((), 1, tl.int64)
    while room < count:
        room *= 2
        unit *= 0.5
    total = tl.full((), 0, tl.int64)
    for start in range(0, stop, BLOCK):
        member = member_jit(
            start + lanes, N, g, group_ptr, correct_ptr, scored_ptr, truncated_ptr,
            QUALIFYING, HAS_SCORED, HAS_TRUNCATED,
        )  # fmt: skip
        x = tl.load(reward_ptr + start + lanes, mask=member, other=0.0).to(tl.float64)
        y = tl.where(member, (x - low) / spread, 0.0)
        total += tl.sum((y * unit).to(tl.int64), 0)
    members = tl.maximum(count, 2).to(tl.float64)
    mean = total.to(tl.float64) / (unit * members)
    y = (tl.load(reward_ptr + row, mask=differ, other=0.0).to(tl.float64) - low) / spread
    advantage = (y - mean) * spread
    if STD:
        squares = tl.full((), 0, tl.int64)
        for start in range(0, stop, BLOCK):
            member = member_jit(
                start + lanes, N, g, group_ptr, correct_ptr, scored_ptr, truncated_ptr,
                QUALIFYING, HAS_SCORED, HAS_TRUNCATED,
            )  # fmt: skip
            x = tl.load(reward_ptr + start + lanes, mask=member, other=0.0).to(tl.float64)
            gap = tl.where(member, (x - low) / spread - mean, 0.0)
            squares += tl.sum((gap * gap * unit).to(tl.int64), 0)
        variance = squares.to(tl.float64) / (unit * (members - 1))
        advantage = advantage / (tl.sqrt(variance) * spread + eps)
    advantage = tl.where(differ, advantage, 0.0)
    return tl.where(mine & (broken != 0), float("nan"), advantage), compared


@jit
def advantages_kernel(
    # [N] each
    acc_reward_ptr, tool_reward_ptr, correct_ptr, group_ptr, scored_ptr, truncated_ptr,
    acc_ptr, tool_ptr, qualifies_ptr, acc_signal_ptr, tool_signal_ptr,
    N, eps,
    HAS_SCORED: tl.constexpr, HAS_TRUNCATED: tl.constexpr, STD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One rollout, both channels, against all N rollouts: what is not of its group is masked."""
    row = tl.program_id(0).to(tl.int64)
    acc, _ = channel_jit(
        acc_reward_ptr, row, N, eps, group_ptr, correct_ptr, scored_ptr, truncated_ptr,
        False, HAS_SCORED, HAS_TRUNCATED, STD, BLOCK,
    )  # fmt: skip
    tool, qualifies = channel_jit(
        tool_reward_ptr, row, N, eps, group_ptr, correct_ptr, scored_ptr, truncated_ptr,
        True, HAS_SCORED, HAS_TRUNCATED, STD, BLOCK,
    )  # fmt: skip
    acc = acc.to(acc_ptr.dtype.element_ty)
    tool = tool.to(tool_ptr.dtype.element_ty)
    tl.store(acc_ptr + row, acc)
    tl.store(tool_ptr + row, tool)
    tl.store(qualifies_ptr + row, qualifies)
    tl.store(acc_signal_ptr + row, acc != 0)
    tl.store(tool_signal_ptr + row, tool != 0)


BLOCK_ROLLOUTS, WARPS = 256, 4
"""Rollouts that a program looks at at once, and warps that share them."""


def _advantages_triton(
    acc_reward: Tensor,
    tool_reward: Tensor,
    correct: Tensor,
    group: Tensor,
    scored: Tensor | None,
    truncated: Tensor | None,
    eps: float,
    scale: str,
) -> Advantages:
    """One launch. N^2 comparisons, in cache: for the thousands of rollouts of a step."""
    n = group.numel()
    flag = torch.empty(n, dtype=torch.bool, device=group.device)
    acc, tool = torch.empty_like(acc_reward), torch.empty_like(tool_reward)
    result = Advantages(acc, tool, flag, torch.empty_like(flag), torch.empty_like(flag))
    if n == 0:
        return result
    given = (acc_reward, tool_reward, correct, group, scored, truncated)
    given = (group if x is None else x.contiguous() for x in given)
    advantages_kernel[(n,)](
        *given, acc, tool, flag, result.acc_signal, result.tool_signal, n, eps,
        HAS_SCORED=scored is not None, HAS_TRUNCATED=truncated is not None, STD=scale == "std",
        BLOCK=min(BLOCK_ROLLOUTS, triton.next_power_of_2(n)), num_warps=WARPS,
    )  # fmt: skip
    return result


# ---- torch ---------------------------------------------------------------------------------------


def _advantages_torch(
    acc_reward: Tensor,
    tool_reward: Tensor,
    correct: Tensor,
    group: Tensor,
    scored: Tensor | None,
    truncated: Tensor | None,
    eps: float,
    scale: str,
) -> Advantages:
    member, in_q = _members(correct, group, scored, truncated)
    acc, _ = _normalise(acc_reward, group, member, eps, scale)
    tool, size_q = _normalise(tool_reward, group, in_q, eps, scale)
    return Advantages(acc, tool, in_q & (size_q >= 2), acc != 0, tool != 0)


def _members(
    correct: Tensor, group: Tensor, scored: Tensor | None, truncated: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Bool [N] each: who is compared in the accuracy channel, and who is in Q."""
    member = torch.ones_like(group, dtype=torch.bool) if scored is None else scored != 0
    in_q = member & (correct != 0)
    return member, in_q if truncated is None else in_q & (truncated == 0)


def _normalise(
    reward: Tensor, group: Tensor, member: Tensor, eps: float, scale: str
) -> tuple[Tensor, Tensor]:
    """(advantage [N] in reward's dtype, members of each rollout's group [N]) over the members."""
    n = group.numel()
    value = torch.where(member, reward.double(), 0)
    # By value within each group: whoever permutes the rollouts, the sums see one order. (The zeros
    # of non-members change no sum.)
    order = value.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    value, inside, by_group = value[order], member[order], group[order]
    starts = torch.ones_like(inside)
    starts[1:] = by_group[1:] != by_group[:-1]
    rank = starts.cumsum(0) - 1

    count = index_sum(n, rank, inside.double())[rank]
    mean = index_sum(n, rank, value)[rank] / count.clamp_min(1)
    deviation = torch.where(inside, value - mean, 0)
    high = _extreme(value.masked_fill(~inside, -math.inf), rank, "amax")
    low = _extreme(value.masked_fill(~inside, math.inf), rank, "amin")
    compared = inside & (high != low)
    if scale == "std":
        variance = index_sum(n, rank, deviation.square())[rank] / (count - 1).clamp_min(1)
        deviation = deviation / (variance.sqrt() + eps)
    advantage = torch.where(compared, deviation, 0)
    result, size = torch.empty_like(reward), torch.empty_like(count)
    result[order] = advantage.to(reward.dtype)
    size[order] = count
    return result, size


def _extreme(value: Tensor, rank: Tensor, which: Literal["amax", "amin"]) -> Tensor:
    """[N]: the largest or smallest value of each element's group."""
    bound = torch.zeros_like(value)
    return bound.scatter_reduce(0, rank, value, which, include_self=False)[rank]


_impl.register(
    "hdpo_advantages",
    "triton",
    _advantages_triton,
    lambda device, _: _triton.unavailable(device),
)
_impl.register("hdpo_advantages", "torch", _advantages_torch)


def hdpo_advantages(
    acc_reward: Tensor,
    tool_reward: Tensor,
    correct: Tensor,
    group: Tensor,
    *,
    scored: Tensor | None = None,
    truncated: Tensor | None = None,
    eps: float = 1e-6,
    scale: Literal["std", "none"] = "std",
    impl: str = "auto",
) -> Advantages:
    """Advantages of N rollouts, each against its own group. No gradient, no synchronisation.

    acc_reward [N] and tool_reward [N]: floating. correct [N]: bool or 0/1. group [N]: integers, any
    values, in any order, groups of any size. scored [N] bool: False where judge or tool
    infrastructure failed; such a rollout gets zeros and is in nobody's mean, whatever its rewards
    hold (NaN, say). truncated [N] bool: scored in the accuracy channel, but never in Q.
    scale="std" divides by std (ddof 1) + eps; "none" only subtracts the mean.

    The arithmetic is float64, and no sum depends on an order: permuting the rollouts permutes the
    result bitwise. A group (or a Q) of one, or whose rewards are all equal, gets
    exactly 0. Raises ValueError for shapes, dtypes or devices that differ, an unknown scale, eps
    < 0 and, on the CPU, a non-finite reward of a scored rollout; RuntimeError where impl cannot
    run here.
    """
    if scale not in ("std", "none"):
        raise ValueError(f'scale must be "std" or "none", got {scale!r}')
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    if group.dim() != 1 or group.is_floating_point() or group.dtype == torch.bool:
        raise ValueError(f"expected group [N] of integers, got {_say(group)}")
    given = {"acc_reward": acc_reward, "tool_reward": tool_reward, "correct": correct}
    given |= {"scored": scored, "truncated": truncated}
    for name, value in given.items():
        if value is not None:
            _same_shape(name, value, "group", group)
            if name.endswith("reward") and not value.is_floating_point():
                raise ValueError(f"expected {name} in a floating dtype, got {value.dtype}")
    member, in_q = _members(correct, group, scored, truncated)
    for name, used in (("acc_reward", member), ("tool_reward", in_q)):
        if group.device.type == "cpu" and bool((used & ~torch.isfinite(given[name])).any()):
            raise ValueError(
                f"expected finite {name} for scored rollouts, got NaN or infinity; "
                "mark a rollout that could not be scored in `scored`"
            )
    run = _impl.implementation("hdpo_advantages", impl, group.device)
    return run(
        acc_reward.detach(), tool_reward.detach(), correct, group, scored, truncated, eps, scale
    )


def hdpo_normalizers(
    advantages: Advantages,
    tokens: Tensor,
    scored: Tensor | None = None,
    tool_norm: Literal["signal", "qualifying", "all"] = "signal",
) -> tuple[Tensor, Tensor]:
    """(n_acc, n_tool) of an optimizer batch: 0-d int64, to be summed over ranks and then passed on.

    tokens [N]: how many tokens the policy wrote in each rollout. n_acc counts those of every scored
    rollout, tied groups included; n_tool those of the scored rollouts with a non-zero tool
    advantage ("signal"), in Q with |Q| >= 2 ("qualifying"), or of all ("all"). Count once, before
    the batch is cut into micro-batches: then the cut does not change the gradient.
    Raises ValueError for shapes that differ, a floating dtype or an unknown tool_norm.
    """
    _same_shape("tokens", tokens, "advantages.acc", advantages.acc)
    if tokens.is_floating_point():
        raise ValueError(f"expected tokens as integers, got {tokens.dtype}")
    chosen = {"signal": advantages.tool_signal, "qualifying": advantages.qualifies, "all": None}
    if tool_norm not in chosen:
        raise ValueError(f"tool_norm must be one of {tuple(chosen)}, got {tool_norm!r}")
    tokens = tokens.long()
    if scored is not None:
        _same_shape("scored", scored, "tokens", tokens)
        tokens = torch.where(scored != 0, tokens, 0)
    tool_tokens = tokens
    if chosen[tool_norm] is not None:
        tool_tokens = torch.where(chosen[tool_norm], tokens, 0)
    return tokens.sum(), tool_tokens.sum()


def _same_shape(name: str, value: Tensor, other: str, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"expected {name} {list(like.shape)} as {other} is, got {_say(value)}")
    if value.device != like.device:
        raise ValueError(f"expected {name} on {like.device} as {other} is, got {value.device}")


def _say(value: Tensor) -> str:
    return f"{list(value.shape)} {value.dtype}"
