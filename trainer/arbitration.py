"""Did the policy call where calling helps? Measured, and not taken from a label.

Every question is played with tools allowed, forbidden and forced, with the same seeds, n samples
each. Of a question let

    d, f   the share of right answers with tools forbidden (direct) and forced
    a, c   with tools allowed: the share of right answers, and of samples in which a tool was called

Then a question is exactly one of

    needed    f > d        the tool gains
    spare     f = d > 0    right as often either way: a call is a waste
    harmful   f < d        a call costs accuracy
    neither   f = d = 0    wrong both ways: nothing to choose between

"not needed" is spare and harmful together. Rates, each over questions:

    redundant   c, of the questions on which a tool is not needed
    missed      1 - c, of those on which it is
    regret      max(d, f) - a: the accuracy that is lost against the better of the two ways

With one sample d and f are 0 or 1. Chance then makes some questions needed or harmful, and
max(d, f) too high, so regret is an upper bound; more samples (evaluate.samples, with a temperature)
bring both down. A question that is unscored in any of the three modes leaves all counts.

Cost is tokens (read and written, each once), seconds (of the model and of the tools) and calls.
What is saved is measured against always calling: 1 - allowed / forced. Seconds are those of this
machine under this load: in process all trajectories of a batch call at once and wait for one
another; behind a server they are latencies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.answers import Answer
from trainer.bootstrap import Floats, Parts, estimates

MODES = ("allowed", "forbidden", "forced")
CLASSES = ("needed", "spare", "harmful", "neither")
COSTS = ("tokens", "seconds", "calls")


@dataclass(frozen=True)
class Ways:
    """What became of the questions that are scored in all three modes; arrays are [Q]."""

    ids: list[str]
    kinds: list[str]
    labels: list[bool | None]
    """The task's own word: needs_tool."""
    right: Mapping[str, Floats]
    """mode -> share of right answers."""
    called: Floats
    """c"""
    cost: Mapping[str, Mapping[str, Floats]]
    """mode -> cost -> mean over samples; NaN where nobody counted."""
    unscored: int
    """Questions left out."""
    obeyed: Mapping[str, float | None]
    """Share of forced trajectories that call, and of forbidden ones that do not: 1 where the action
    is begun in the policy's place and it goes along."""

    @property
    def classes(self) -> Mapping[str, Floats]:
        """1.0 for the questions of each of CLASSES."""
        d, f = self.right["forbidden"], self.right["forced"]
        flags = (f > d, (f == d) & (f > 0), f < d, (f == d) & (f == 0))
        return {name: flag.astype(np.float64) for name, flag in zip(CLASSES, flags, strict=True)}

    def of(self, which: Sequence[int]) -> Ways:
        """Those questions alone."""
        index = np.asarray(which, dtype=np.intp)
        return Ways(
            [self.ids[i] for i in which],
            [self.kinds[i] for i in which],
            [self.labels[i] for i in which],
            {mode: right[index] for mode, right in self.right.items()},
            self.called[index],
            {
                mode: {name: one[index] for name, one in costs.items()}
                for mode, costs in self.cost.items()
            },
            0,
            self.obeyed,
        )


def ways(answers: Sequence[Answer]) -> Ways:
    """Raises ValueError for a question that was not played in all three modes."""
    by_question: dict[str, dict[str, list[Answer]]] = {}
    for answer in answers:
        if answer.mode in MODES:
            modes = by_question.setdefault(answer.id, {mode: [] for mode in MODES})
            modes[answer.mode].append(answer)
    for name, modes in by_question.items():
        if missing := [mode for mode in MODES if not modes[mode]]:
            raise ValueError(f"question {name} was not played with tools {' and '.join(missing)}")
    scored = {
        name: {mode: [a for a in some if a.scored] for mode, some in modes.items()}
        for name, modes in by_question.items()
    }
    kept = {name: modes for name, modes in scored.items() if all(modes.values())}

    def mean(mode: str, value) -> Floats:
        return np.array(
            [np.mean([value(a) for a in modes[mode]]) for modes in kept.values()], dtype=np.float64
        )

    first = [modes["allowed"][0] for modes in kept.values()]
    return Ways(
        ids=list(kept),
        kinds=[answer.kind for answer in first],
        labels=[answer.needs_tool for answer in first],
        right={mode: mean(mode, lambda a: a.correct) for mode in MODES},
        called=mean("allowed", lambda a: a.calls > 0),
        cost={
            mode: {name: mean(mode, lambda a, name=name: getattr(a, name)) for name in COSTS}
            for mode in MODES
        },
        unscored=len(by_question) - len(kept),
        obeyed={
            "forced": _share([a.calls > 0 for modes in kept.values() for a in modes["forced"]]),
            "forbidden": _share(
                [a.calls == 0 for modes in kept.values() for a in modes["forbidden"]]
            ),
        },
    )


def arbitration_parts(played: Ways) -> Parts:
    """Numerators and denominators of every rate, by question."""
    one = np.ones(len(played.ids))
    c, classes = played.called, played.classes
    idle = classes["spare"] + classes["harmful"]
    best = np.maximum(played.right["forbidden"], played.right["forced"])
    parts = {f"accuracy_{mode}": (played.right[mode], one) for mode in MODES}
    parts["accuracy_best"] = (best, one)
    parts["regret"] = (best - played.right["allowed"], one)
    parts["tool_rate"] = (c, one)
    for name in CLASSES:
        parts[f"{name}_rate"] = (classes[name], one)
    parts["redundant_rate"] = (c * idle, idle)
    parts["missed_rate"] = ((1 - c) * classes["needed"], classes["needed"])
    for name in COSTS:
        allowed, forced = (played.cost[mode][name] for mode in ("allowed", "forced"))
        known = (~np.isnan(allowed + forced)).astype(np.float64)
        saved = np.nan_to_num(forced) - np.nan_to_num(allowed)
        parts[f"{name}_saved"] = (saved * known, np.nan_to_num(forced) * known)
    return parts


def arbitrate(answers: Sequence[Answer]) -> dict[str, Any]:
    """The table, the rates with their 95 % intervals, costs and labels; by kind as well."""
    played = ways(answers)
    kinds = dict.fromkeys(played.kinds)
    samples = max((a.sample for a in answers if a.mode in MODES), default=-1) + 1
    return {
        "samples": samples,
        "unscored": played.unscored,
        "obeyed": dict(played.obeyed),
        **_arbitrated(played),
        "by_kind": {
            kind: _arbitrated(played.of([i for i, k in enumerate(played.kinds) if k == kind]))
            for kind in kinds
        },
    }


def _arbitrated(played: Ways) -> dict[str, Any]:
    classes = played.classes
    named = {True: "labelled_needed", False: "labelled_idle", None: "unlabelled"}
    labels = {
        words: np.array([have is label for have in played.labels], dtype=np.float64)
        for label, words in named.items()
    }
    return {
        "questions": len(played.ids),
        "table": {
            name: {
                "called": float((played.called * flag).sum()),
                "not_called": float(((1 - played.called) * flag).sum()),
                **{words: int(flag @ label) for words, label in labels.items()},
            }
            for name, flag in classes.items()
        },
        "rates": estimates(arbitration_parts(played)),
        "cost": {
            mode: {name: _mean(values) for name, values in costs.items()}
            for mode, costs in played.cost.items()
        },
    }


def _mean(values: Floats) -> float | None:
    return None if not len(values) or np.isnan(values).any() else float(values.mean())


def _share(flags: Sequence[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
