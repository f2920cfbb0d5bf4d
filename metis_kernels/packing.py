"""Rollouts -> packed batches in which a group's common prefix is stored and computed once.

Legend: A axes of the positions, n tokens of a rollout, T rows of a batch, S targets (tokens that
the policy wrote), G rollouts of a group. `PrefixLayout` says how they lie.

What is kept of a rollout are its tokens before the last one that the policy wrote: nothing behind
carries gradient, and that one is a label only. A rollout without a gradient is not packed at all.

The common prefix is compared in full: ids first, then positions over what the ids have in common.
Positions that follow from the ids and images before them (M-RoPE's do) cannot differ there, so the
second comparison finds nothing for them; it is kept because it is exact for every other rule too.
It is skipped where both tensors are the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from metis_kernels import _cpp, _impl
from metis_kernels._bins import Plan, binned, pieces_of, planned, work_of
from metis_kernels._layout import PrefixLayout
from metis_kernels._trajectories import (
    PER_TOKEN,
    ImageSpan,
    Rollouts,
    Trajectory,
    checked,
    cut_at_images,
    kept_images,
)
from metis_kernels.hdpo import HDPOTargets

__all__ = ["ImageRef", "ImageSpan", "PackedBatch", "Trajectory", "pack", "unpack", "unpack_targets"]


@dataclass(frozen=True)
class ImageRef:
    """Image `index` of groups[group][rollout]."""

    group: int
    rollout: int
    index: int


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. Targets lie member after member, in the order of their tokens."""

    ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[A, T] int64: each rollout's own, so a response's continue its prefix's."""
    layout: PrefixLayout
    images: tuple[ImageRef, ...]
    """In the order of their placeholders in ids; those of a shared prefix once."""
    row: Tensor
    """[S] int64: the row that predicts the target; a prefix row may appear G times."""
    label: Tensor
    """[S] int64."""
    acc_advantage: Tensor
    """[S] float32."""
    tool_advantage: Tensor
    """[S] float32."""
    old_logprob: Tensor | None
    """[S] float32, or None where the trajectories have none; the two below likewise."""
    ref_logprob: Tensor | None
    is_weight: Tensor | None
    sequence: Tensor
    """[S] int64: which member the target is of."""
    members: tuple[tuple[int, int], ...]
    """(group, rollout) of each response, in the layout's order."""
    attention_cost: float
    """What `work` weighs a query-key pair with."""

    @property
    def T(self) -> int:
        """Rows."""
        return self.layout.tokens

    @property
    def S(self) -> int:
        """Targets."""
        return len(self.row)

    @property
    def work(self) -> float:
        """Rows + attention_cost * query-key pairs: the time it takes, in tokens' linear work."""
        return work_of(self.layout, self.attention_cost)

    @cached_property
    def target_counts(self) -> tuple[int, ...]:
        """Targets of each member. (Found on the CPU; `to` hands it on.)"""
        return tuple(self.sequence.bincount(minlength=len(self.members)).tolist())

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on another device."""
        moved = {n: v.to(device) for n, v in vars(self).items() if isinstance(v, Tensor)}
        there = replace(self, **moved)
        there.__dict__["target_counts"] = self.target_counts
        return there

    def targets(
        self,
        n_acc: Tensor | float,
        n_tool: Tensor | float,
        *,
        old_logprob: Tensor | None = None,
        ref_logprob: Tensor | None = None,
    ) -> HDPOTargets:
        """What the loss is told. The logprobs given [S] take the place of the batch's own."""
        return HDPOTargets(
            self.row,
            self.label,
            self.old_logprob if old_logprob is None else old_logprob,
            self.acc_advantage,
            self.tool_advantage,
            n_acc,
            n_tool,
            self.ref_logprob if ref_logprob is None else ref_logprob,
            self.is_weight,
            self.sequence,
        )


