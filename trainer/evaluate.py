"""Evaluation on held-out questions: accuracy, tool rate, and who called where it was needed.

    metis eval model.path=runs/demo/final

A total can hide that a tool was unlearned where it is needed, so every number also comes by kind.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainer.engines.hf import HFEngine
from trainer.log import RunLog
from trainer.parallel import World
from trainer.rollout import Player
from trainer.types import Question, Rollout

_SEED = 1_000_003
"""Of the tools' luck in evaluation: the same for every model that is evaluated."""


def evaluate(
    player: Player,
    engine: HFEngine,
    questions: Sequence[Question],
    log: RunLog,
    name: str,
    stopping: Callable[[], bool],
    world: World | None = None,
) -> tuple[dict[str, Any], list[Rollout]]:
    """Plays every question once, each rank its share -> (measures, rollouts in the order of the
    questions)."""
    world = world or World()
    mine = world.share(list(enumerate(questions)))
    rollouts: list[Rollout] = []
    with log.progress(name, len(mine)) as bar:
        for start in range(0, len(mine), engine.max_batch):
            part = mine[start : start + engine.max_batch]
            seeds = [_SEED + n for n, _ in part]
            asked = [question for _, question in part]
            rollouts += player.play(
                engine, asked, seeds, stopping=stopping if world.size == 1 else lambda: False
            )
            bar.advance(len(part))
    rollouts = world.gather(rollouts)
    return measure(rollouts), rollouts


def measure(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Rates over scored rollouts; `redundant_rate` is calls where none is needed, `missed_rate` no
    call where one is (both None where there is no such question)."""
    scored = [rollout for rollout in rollouts if rollout.scored]
    idle = [r for r in scored if r.question.needs_tool is False]
    needy = [r for r in scored if r.question.needs_tool]
    kinds = dict.fromkeys(rollout.question.kind for rollout in rollouts)
    return {
        **_rates(scored),
        "redundant_rate": _share(r.calls > 0 for r in idle),
        "missed_rate": _share(r.calls == 0 for r in needy),
        "needed_rate": len(needy) / len(scored) if scored else None,
        "truncated": sum(rollout.status == "truncated" for rollout in rollouts),
        "unscored": len(rollouts) - len(scored),
        "by_kind": {
            kind: {
                "needs_tool": next(
                    r.question.needs_tool for r in rollouts if r.question.kind == kind
                ),
                **_rates([r for r in scored if r.question.kind == kind]),
            }
            for kind in kinds
        },
    }


def _rates(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    return {
        "n": len(rollouts),
        "accuracy": _share(r.correct for r in rollouts),
        "tool_rate": _share(r.calls > 0 for r in rollouts),
        "calls": sum(r.calls for r in rollouts) / len(rollouts) if rollouts else None,
        "direct_accuracy": _share(r.correct for r in rollouts if r.calls == 0),
        "called_accuracy": _share(r.correct for r in rollouts if r.calls > 0),
    }


def _share(flags) -> float | None:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None
