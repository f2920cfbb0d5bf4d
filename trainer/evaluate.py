"""Evaluation on held-out questions: accuracy, tool rate, and who called where it was needed.

    metis eval model.path=runs/demo/final
    metis eval --arbitrate --model before=runs/demo/sft --model after=runs/demo/final

A total can hide that a tool was unlearned where it is needed, so every number also comes by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainer import answers as kept
from trainer.agents import Agent
from trainer.answers import Answer
from trainer.interrupt import never
from trainer.log import RunLog
from trainer.parallel import World
from trainer.types import Mode, Question, Rollout

_SEED = 1_000_003
"""Of the tools' luck in evaluation: the same for every model that is evaluated."""
SHOWN = 3
"""Rollouts of each kind that are handed back whole."""


def evaluate(
    agent: Agent,
    questions: Sequence[Question],
    log: RunLog,
    name: str,
    stopping: Callable[[], bool],
    world: World | None = None,
    *,
    mode: Mode = "allowed",
    samples: int = 1,
    record: Callable[[Sequence[Answer]], None] = lambda answers: None,
) -> tuple[list[Answer], list[Rollout]]:
    """Plays every question `samples` times, each rank its share -> (answers in the order of the
    questions, all samples of one after the other; the first rollouts of each kind).

    Seeds depend on the question's place and the sample alone: modes and models are played with the
    same. record: is handed the answers of a batch as soon as they are there. Raises
    KeyboardInterrupt once `stopping` is true; what was recorded by then stays.
    """
    world = world or World()
    count = len(questions)
    asked = [(n, sample) for n in range(count) for sample in range(samples)]
    mine = world.share(asked)
    found: list[Answer] = []
    shown: list[Rollout] = []
    with log.progress(name, len(mine)) as bar:
        for start in range(0, len(mine), agent.batch):
            part = mine[start : start + agent.batch]
            rollouts = agent.play(
                [questions[n] for n, _ in part],
                [_SEED + n + sample * count for n, sample in part],
                mode=mode,
                stopping=stopping if world.size == 1 else never,
            )
            batch = [
                Answer.of(rollout, agent.name, sample)
                for rollout, (_, sample) in zip(rollouts, part, strict=True)
            ]
            if world.size == 1:
                record(batch)
            found += batch
            shown = _first(shown + rollouts)
            scored = [answer for answer in found if answer.scored]
            bar.advance(len(part), **_numbers(scored))
    if world.size > 1:
        found, shown = world.gather(found), _first(world.gather(shown))
        record(found)
    return found, shown


def measure(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """The measures of rollouts: see trainer.answers.measure."""
    return kept.measure([Answer.of(rollout) for rollout in rollouts])


def _first(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """The first few of each kind."""
    by_kind: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        some = by_kind.setdefault(rollout.question.kind, [])
        if len(some) < SHOWN:
            some.append(rollout)
    return [rollout for some in by_kind.values() for rollout in some]


def _numbers(scored: Sequence[Answer]) -> dict[str, float]:
    if not scored:
        return {}
    return {
        "accuracy": sum(answer.correct for answer in scored) / len(scored),
        "tool_rate": sum(answer.calls > 0 for answer in scored) / len(scored),
    }
