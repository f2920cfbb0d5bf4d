"""One token for every row from its logits and a uniform number, and where a turn ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from trainer.chat import ANSWER_CLOSE, CALL_CLOSE

Stop = Literal["call", "answer", "end", "length"]

TAIL = 12
"""Tokens that are decoded to look for a stop string that spans tokens."""


@dataclass(frozen=True)
class Sampled:
    """One turn of the policy, as sampled."""

    ids: list[int]
    """The stop tokens included."""
    logprob: list[float]
    """Of each id under the distribution it was sampled from (at the sampling temperature)."""
    stop: Stop
    """What ended it: </tool_call>, </answer>, the end-of-turn token, or the length limit."""
    forced: range = range(0)
    """Places of ids that were put in the policy's place; their logprobs are the policy's, at the
    same temperature."""


def uniforms(seeds: Sequence[Sequence[int]], count: int) -> Tensor:
    """[N, count] float64 in [0, 1): row i is the stream that numpy seeds with seeds[i]."""
    return torch.from_numpy(np.stack([np.random.default_rng(list(s)).random(count) for s in seeds]))


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    forbidden: Tensor,
    forced: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(token [N] int64, its logprob [N] fp32) from logits [N, V] and uniform [N] float64.

    A token is the inverse of the CDF (in float64) at its row's uniform number, or the likeliest at
    temperature 0. forbidden [F] int64 ids have probability 0. forced [N] int64: the token of a row
    whatever its distribution says; negative: none.
    """
    scores = logits.float().index_fill(1, forbidden, -torch.inf)
    logprob = torch.log_softmax(scores / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token = logprob.argmax(-1, keepdim=True)
    else:
        cdf = logprob.double().exp().cumsum(-1)
        point = uniform[:, None] * cdf[:, -1:]
        token = (cdf <= point).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
    if forced is not None:
        token = torch.where(forced[:, None] >= 0, forced[:, None], token)
    return token[:, 0], logprob.gather(1, token)[:, 0]


class Protocol:
    """What a policy may write and what ends its turn, read from a tokenizer.

    vocabulary: rows of the LM head, which may be more or fewer than the tokenizer has tokens.
    """

    def __init__(self, tokenizer: Any, vocabulary: int):
        self.tokenizer = tokenizer
        self.end_id = tokenizer.eos_token_id
        call_close = tokenizer.convert_tokens_to_ids(CALL_CLOSE)
        # One added token in Qwen's vocabularies; where it is not, it is found as text.
        self.call_id = None if call_close in (None, tokenizer.unk_token_id) else call_close
        allowed = {self.end_id, self.call_id, tokenizer.convert_tokens_to_ids("<tool_call>")}
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        markers = {
            index
            for index in special
            if tokenizer.convert_ids_to_tokens(index).startswith("<|") or index >= vocabulary
        }
        # A policy that writes <|image_pad|> or <|im_start|> would forge what it is shown.
        self.forbidden = sorted(index for index in markers - allowed if index < vocabulary)
        pieces = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
        closing = {index for index, piece in enumerate(pieces) if ">" in piece}
        closing |= {self.end_id} | ({self.call_id} - {None})
        self.closing = torch.zeros(max(vocabulary, len(tokenizer)), dtype=torch.bool)
        self.closing[sorted(closing)] = True
        """[V or more] whether a token can be the last one of a turn: nothing else is looked at."""

    def stop(self, ids: Sequence[int]) -> Stop | None:
        """What the last of a turn's ids so far ended it by, None where it goes on."""
        if ids[-1] == self.end_id:
            return "end"
        if ids[-1] == self.call_id:
            return "call"
        text = self.tokenizer.decode(ids[-TAIL:])
        if text.endswith(ANSWER_CLOSE):
            return "answer"
        return "call" if text.endswith(CALL_CLOSE) else None
