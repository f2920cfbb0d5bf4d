"""From rollouts to micro-batches: groups packed behind their shared prompts, and their pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL.Image import Image
from torch import Tensor

import metis_kernels as mk
from metis_kernels.adapters import hf
from trainer.model import VisionLanguageModel
from trainer.types import Rollout


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rollouts in one row of tokens, and the pictures in it."""

    packed: mk.PackedBatch
    rollouts: tuple[Rollout, ...]
    """In the order of packed.members."""
    images: tuple[Image, ...]
    """In the order of their placeholders; those of a shared prompt once."""

    def hidden(self, vlm: VisionLanguageModel) -> Tensor:
        """[T, H] hidden states of the policy; the LM head is not run."""
        pixels = vlm.pixels(self.images) if self.images else {}
        return hf.hidden_states(vlm.model, self.packed, **pixels)


def pack(
    vlm: VisionLanguageModel,
    groups: Sequence[Sequence[Rollout]],
    max_tokens: int,
    acc: Sequence[Sequence[float]] | None = None,
    tool: Sequence[Sequence[float]] | None = None,
    *,
    keep_all: bool = False,
    ranks: int = 1,
) -> list[Batch]:
    """Micro-batches of at most `max_tokens` packed tokens, a multiple of `ranks` of them.

    acc, tool: the advantages of each rollout, in the shape of `groups` (None: 0). A rollout with
    neither is left out unless keep_all is true (SFT, or a loss with KL or entropy in it).
    """
    trajectories = [
        [
            trajectory(vlm, rollout, acc[g][i] if acc else 0.0, tool[g][i] if tool else 0.0)
            for i, rollout in enumerate(group)
        ]
        for g, group in enumerate(groups)
    ]
    packed = mk.pack(
        trajectories,
        max_tokens,
        ranks=ranks,
        keep_all=keep_all,
        attention_cost=hf.attention_cost(vlm.model),
    )
    return [
        Batch(
            one,
            tuple(groups[g][i] for g, i in one.members),
            tuple(groups[i.group][i.rollout].images[i.index] for i in one.images),
        )
        for one in packed
    ]


def trajectory(
    vlm: VisionLanguageModel, rollout: Rollout, acc: float = 0.0, tool: float = 0.0
) -> mk.Trajectory:
    """A rollout as tokens. Images are the same where they are one object: those of a question are,
    for all of its rollouts."""
    ids = torch.tensor(rollout.ids)
    spans = _spans(rollout.ids, vlm.image_token_id, [vlm.image_tokens(i) for i in rollout.images])
    return mk.Trajectory(
        ids,
        torch.tensor(rollout.policy, dtype=torch.bool),
        acc_advantage=acc,
        tool_advantage=tool,
        images=tuple(
            mk.ImageSpan(start, stop, id(image))
            for (start, stop), image in zip(spans, rollout.images, strict=True)
        ),
        positions=hf.positions(
            vlm.model, ids, torch.tensor([vlm.grid(image) for image in rollout.images])
        ),
        name=f"rollout of {rollout.question.id}",
    )


def _spans(ids: Sequence[int], placeholder: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of each image's placeholders. Asserts that there are as many as its size asks
    for, in one piece."""
    spans, at = [], 0
    for size in sizes:
        at = ids.index(placeholder, at)
        assert all(token == placeholder for token in ids[at : at + size]), (at, size)
        spans.append((at, at + size))
        at += size
    assert placeholder not in ids[at:], at
    return spans
