"""The rollouts of a step of RL: questions drawn from the task's stream, played in groups.

Which questions a step plays, and with what seeds, is a function of (seed, step, position in the
stream): the same on one process as on many, of which each plays a share.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

from trainer.config import RLConfig
from trainer.engines.hf import HFEngine
from trainer.interrupt import never
from trainer.parallel import World
from trainer.rollout import Player
from trainer.selection import group_advantages, group_modes, has_signal
from trainer.tasks import Task
from trainer.types import Rollout, TrainingError


@dataclass
class Collected:
    """The rollouts of a step, group after group."""

    rollouts: list[Rollout]
    """What is learned from: `prompts` groups."""
    played: list[Rollout]
    """All, in the order in which they were drawn."""
    dropped: list[bool]
    """Of each group that was played, whether another took its place."""


@dataclass(frozen=True)
class Collector:
    """Who plays, what is asked, and how groups are made of it."""

    task: Task
    player: Player
    engine: HFEngine
    config: RLConfig
    seed: int
    stopping: Callable[[], bool]
    world: World = field(default_factory=World)

    def collect(self, step: int, position: int) -> Collected:
        """Plays `prompts` groups, and draws further questions in the place of those without signal,
        at most `resample` times. What is still missing then is filled up with groups without
        signal. position: of the step's first question in the task's stream."""
        config, size = self.config, self.config.group_size
        groups: list[list[Rollout]] = []
        loud: list[bool] = []
        for _ in range(config.resample + 1):
            missing = config.prompts - sum(loud)
            if not missing:
                break
            rollouts = self._play(step, position, len(groups), missing)
            groups += [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
            loud += has_signal(group_advantages(rollouts, config), config).tolist()
        silent = [number for number, signal in enumerate(loud) if not signal]
        dropped = set(silent[config.prompts - sum(loud) :])
        return Collected(
            [r for number, group in enumerate(groups) if number not in dropped for r in group],
            [r for group in groups for r in group],
            [number in dropped for number in range(len(groups))],
        )

    def _play(self, step: int, position: int, first: int, count: int) -> list[Rollout]:
        """Groups number first .. first + count - 1 of a step."""
        stopping, size = self.stopping, self.config.group_size
        if self.world.size > 1:  # a rank that stopped by itself would leave the others waiting
            if self.world.any(stopping()):
                raise KeyboardInterrupt
            stopping = never
        questions = self.task.train(self.seed, position + first, count)
        modes = group_modes(self.config)
        repeated = [
            (question, zlib.crc32(f"{self.seed}/{step}/{g * size + i}".encode()), mode)
            for g, question in enumerate(questions, first)
            for i, mode in enumerate(modes)
        ]
        mine, played, failure = self.world.share(repeated), [], None
        try:
            if mine:
                asked, seeds, ways = zip(*mine, strict=True)
                played = self.player.play(self.engine, asked, seeds, modes=ways, stopping=stopping)
        except TrainingError as error:
            failure = error
        if self.world.any(failure is not None):  # or the others would wait for ever
            raise failure or TrainingError("another process could not play; its message says why")
        return _one_question_a_group(self.world.gather(played), size)


def _one_question_a_group(rollouts: list[Rollout], group_size: int) -> list[Rollout]:
    """What came from other processes has copies of a question's pictures; a group shares one set,
    so that its prompt is packed once."""
    for start in range(0, len(rollouts), group_size):
        question = rollouts[start].question
        for rollout in rollouts[start : start + group_size]:
            rollout.images[: len(question.images)] = question.images
            rollout.question = question
    return rollouts
