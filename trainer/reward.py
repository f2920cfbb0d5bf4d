"""Rewards of a finished rollout: r_ans by rule, r_fmt by the protocol."""

from __future__ import annotations

import re
import unicodedata

from trainer.chat import find_answer, is_formatted
from trainer.types import Rollout

MAX_ANSWER = 200
"""Characters of an answer that are compared; a longer one is no answer."""


def normalise(text: str) -> str:
    """Case, width, spaces and a final full stop do not matter."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def matches(answer: str | None, expected: str) -> bool:
    """Whether an answer is the expected one: equal after `normalise`, or the same number."""
    if answer is None or not answer or len(answer) > MAX_ANSWER:
        return False
    answer, expected = normalise(answer), normalise(expected)
    if answer == expected:
        return True
    number = re.compile(r"[-+]?\d[\d,]*(\.\d+)?")
    if number.fullmatch(answer) and number.fullmatch(expected):
        return float(answer.replace(",", "")) == float(expected.replace(",", ""))
    return False


def score(rollout: Rollout) -> None:
    """Fills answer, correct and formatted. A truncated rollout answered nothing.

    Only turns, which the policy wrote, are read: never an observation (DESIGN: the reference can be
    made to judge what a tool printed).
    """
    turns = [turn.text for turn in rollout.turns]
    finished = rollout.status == "ok" and bool(turns)
    rollout.answer = find_answer(turns[-1]) if finished else None
    rollout.correct = matches(rollout.answer, rollout.question.answer)
    rollout.formatted = finished and is_formatted(turns)
