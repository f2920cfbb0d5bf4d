"""The rollouts that `pack` is given: what they are, what may be wrong, where images end a prefix.

Legend: A axes of the positions, n tokens of a rollout. A leaf: it imports torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

PER_TOKEN = ("old_logprob", "ref_logprob", "is_weight")


@dataclass(frozen=True)
class ImageSpan:
    """The placeholder tokens [start, stop) of one image."""

    start: int
    stop: int
    key: int
    """Images with equal keys are the same picture."""


@dataclass(frozen=True)
class Trajectory:
    """One rollout as tokens; tensors on the CPU. `pack` checks it."""

    ids: Tensor
    """[n] int64."""
    policy: Tensor
    """[n] bool: the tokens that the policy wrote. Never the first: nothing predicts it."""
    acc_advantage: float = 0.0
    tool_advantage: float = 0.0
    images: tuple[ImageSpan, ...] = ()
    """In the order of their tokens; disjoint."""
    positions: Tensor | None = None
    """[A, n] int64, A = 3 for M-RoPE. None: 0..n-1 on one axis."""
    old_logprob: Tensor | None = None
    """[n] float32, read where policy holds; the two below likewise."""
    ref_logprob: Tensor | None = None
    is_weight: Tensor | None = None
    name: str = ""
    """For messages."""


class Rollouts(NamedTuple):
    """Every trajectory that came, checked, one list a column."""

    where: list[tuple[int, int]]
    trajectories: list[Trajectory]
    ids: list[Tensor]
    policy: list[Tensor]
    positions: list[Tensor] | None
    """Rows side by side; None: all are 0..n-1."""
    axes: int
    per_token: dict[str, list[Tensor]]
    """Of PER_TOKEN those that were given."""

    def name(self, number: int) -> str:
        return _name(self.trajectories[number], *self.where[number])


def _name(t: Trajectory, group: int, rollout: int) -> str:
    place = f"group {group}, rollout {rollout}"
    return f"trajectory {t.name!r} ({place})" if t.name else f"trajectory of {place}"


def checked(groups: Sequence[Sequence[Trajectory]]) -> Rollouts:
    where = [(g, r) for g, group in enumerate(groups) for r in range(len(group))]
    trajectories = list(chain.from_iterable(groups))
    axes = None
    for t, place in zip(trajectories, where, strict=True):
        fault = _fault(t)
        if fault is None:
            own = 1 if t.positions is None else t.positions.shape[0]
            axes = own if axes is None else axes
            if own != axes:
                fault = (
                    f"its positions have {own} axes (None: 1) but those of "
                    f"{_name(trajectories[0], *where[0])} have {axes}; give all the same number"
                )
        if fault is not None:
            raise ValueError(f"{_name(t, *place)}: {fault}")
    per_token = {}
    for name in PER_TOKEN:
        given = [getattr(t, name) for t in trajectories]
        absent = [i for i, x in enumerate(given) if x is None]
        if absent and len(absent) < len(given):
            raise ValueError(
                f"{_name(trajectories[absent[0]], *where[absent[0]])}: it has no {name} but "
                f"{len(given) - len(absent)} of {len(given)} trajectories have; give {name} to all "
                "or to none"
            )
        if not absent and given:
            per_token[name] = [x.detach().contiguous() for x in given]
    positions = None
    if any(t.positions is not None for t in trajectories):
        positions = [
            torch.arange(t.ids.numel(), device="cpu").unsqueeze(0) if (p := t.positions) is None
            else p if p.stride(1) == 1 else p.contiguous()
            for t in trajectories
        ]  # fmt: skip
    ids = [t.ids.contiguous() for t in trajectories]
    policy = [t.policy.contiguous() for t in trajectories]
    return Rollouts(where, trajectories, ids, policy, positions, axes or 1, per_token)


def _fault(t: Trajectory) -> str | None:
    """What is wrong with a trajectory in itself, or None."""
    if not isinstance(t.ids, Tensor) or t.ids.dim() != 1:
        return f"expected ids [n] int64, got {_said(t.ids)}"
    n = t.ids.numel()  # len() of a tensor takes ten times as long
    if t.ids.dtype != torch.int64 or not t.ids.is_cpu:
        return f"expected ids [n] int64 on the CPU, got {_said(t.ids)}"
    p = t.policy
    if not _is(p, torch.bool) or p.dim() != 1 or p.numel() != n:
        return f"expected policy [{n}] bool on the CPU, as ids are, got {_said(p)}"
    p = t.positions
    if p is not None and (
        not _is(p, torch.int64) or p.dim() != 2 or p.shape[1] != n or p.shape[0] < 1
    ):
        return f"expected positions [A, {n}] int64 on the CPU, A >= 1, got {_said(p)}"
    for name in PER_TOKEN:
        p = getattr(t, name)
        if p is not None and (not _is(p, torch.float32) or p.dim() != 1 or p.numel() != n):
            return f"expected {name} [{n}] float32 on the CPU, got {_said(p)}"
    if not (math.isfinite(t.acc_advantage) and math.isfinite(t.tool_advantage)):
        return (
            f"expected finite advantages, got acc_advantage={t.acc_advantage} and "
            f"tool_advantage={t.tool_advantage}; leave a rollout that could not be scored out"
        )
    end = 0
    for number, span in enumerate(t.images):
        if not end <= span.start < span.stop <= n:
            return (
                f"image {number} takes tokens [{span.start}, {span.stop}), but images must be "
                f"sorted, disjoint, not empty and inside [{end}, {n}) here"
            )
        end = span.stop
    return None


def _is(x: object, dtype: torch.dtype) -> bool:
    return isinstance(x, Tensor) and x.dtype == dtype and x.is_cpu


def _said(x: object) -> str:
    if not isinstance(x, Tensor):
        return repr(type(x).__name__)
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"


def kept_images(t: Trajectory, last: int, name: str) -> int:
    """How many of its images lie before `last`, the index of the last policy token."""
    for number, span in enumerate(t.images):
        if span.stop > last:
            if span.start <= last:
                raise ValueError(
                    f"{name}: image {number} takes tokens [{span.start}, {span.stop}), and token "
                    f"{last} in it is marked as written by the policy; a placeholder is never: "
                    "mend policy or images"
                )
            return number
    return len(t.images)


def cut_at_images(images: list[tuple[ImageSpan, ...]], prefix: int) -> int:
    """The longest part of a common prefix that splits no image, where each rollout has `images`:
    an image is common if all have the same one at the same place."""
    for spans in zip(*images, strict=False):
        if spans.count(spans[0]) < len(spans):
            return min(prefix, *(span.start for span in spans))
        if spans[0].stop > prefix:
            return min(prefix, spans[0].start)
    common = min(map(len, images))
    return min([prefix, *(spans[common].start for spans in images if len(spans) > common)])
