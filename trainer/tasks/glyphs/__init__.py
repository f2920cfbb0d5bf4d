"""Glyphs: visual questions with known answers and known need of a tool, seeded and endless.

world.py           beacons, emblems and owners: what can be known and what must be looked up
scene.py           the pictures
questions.py       eight kinds of question
tools.py           the real tools, made unreliable
demonstrations.py  the cold start's trajectories
raw.py             flawed trajectories, for curation
base.py            the tiny Qwen3-VL that all begins with; base/ holds its weights
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from trainer.tasks.glyphs import tools
from trainer.tasks.glyphs.demonstrations import Script
from trainer.tasks.glyphs.questions import KINDS, draft
from trainer.tools import Toolbox
from trainer.types import Question, Rollout

_STREAM = 10_000_000
"""Questions of one seed before the next seed's begin."""
_DEMONSTRATIONS = 5_000_000
"""Where in a seed's stream the cold start's questions begin."""


class Glyphs:
    name = "glyphs"
    base = Path(__file__).parent / "base"

    @property
    def kinds(self) -> Sequence[str]:
        return list(KINDS)

    def train(self, seed: int, start: int, count: int) -> list[Question]:
        first = seed * _STREAM + start
        return [draft("train", first + n).question for n in range(count)]

    def heldout(self, count: int) -> list[Question]:
        return [
            draft("heldout", n, name).question
            for name, kind in KINDS.items()
            for n in range(max(1, round(count * kind.share)))
        ]

    def toolbox(self) -> Toolbox:
        return tools.toolbox()

    def demonstrations(
        self, seed: int, count: int, direct_share: float
    ) -> tuple[list[Question], list[Script]]:
        first = seed * _STREAM + _DEMONSTRATIONS
        questions, scripts = [], []
        for n in range(first, first + count):
            one = draft("train", n)
            rng = np.random.default_rng([n, 1])
            direct = rng.random() < direct_share and one.question.kind in _ANSWERABLE
            questions.append(one.question)
            scripts.append(Script(one, rng, direct))
        return questions, scripts

    @property
    def unplayable(self) -> Mapping[str, int]:
        return {}

    def fault(self, rollout: Rollout) -> str | None:
        """Scripts answer what is true. Where the tool told something else, they would teach not to
        believe it."""
        if not (rollout.scored and rollout.formatted):
            return rollout.status if rollout.status != "ok" else "format"
        told = [turn.observation for turn in rollout.turns if turn.observation is not None]
        if told and told[-1].text and rollout.question.answer not in told[-1].text:
            return "contradicted"
        return None


_ANSWERABLE = [n for n, kind in KINDS.items() if not kind.needs_tool] + ["glyph_medium"]
"""Kinds that a demonstration may answer without a tool: those that need none, and the guess."""
