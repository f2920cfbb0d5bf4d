"""One question played once, as evaluation keeps it: a line of answers.jsonl.

Measures and comparisons are made of these and of nothing else, so that what a run measured can be
computed again, and compared with another run, from its file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from trainer.bootstrap import Parts, estimates
from trainer.log import RunError
from trainer.types import Mode, Rollout, Status


@dataclass(frozen=True)
class Answer:
    model: str
    id: str
    """Of the question."""
    kind: str
    needs_tool: bool | None
    mode: Mode
    sample: int
    """Number of the trajectory among those of the same question and mode."""
    seed: int
    calls: int
    answer: str | None
    correct: bool
    formatted: bool
    status: Status
    prompt_tokens: int
    sampled_tokens: int
    model_seconds: float
    tool_seconds: float
    forced: float | None
    """As in Rollout."""

    @classmethod
    def of(cls, rollout: Rollout, model: str = "", sample: int = 0) -> Answer:
        question = rollout.question
        return cls(
            model=model,
            id=question.id,
            kind=question.kind,
            needs_tool=question.needs_tool,
            mode=rollout.mode,
            sample=sample,
            seed=rollout.seed,
            calls=rollout.calls,
            answer=rollout.answer,
            correct=rollout.correct,
            formatted=rollout.formatted,
            status=rollout.status,
            prompt_tokens=rollout.prompt_tokens,
            sampled_tokens=rollout.sampled_tokens,
            model_seconds=round(rollout.model_seconds, 6),
            tool_seconds=round(rollout.tool_seconds, 6),
            forced=rollout.forced,
        )

    @property
    def scored(self) -> bool:
        return self.status in ("ok", "truncated")

    @property
    def tokens(self) -> float:
        """Read and written; NaN where nobody counted."""
        return self.prompt_tokens + self.sampled_tokens or float("nan")

    @property
    def seconds(self) -> float:
        return self.model_seconds + self.tool_seconds

    def record(self) -> dict[str, Any]:
        return asdict(self)


def read_answers(path: str | Path) -> list[Answer]:
    """The lines of an answers.jsonl; a line cut short at the end is left out.

    Raises RunError for a file that is missing, holds nothing, or is something else.
    """
    path = Path(path)
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"'{path}' cannot be read: {error}; run `metis eval` again") from None
    names = {field.name for field in fields(Answer)}
    answers = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            if number == len(lines):
                break  # the line that was being written
            record = line
        if record is None:
            continue
        if not isinstance(record, dict) or not names <= set(record):
            raise RunError(f"'{path}' line {number} is no answer: run `metis eval` again")
        answers.append(Answer(**{name: record[name] for name in names}))
    if not answers:
        raise RunError(f"'{path}' holds no answers: run `metis eval` again")
    return answers


# ---- measures of one way of playing --------------------------------------------------------------


def measure(answers: Sequence[Answer]) -> dict[str, Any]:
    """Rates over scored answers; `redundant_rate` is calls where none is needed, `missed_rate` no
    call where one is (both None where there is no such question). `intervals`: name -> [low, high],
    95 %, over questions."""
    scored = [answer for answer in answers if answer.scored]
    needy = [answer for answer in scored if answer.needs_tool]
    kinds = dict.fromkeys(answer.kind for answer in answers)
    return {
        **_rates(scored),
        "needed_rate": len(needy) / len(scored) if scored else None,
        "truncated": sum(answer.status == "truncated" for answer in answers),
        "unscored": len(answers) - len(scored),
        "by_kind": {
            kind: {
                "needs_tool": next(a.needs_tool for a in answers if a.kind == kind),
                **_rates([a for a in scored if a.kind == kind], arbitration=False),
            }
            for kind in kinds
        },
    }


def _rates(answers: Sequence[Answer], *, arbitration: bool = True) -> dict[str, Any]:
    parts = rate_parts(answers)
    if not arbitration:
        parts = {name: pair for name, pair in parts.items() if name not in _BY_LABEL}
    found = estimates(parts)
    return {
        "n": len(answers),
        **{name: estimate["value"] for name, estimate in found.items()},
        "intervals": {
            name: [estimate["low"], estimate["high"]] for name, estimate in found.items()
        },
    }


_BY_LABEL = ("redundant_rate", "missed_rate")


def rate_parts(answers: Iterable[Answer], order: Sequence[str] | None = None) -> Parts:
    """Numerators and denominators of the rates, by question (those of `order`, in its order; None:
    in the order of the answers). Only scored answers are looked at."""
    by_question: dict[str, list[Answer]] = {name: [] for name in order or ()}
    for answer in answers:
        if answer.scored and (order is None or answer.id in by_question):
            by_question.setdefault(answer.id, []).append(answer)
    rows = [_row(some) for some in by_question.values()]
    table = np.array(rows, dtype=np.float64).reshape(len(rows), 2 * len(_NAMES))
    return {
        name: (table[:, 2 * number], table[:, 2 * number + 1]) for number, name in enumerate(_NAMES)
    }


_NAMES = (
    "accuracy", "tool_rate", "calls", "direct_accuracy", "called_accuracy",
    "redundant_rate", "missed_rate", "tokens", "seconds",
)  # fmt: skip


def _row(answers: Sequence[Answer]) -> list[float]:
    """Numerator and denominator of each of _NAMES, of the answers to one question."""
    n = len(answers)
    called = [answer for answer in answers if answer.calls > 0]
    direct = [answer for answer in answers if answer.calls == 0]
    idle = [answer for answer in answers if answer.needs_tool is False]
    needy = [answer for answer in answers if answer.needs_tool]
    counted = [answer for answer in answers if answer.tokens == answer.tokens]  # not NaN
    pairs = (
        (sum(a.correct for a in answers), n),
        (len(called), n),
        (sum(a.calls for a in answers), n),
        (sum(a.correct for a in direct), len(direct)),
        (sum(a.correct for a in called), len(called)),
        (sum(a.calls > 0 for a in idle), len(idle)),
        (sum(a.calls == 0 for a in needy), len(needy)),
        (sum(a.tokens for a in counted), len(counted)),
        (sum(a.seconds for a in answers), n),
    )
    return [float(number) for pair in pairs for number in pair]