def unpack(batch: PackedBatch, values: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(rows of its prefix, rows of its response) of values [T, ...] for each member, as views.
    Raises ValueError where values have another number of rows."""
    if values.dim() < 1 or len(values) != batch.T:
        raise ValueError(f"expected values [T, ...], T = {batch.T}, got {list(values.shape)}")
    found, start = [], 0
    for prefix, lengths in zip(batch.layout.prefixes, batch.layout.responses, strict=True):
        shared = values[start : start + prefix]
        start += prefix
        for length in lengths:
            found.append((shared, values[start : start + length]))
            start += length
    return found


def unpack_targets(batch: PackedBatch, values: Tensor) -> list[Tensor]:
    """Each member's part of values [S, ...], as views. Raises ValueError likewise."""
    if values.dim() < 1 or len(values) != batch.S:
        raise ValueError(f"expected values [S, ...], S = {batch.S}, got {list(values.shape)}")
    return list(values.split(batch.target_counts)) if batch.members else []


# ---- C++ and torch -------------------------------------------------------------------------------


class _Tensors(NamedTuple):
    """Those of a batch, in the order in which C++ takes them."""

    ids: Tensor
    positions: Tensor
    row: Tensor
    label: Tensor
    sequence: Tensor
    acc_advantage: Tensor
    tool_advantage: Tensor
    old_logprob: Tensor | None
    ref_logprob: Tensor | None
    is_weight: Tensor | None


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cpu")  # whatever torch's defaults are


class CppSteps:
    """What reads and writes tokens, in csrc/packing.cpp."""

    def __init__(self, rollouts: Rollouts):
        self._rollouts = rollouts  # what C++ points to lives as long as this
        positions = rollouts.positions or []
        self._core = _cpp._C.Rollouts(
            [x.numel() for x in rollouts.ids],
            [x.data_ptr() for x in rollouts.ids],
            [x.data_ptr() for x in rollouts.policy],
            [x.data_ptr() for x in positions],
            [x.stride(0) for x in positions],
            rollouts.axes,
            [t.acc_advantage for t in rollouts.trajectories],
            [t.tool_advantage for t in rollouts.trajectories],
            [[x.data_ptr() for x in rollouts.per_token.get(name, ())] for name in PER_TOKEN],
            torch.get_num_threads(),
        )

    def policy_tokens(self) -> list[Sequence[int]]:
        """(first, last, count) of each rollout's policy tokens; (-1, -1, 0) where it has none."""
        return self._core.policy_tokens()

    def common_prefixes(self, groups: list[list[int]]) -> list[int]:
        """The longest prefix in ids and positions that the rollouts of each group have in common,
        among the tokens before their last policy token."""
        return self._core.common_prefixes(groups)

    def assemble(self, plans: list[Plan], counts: list[int]) -> list[_Tensors]:
        """The tensors of each batch. counts: targets of each rollout."""
        given, axes = self._rollouts.per_token, self._rollouts.axes
        made, batches = [], []
        for plan in plans:
            T, S = plan.layout.tokens, sum(counts[m] for m in plan.members)
            ids, positions = _empty(T), _empty(axes, T)
            indices = [_empty(S) for _ in range(3)]
            numbers = [_empty(S, dtype=torch.float32) for _ in range(2)]
            numbers += [
                _empty(S, dtype=torch.float32) if name in given else None for name in PER_TOKEN
            ]
            made.append(_Tensors(ids, positions, *indices, *numbers))
            views = [_cpp._view(n, x) for n, x in made[-1]._asdict().items()]
            layout = plan.layout
            sizes = [len(lengths) for lengths in layout.responses]
            batches.append(_cpp._C.PackingBatch(layout.prefixes, sizes, plan.members, *views))
        self._core.assemble(batches)
        return made


class TorchSteps:
    """The same in torch, one rollout after the other."""

    def __init__(self, rollouts: Rollouts):
        self._rollouts = rollouts
        self._at = [x.nonzero().flatten() for x in rollouts.policy]

    def policy_tokens(self) -> list[Sequence[int]]:
        return [(int(t[0]), int(t[-1]), len(t)) if len(t) else (-1, -1, 0) for t in self._at]

    def common_prefixes(self, groups: list[list[int]]) -> list[int]:
        return [self._common(members) for members in groups]

    def _common(self, members: list[int]) -> int:
        ids, positions = self._rollouts.ids, self._rollouts.positions
        least, first = min(int(self._at[m][-1]) for m in members), members[0]
        for other in members[1:]:
            differ = ids[first][:least] != ids[other][:least]
            if positions is not None:
                differ |= (positions[first][:, :least] != positions[other][:, :least]).any(0)
            where = differ.nonzero()
            least = int(where[0]) if len(where) else least
        return least

    def assemble(self, plans: list[Plan], counts: list[int]) -> list[_Tensors]:
        return [self._assembled(plan) for plan in plans]

    def _assembled(self, plan: Plan) -> _Tensors:
        r = self._rollouts
        tokens: list[tuple[int, slice]] = []  # (rollout, which of its tokens)
        targets: dict[str, list[Tensor]] = {name: [] for name in _Tensors._fields[2:]}
        start, members = 0, iter(enumerate(plan.members))
        for prefix, lengths in zip(plan.layout.prefixes, plan.layout.responses, strict=True):
            prefix_start, group_start = start, len(tokens)
            start += prefix
            for length in lengths:
                number, m = next(members)
                if len(tokens) == group_start:
                    tokens.append((m, slice(0, prefix)))
                tokens.append((m, slice(prefix, prefix + length)))
                at, t = self._at[m], r.trajectories[m]
                before = at - 1
                row = torch.where(before < prefix, prefix_start + before, start + before - prefix)
                targets["row"].append(row)
                targets["label"].append(r.ids[m][at])
                targets["sequence"].append(torch.full_like(at, number))
                for name in ("acc_advantage", "tool_advantage"):
                    own = torch.full_like(at, float(getattr(t, name)), dtype=torch.float32)
                    targets[name].append(own)
                for name, given in r.per_token.items():
                    targets[name].append(given[m][at])
                start += length
        positions = r.positions or [torch.arange(len(x), device="cpu").unsqueeze(0) for x in r.ids]
        joined = {
            name: _joined(parts, name) if name in r.per_token or name not in PER_TOKEN else None
            for name, parts in targets.items()
        }
        return _Tensors(
            torch.cat([r.ids[m][part] for m, part in tokens]) if tokens else _empty(0),
            torch.cat([positions[m][:, part] for m, part in tokens], 1)
            if tokens
            else _empty(r.axes, 0),
            **joined,
        )


def _joined(parts: list[Tensor], name: str) -> Tensor:
    dtype = torch.int64 if name in ("row", "label", "sequence") else torch.float32
    return torch.cat(parts) if parts else _empty(0, dtype=dtype)


_impl.register("packing", "cpp", CppSteps, _cpp.unavailable)
_impl.register("packing", "torch", TorchSteps)


# ---- public --------------------------------------------------------------------------------------


def pack(
    groups: Sequence[Sequence[Trajectory]],
    max_tokens: int,
    *,
    ranks: int = 1,
    share: bool = True,
    keep_all: bool = False,
    attention_cost: float = 4e-5,
    impl: str = "auto",
) -> list[PackedBatch]:
    """Micro-batches of at most max_tokens rows, as few as first-fit decreasing finds, with similar
    work. Deterministic; both implementations give the same.

    groups: the rollouts of one prompt each. Left out are trajectories without a policy token and,
    unless keep_all (for KL or entropy in the loss), those whose advantages are both 0. A group's
    common prefix (ids, positions and image keys, no image split) is stored once unless share is
    False; a group that does not fit is cut between responses, each part with the prefix.

    ranks: rank r takes batches[r::ranks]; there are as many for each, and those of a round have
    similar work. Where rollouts are too few for that, some batches are empty (T = S = 0).
    attention_cost: time of a query-key pair as a share of the time of a token's linear layers.

    Raises ValueError where a trajectory is malformed (see `Trajectory`) or, alone, longer than
    max_tokens; RuntimeError where impl cannot run here.
    """
    for name, value in (("max_tokens", max_tokens), ("ranks", ranks)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    if not 0 <= attention_cost < math.inf:
        raise ValueError(f"attention_cost must be a finite number >= 0, got {attention_cost}")
    make_steps = _impl.implementation("packing", impl, "cpu")
    rollouts = checked(groups)
    steps = make_steps(rollouts)
    found = steps.policy_tokens()
    kept, counts = [last for _, last, _ in found], [count for *_, count in found]
    members: dict[int, list[int]] = {}
    images: dict[int, int] = {}
    for number, (t, (first, last, _)) in enumerate(zip(rollouts.trajectories, found, strict=True)):
        if first == 0:
            raise ValueError(
                f"{rollouts.name(number)}: token 0 is marked as written by the policy, and nothing "
                "predicts it; put the prompt (or a start token) before it"
            )
        if last < 0 or not (keep_all or t.acc_advantage or t.tool_advantage):
            continue
        if last > max_tokens:
            raise ValueError(
                f"{rollouts.name(number)} has {last} tokens before its last policy token, more "
                f"than max_tokens={max_tokens}; raise max_tokens, or shorten or leave out the "
                "rollout (fewer or smaller images, a lower limit when sampling)"
            )
        images[number] = kept_images(t, last, rollouts.name(number)) if t.images else 0
        members.setdefault(rollouts.where[number][0], []).append(number)
    prefixes = _prefixes(steps, rollouts, members, images) if share else {}
    pieces = [
        piece
        for group, of_group in members.items()
        for piece in pieces_of(
            group, prefixes.get(group, 0), of_group, kept, max_tokens, attention_cost
        )
    ]
    bins = binned(pieces, kept, max_tokens, ranks, attention_cost)
    plans = planned(bins, kept, attention_cost, ranks)
    tensors = steps.assemble(plans, counts)
    return [
        PackedBatch(
            **made._asdict(),
            layout=plan.layout,
            images=_images_of(plan, rollouts, images),
            members=tuple(rollouts.where[m] for m in plan.members),
            attention_cost=attention_cost,
        )
        for plan, made in zip(plans, tensors, strict=True)
    ]


def _prefixes(
    steps: CppSteps | TorchSteps,
    rollouts: Rollouts,
    members: dict[int, list[int]],
    images: dict[int, int],
) -> dict[int, int]:
    """The common prefix of each group that has more than one rollout."""
    shared = {group: some for group, some in members.items() if len(some) > 1}
    found = steps.common_prefixes(list(shared.values()))
    return {
        group: cut_at_images([rollouts.trajectories[m].images[: images[m]] for m in some], prefix)
        for (group, some), prefix in zip(shared.items(), found, strict=True)
    }


def _images_of(plan: Plan, rollouts: Rollouts, images: dict[int, int]) -> tuple[ImageRef, ...]:
    found, members = [], iter(plan.members)
    for prefix, lengths in zip(plan.layout.prefixes, plan.layout.responses, strict=True):
        for i in range(len(lengths)):
            m = next(members)
            spans = rollouts.trajectories[m].images[: images[m]]
            found += [
                ImageRef(*rollouts.where[m], index)
                for index, span in enumerate(spans)
                if i == 0 or span.start >= prefix
            ]
    return tuple(found)
