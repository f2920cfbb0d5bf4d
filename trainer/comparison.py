"""Models, or finished evaluations, side by side on the same questions.

Differences to the first are paired: over the questions that both have scored, and every draw of the
bootstrap takes the same questions of both. So two models may differ by less than the width of each
one's own interval and the difference still be known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.answers import Answer, measure, rate_parts, read_answers
from trainer.arbitration import MODES, arbitrate, arbitration_parts, ways
from trainer.bootstrap import differences
from trainer.log import RunError
from trainer.types import Mode

DIFFERENCES = ("accuracy", "tool_rate", "calls", "tokens", "seconds")
ARBITRATED = ("redundant_rate", "missed_rate", "regret")


def evaluation(models: Mapping[str, Sequence[Answer]]) -> dict[str, Any]:
    """What eval.json holds of several models' answers (or one's): measures of every mode that was
    played, arbitration where all three were, and differences to the first model.

    Raises RunError where the models did not play the same questions in the same modes.
    """
    check_same(models)
    first = next(iter(models))
    modes = _modes(models[first])
    main = main_mode(models[first])
    out: dict[str, Any] = {
        "questions": len({answer.id for answer in models[first]}),
        "mode": main,
        "models": {},
    }
    for name, answers in models.items():
        by_mode = {mode: [a for a in answers if a.mode == mode] for mode in modes}
        entry = {"modes": {mode: measure(some) for mode, some in by_mode.items()}}
        if set(MODES) <= set(modes):
            entry["arbitration"] = arbitrate(answers)
        if name != first:
            entry["differences"] = _differences(models[first], answers, main)
        out["models"][name] = entry
    return out


def main_mode(answers: Sequence[Answer]) -> Mode:
    """The mode whose rates are spoken of where nothing else is said."""
    return _modes(answers)[0]


def _modes(answers: Sequence[Answer]) -> list[Mode]:
    order = ("allowed", "direct", "forbidden", "forced")
    return sorted({answer.mode for answer in answers}, key=order.index)


def check_same(models: Mapping[str, Sequence[Answer]]) -> None:
    """Raises RunError where the models did not play the same questions in the same modes."""
    first, *others = models
    asked = {(answer.id, answer.mode) for answer in models[first]}
    for name in others:
        also = {(answer.id, answer.mode) for answer in models[name]}
        if asked == also:
            continue
        parts = []
        for who, more in ((first, asked - also), (name, also - asked)):
            if more:
                question, mode = min(more)
                parts.append(f"{len(more)} only of {who}, such as {question} ({mode})")
        raise RunError(
            f"{first} and {name} were not asked the same questions: {'; '.join(parts)}. Compare "
            "evaluations of the same task, data.heldout, evaluate.questions and modes"
        )


def _differences(base: Sequence[Answer], answers: Sequence[Answer], main: Mode) -> dict[str, Any]:
    """Of `answers` to `base`, in total and by kind."""
    pair = [[a for a in some if a.mode == main and a.scored] for some in (answers, base)]
    both = {a.id: a.kind for a in pair[0]}.keys() & {a.id for a in pair[1]}
    kind_of = {a.id: a.kind for a in pair[1] if a.id in both}
    out = _paired(pair, list(kind_of))
    if set(MODES) <= set(_modes(base)):
        out |= _arbitrated(answers, base)
    out["by_kind"] = {
        kind: _paired(pair, [name for name, k in kind_of.items() if k == kind])
        for kind in dict.fromkeys(kind_of.values())
    }
    return out


def _paired(pair: Sequence[Sequence[Answer]], order: Sequence[str]) -> dict[str, Any]:
    parts = [
        {n: p for n, p in rate_parts(some, order).items() if n in DIFFERENCES} for some in pair
    ]
    return {"n": len(order), **differences(*parts)}


def _arbitrated(answers: Sequence[Answer], base: Sequence[Answer]) -> dict[str, Any]:
    played = [ways(some) for some in (answers, base)]
    both = set(played[0].ids) & set(played[1].ids)
    parts = []
    for one in played:
        chosen = sorted((name, i) for i, name in enumerate(one.ids) if name in both)
        found = arbitration_parts(one.of([i for _, i in chosen]))
        parts.append({name: found[name] for name in ARBITRATED})
    return differences(*parts)


# ---- finished runs -------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path]) -> dict[str, list[Answer]]:
    """Answers of finished evaluations by name: the run's, and behind it the model's where it played
    several. Raises RunError for a folder that holds no finished evaluation."""
    models: dict[str, list[Answer]] = {}
    names = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        if not folder.is_dir():
            raise RunError(
                f"there is no run folder '{folder}': give folders that `metis eval` wrote"
            )
        try:
            status = json.loads((folder / "eval.json").read_text()).get("status")
        except FileNotFoundError:
            raise RunError(
                f"'{folder}' holds no eval.json: give folders that `metis eval` wrote"
            ) from None
        except (OSError, ValueError, AttributeError) as error:
            raise RunError(f"'{folder / 'eval.json'}' cannot be read: {error}") from None
        if status != "complete":
            raise RunError(f"the evaluation in '{folder}' is {status}: run it again")
        answers = read_answers(folder / "answers.jsonl")
        name = name if names.count(name) == 1 else str(folder)
        several = len({answer.model for answer in answers}) > 1
        for answer in answers:
            key = f"{name}/{answer.model}" if several else name
            models.setdefault(key, []).append(answer)
    return models
