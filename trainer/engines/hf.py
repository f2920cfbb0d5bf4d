"""Generation with transformers, on the training weights themselves: there is no second copy.

Every trajectory has its own seed. Token t of a turn is the inverse of the policy's distribution at
one uniform number drawn from that seed, so a trajectory does not depend on what else is in its
batch (to the rounding of the model's arithmetic).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from trainer.chat import ANSWER_CLOSE, CALL_CLOSE
from trainer.model import VisionLanguageModel

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


class HFEngine:
    """Samples turns with `model.generate`.

    temperature: 0 is greedy. max_batch: sequences generated at once; the rest waits.
    """

    def __init__(self, vlm: VisionLanguageModel, *, temperature: float = 1.0, max_batch: int = 256):
        if temperature < 0:
            raise ValueError(f"temperature is {temperature}; expected 0 (greedy) or more")
        self.vlm = vlm
        self.temperature = temperature
        self.max_batch = max_batch
        tokenizer = vlm.tokenizer
        self.end_id = tokenizer.eos_token_id
        call_close = tokenizer.convert_tokens_to_ids(CALL_CLOSE)
        # One added token in Qwen's vocabularies; where it is not, it is found as text.
        self.call_id = None if call_close in (None, tokenizer.unk_token_id) else call_close
        vocabulary = vlm.head.shape[0]
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
        closing = [index for index, piece in enumerate(pieces) if ">" in piece]
        self._closing = torch.zeros(max(vocabulary, len(tokenizer)), dtype=torch.bool)
        self._closing[closing] = True

    def generate(
        self,
        sequences: Sequence[tuple[Sequence[int], Sequence[Image]]],
        seeds: Sequence[Sequence[int]],
        max_new_tokens: int,
    ) -> list[Sampled]:
        """The next turn of every (ids, images); seeds[i] is what numpy seeds its stream with."""
        result: list[Sampled] = []
        for start in range(0, len(sequences), self.max_batch):
            chunk = slice(start, start + self.max_batch)
            result += self._generate(sequences[chunk], seeds[chunk], max_new_tokens)
        return result

    @torch.inference_mode()
    def _generate(self, sequences, seeds, max_new_tokens: int) -> list[Sampled]:
        model = self.vlm.model
        inputs = self.vlm.collate(sequences, left=True)
        uniform = np.stack([np.random.default_rng(list(s)).random(max_new_tokens) for s in seeds])
        sampler = _Sampler(
            torch.from_numpy(uniform).to(self.vlm.device), self.temperature, self.forbidden
        )
        prompt = inputs["input_ids"].shape[1]
        stopping = _StopAtProtocol(self, prompt)
        training = model.training
        model.eval()
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,  # the sampler leaves one finite score a row
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([stopping]),
            pad_token_id=self.vlm.tokenizer.pad_token_id,
            eos_token_id=[self.end_id],
            use_cache=True,
        )
        model.train(training)
        new = output[:, prompt:].tolist()
        logprob = torch.stack(sampler.logprob, 1).tolist()
        turns = []
        for row, ids in enumerate(new):
            length = stopping.length[row] or len(ids)
            stop = stopping.stop[row] or "length"
            turns.append(Sampled(ids[:length], logprob[row][:length], stop))
        return turns


class _Sampler(LogitsProcessor):
    """Samples by the inverse CDF and leaves the sampled token as the only finite score."""

    def __init__(self, uniform: Tensor, temperature: float, forbidden: Sequence[int]):
        self.uniform = uniform
        self.temperature = temperature
        self.forbidden = torch.tensor(list(forbidden), dtype=torch.long, device=uniform.device)
        self.logprob: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float().index_fill(1, self.forbidden, -torch.inf)
        logprob = torch.log_softmax(scores / (self.temperature or 1.0), dim=-1)
        if self.temperature == 0:
            token = logprob.argmax(-1, keepdim=True)
        else:
            cdf = logprob.double().exp().cumsum(-1)
            point = self.uniform[:, len(self.logprob), None] * cdf[:, -1:]
            token = (cdf <= point).sum(-1, keepdim=True).clamp(max=scores.shape[1] - 1)
        self.logprob.append(logprob.gather(1, token)[:, 0])
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


class _StopAtProtocol(StoppingCriteria):
    """Notes where each row ends: </tool_call>, </answer> or the end of the turn."""

    def __init__(self, engine: HFEngine, prompt: int):
        self.engine = engine
        self.prompt = prompt
        self.stop: dict[int, Stop | None] = {}
        self.length: dict[int, int] = {}

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        rows = input_ids.shape[0]
        if not self.stop:
            self.stop = dict.fromkeys(range(rows))
            self.length = dict.fromkeys(range(rows), 0)
        engine, last = self.engine, input_ids[:, -1].tolist()
        closing = engine._closing[input_ids[:, -1].cpu()].tolist()
        for row, token in enumerate(last):
            if self.stop[row] is not None:
                continue
            if token == engine.end_id:
                self._end(row, "end", input_ids)
            elif token == engine.call_id:
                self._end(row, "call", input_ids)
            elif closing[row]:
                tail = input_ids[row, max(self.prompt, input_ids.shape[1] - TAIL) :]
                text = engine.vlm.tokenizer.decode(tail)
                if text.endswith(ANSWER_CLOSE):
                    self._end(row, "answer", input_ids)
                elif text.endswith(CALL_CLOSE):
                    self._end(row, "call", input_ids)
        done = [self.stop[row] is not None for row in range(rows)]
        return torch.tensor(done, device=input_ids.device)

    def _end(self, row: int, stop: Stop, input_ids: Tensor) -> None:
        self.stop[row] = stop
        self.length[row] = input_ids.shape[1] - self.prompt
