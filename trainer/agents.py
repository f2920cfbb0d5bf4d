"""Who answers questions: the policy in this process, or a model behind a server.

Curation and evaluation ask an Agent, and need not know which of the two it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from trainer.engines.hf import HFEngine
from trainer.interrupt import never
from trainer.rollout import Player
from trainer.types import Mode, Question, Rollout


class Agent(Protocol):
    name: str
    """Of the model, for reports and cache keys: other weights, another name."""
    batch: int
    """How many questions are worth asking at once."""

    def play(
        self,
        questions: Sequence[Question],
        seeds: Sequence[int],
        *,
        mode: Mode = "allowed",
        stopping: Callable[[], bool] = never,
    ) -> list[Rollout]:
        """One graded rollout a question, in their order. Once `stopping` is true,
        KeyboardInterrupt is raised."""

    def close(self) -> None: ...


class LocalAgent:
    """A model in this process. player and direct are not closed by it: they may be shared."""

    def __init__(self, name: str, engine: HFEngine, player: Player, direct: Player):
        """direct: a player without tools, for mode="direct"."""
        self.name, self.engine = name, engine
        self.player, self.direct = player, direct
        self.batch = engine.max_batch

    def play(
        self,
        questions: Sequence[Question],
        seeds: Sequence[int],
        *,
        mode: Mode = "allowed",
        stopping: Callable[[], bool] = never,
    ) -> list[Rollout]:
        player = self.direct if mode == "direct" else self.player
        return player.play(
            self.engine, questions, seeds, modes=[mode] * len(questions), stopping=stopping
        )

    def close(self) -> None:
        pass
