"""From rollouts to one padded batch and the rows that carry loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model import VisionLanguageModel, hidden_states
from trainer.types import Rollout


@dataclass(frozen=True)
class Batch:
    """B rollouts padded to T; S tokens that the policy wrote.

    The token at [b, t] is predicted from the hidden row of [b, t - 1], so its row in the flattened
    [B * T, H] hidden states is b * T + t - 1.
    """

    inputs: dict[str, Tensor]
    row: Tensor
    """[S] int64 into the flattened hidden states."""
    label: Tensor
    """[S] int64 token ids."""
    sequence: Tensor
    """[S] int64: which rollout of the batch a token is of."""

    def hidden(self, model: torch.nn.Module) -> Tensor:
        """[B * T, H] hidden states, the LM head not run."""
        return hidden_states(model, self.inputs).flatten(0, 1)


def collate(vlm: VisionLanguageModel, rollouts: Sequence[Rollout]) -> Batch:
    inputs = vlm.collate([(rollout.ids, rollout.images) for rollout in rollouts])
    ids = inputs["input_ids"]
    policy = torch.zeros(ids.shape, dtype=torch.bool)
    for row, rollout in enumerate(rollouts):
        policy[row, : len(rollout.policy)] = torch.tensor(rollout.policy)
    position = policy.flatten().nonzero()[:, 0].to(ids.device)
    return Batch(inputs, position - 1, ids.flatten()[position], position // ids.shape[1])


def by_length(rollouts: Sequence[Rollout], max_tokens: int) -> list[list[int]]:
    """Micro-batches of indices, longest first, each of at most `max_tokens` padded tokens (and of
    at least one rollout)."""
    order = sorted(range(len(rollouts)), key=lambda i: -len(rollouts[i].ids))
    batches: list[list[int]] = []
    for index in order:
        if batches and len(rollouts[batches[-1][0]].ids) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
