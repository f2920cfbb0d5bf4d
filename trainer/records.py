"""Rollouts as JSON records: what rollouts.jsonl holds, one object a line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import metis_kernels as mk
from trainer.images import png_base64
from trainer.model import VisionLanguageModel
from trainer.types import Rollout


def records(
    vlm: VisionLanguageModel | None,
    stage: str,
    step: int,
    rollouts: Sequence[Rollout],
    advantages: mk.Advantages | None = None,
    *,
    images: bool = False,
) -> Iterator[dict[str, Any]]:
    """One record a rollout. `tokens` is [text, id, policy, logprob] each, a run of image
    placeholders being one entry; of a rollout without ids, played by a server, its texts. `images`
    (PNG, base64) only where asked for: they are large."""
    for index, rollout in enumerate(rollouts):
        question = rollout.question
        record = {
            "stage": stage,
            "step": step,
            "question": {
                "id": question.id,
                "kind": question.kind,
                "text": question.text,
                "answer": question.answer,
                "needs_tool": question.needs_tool,
            },
            "seed": rollout.seed,
            "status": rollout.status,
            "calls": rollout.calls,
            "answer": rollout.answer,
            "correct": rollout.correct,
            "formatted": rollout.formatted,
            **({} if rollout.score is None else {"score": rollout.score}),
            "acc_advantage": None if advantages is None else float(advantages.acc[index]),
            "tool_advantage": None if advantages is None else float(advantages.tool[index]),
            "tokens": _tokens(vlm, rollout) if rollout.ids else _texts(rollout),
        }
        if images:
            record["images"] = [png_base64(image) for image in rollout.images]
        yield record


def _tokens(vlm: VisionLanguageModel, rollout: Rollout) -> list[list[Any]]:
    pieces = vlm.tokenizer.batch_decode([[index] for index in rollout.ids])
    tokens: list[list[Any]] = []
    shown, inside = 0, False
    rows = zip(rollout.ids, rollout.policy, rollout.logprob, pieces, strict=True)
    for index, policy, logprob, piece in rows:
        if index == vlm.image_token_id:
            if not inside:
                shown += 1
                tokens.append([f"<image {shown}>", index, False, 0.0])
            inside = True
            continue
        inside = False
        tokens.append([piece, index, policy, round(logprob, 4)])
    return tokens


def _texts(rollout: Rollout) -> list[list[Any]]:
    """What was said, in place of tokens: [text, None, whether the policy wrote it, 0.0]."""
    shown = len(rollout.question.images)
    tokens: list[list[Any]] = [[f"<image {n + 1}>", None, False, 0.0] for n in range(shown)]
    tokens.append([rollout.question.text + "\n", None, False, 0.0])
    for turn in rollout.turns:
        tokens.append([turn.text + "\n", None, True, 0.0])
        if turn.observation is not None:
            tokens.append([turn.observation.text + "\n", None, False, 0.0])
            for _ in turn.observation.images:
                shown += 1
                tokens.append([f"<image {shown}>", None, False, 0.0])
    return tokens
