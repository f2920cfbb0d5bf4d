"""What the policy is shown: the base model's lessons without tools, and the cold start with them.

A demonstration is a script: a function that sees the last observation and writes the next turn.
It is played against the real tools by trainer.rollout, as a policy would be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.chat import ANSWER_CLOSE, ANSWER_OPEN, REASON_CLOSE, REASON_OPEN, call_text
from trainer.tasks.glyphs import scene
from trainer.tasks.glyphs.questions import Draft
from trainer.types import Observation

Piece = tuple[str, bool]
"""Text of the policy, and whether it is trained on."""

GUESS_RIGHT = 0.6
"""Share of right guesses at medium digits in the demonstrations."""


def call_for(draft: Draft) -> tuple[str, dict]:
    """The call that answers a question."""
    kind = draft.question.kind
    if kind.startswith("glyph"):
        corners = ", ".join(map(str, scene.box(*draft.fact)))
        return "python", {"code": f"image_1.crop(({corners}))"}
    if kind in ("sum_easy", "product_hard"):
        operator = "+" if kind == "sum_easy" else "*"
        return "python", {"code": f"{draft.fact[0]} {operator} {draft.fact[1]}"}
    if kind in ("fact_known", "fact_search"):
        return "text_search", {"query": f"beacon {draft.fact}"}
    return "image_search", {}


def first_thought(kind: str, answer: str, guess: str) -> list[Piece]:
    """What the model can tell by itself, in words that say how sure it is.

    The doubt of a guess stands at its end, next to the choice between <answer> and <tool_call>:
    with one full stop behind both, what RL finds out about sure answers carried over to guesses.
    A right guess is trained on and keeps the model's reading alive; a wrong one is context, from
    which the policy learns that the closer look decides.
    """
    if kind in ("glyph_large", "sum_easy", "fact_known"):
        return [(f"It is {answer}.", True)]
    if kind == "glyph_medium":
        return [("It may be ", True), (guess, guess == answer), ("?", True)]
    return [("I do not know.", True)]


def turn(reason: Sequence[Piece], action: str) -> list[Piece]:
    """A whole turn. Neighbours that are both trained on, or both not, become one piece, so that
    it is tokenized as a policy that learned from whole texts would write it."""
    pieces: list[Piece] = []
    for text, trained in [(REASON_OPEN, True), *reason, (f"{REASON_CLOSE}\n{action}", True)]:
        if pieces and pieces[-1][1] == trained:
            pieces[-1] = (pieces[-1][0] + text, trained)
        else:
            pieces.append((text, trained))
    return pieces


def answer_text(answer: str) -> str:
    return f"{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


@dataclass
class Script:
    """Plays one question: calls the tool, calls again when that failed, then answers.

    direct=True answers without a call; only meant for kinds that the model can answer.
    """

    draft: Draft
    rng: np.random.Generator
    direct: bool = False
    max_calls: int = 3

    def __post_init__(self) -> None:
        self.calls = 0
        self.guess = self.draft.question.answer
        if self.draft.question.kind == "glyph_medium":
            if self.rng.random() >= GUESS_RIGHT:
                self.guess = str(self.rng.choice([d for d in "0123456789" if d != self.guess]))

    def next_turn(self, observation: Observation | None) -> list[Piece]:
        """The next turn after an observation (None: the first turn)."""
        answer = self.draft.question.answer
        call = call_text(*call_for(self.draft))
        if observation is None:
            thought = first_thought(self.draft.question.kind, answer, self.guess)
            action = answer_text(self.guess) if self.direct else call
            self.calls += not self.direct
            return turn(thought, action)
        if observation.status != "ok" and self.calls < self.max_calls:
            self.calls += 1
            return turn([("That did not help.", True)], call)
        return turn([("Now I know.", True)], answer_text(answer))
