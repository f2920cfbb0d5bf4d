"""The page of an evaluation: eval_report.html.j2, which is the report of a run with other sections.

`write_report` is for the run folder of `metis eval`, `write_comparison` for what `metis compare`
has put together. Names and texts may be anybody's: they pass through `svg.el` or autoescaping.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer import eval_tables
from trainer.log import strict_json
from trainer.pictures import pareto
from trainer.report import context, template
from trainer.svg import Run, read_json, read_run, save, standalone, svg
from trainer.table import number, section, short, short_percent

CLASSES = (
    ("needed", "needed", "right more often with a call"),
    ("spare", "not needed", "right as often without"),
    ("harmful", "not needed", "right less often with a call"),
    ("neither", "neither", "wrong both ways"),
)
GOOD = {("needed", "called"), ("spare", "not_called"), ("harmful", "not_called")}
RATES = (
    ("redundant_rate", "redundant", "called, of the questions on which a call gains nothing"),
    ("missed_rate", "missed", "not called, of those on which it gains"),
    ("regret", "regret", "accuracy lost against the better of forbidden and forced"),
    ("accuracy_allowed", "accuracy, allowed", "the policy chooses"),
    ("accuracy_forbidden", "accuracy, forbidden", "never a call"),
    ("accuracy_forced", "accuracy, forced", "always a call"),
    ("accuracy_best", "accuracy, the better", "of forbidden and forced, question by question"),
    ("tokens_saved", "tokens saved", "against always calling"),
    ("seconds_saved", "seconds saved", "against always calling, model and tools"),
    ("calls_saved", "calls saved", "against always calling"),
)
BY_KIND = ("needed_rate", "spare_rate", "harmful_rate", "neither_rate", "redundant_rate",
           "missed_rate", "regret", "tokens_saved")  # fmt: skip


def write_report(folder: str | Path) -> Path:
    """Write report.html, and pareto.svg where the evaluation is complete; the page's path."""
    folder = Path(folder)
    run = read_run(folder)
    result = read_json(folder / "eval.json", run.notes)
    if section(result, "models"):
        save(folder / "pareto.svg", picture(result))
    return save(folder / "report.html", page(run, result))


def write_comparison(path: Path, result: Mapping[str, Any]) -> Path:
    """Write a page (.html), the picture alone (.svg) or everything (.json), by the suffix."""
    if path.suffix == ".svg":
        return save(path, picture(result))
    if path.suffix == ".json":
        return save(path, strict_json(result, indent=1) + "\n")
    return save(path, page(Run(name=path.stem), result))


def _models(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found = section(result, "models")
    return {name: section(found, name) for name in found}


def picture(result: Mapping[str, Any]) -> str:
    label = "accuracy against tool rate for every model"
    return standalone(720, _height(result), label, pareto(_arms(result)))


def page(run: Run, result: Mapping[str, Any]) -> str:
    models = _models(result)
    mode = str(result.get("mode"))
    drawing = pareto(_arms(result))
    height = _height(result)
    return template("eval_report.html.j2").render(
        context(run)
        | {
            "lede": lede(result),
            "arms": [],
            "models": [_model(name, entry, mode) for name, entry in models.items()],
            "kind_names": list(_kinds(models, mode)),
            "classes": CLASSES,
            "arbitrated": [
                {"name": name, **_arbitrated(section(entry, "arbitration"))}
                for name, entry in models.items()
                if section(entry, "arbitration")
            ],
            "evaluated": svg(
                720, height, "accuracy against tool rate", drawing, class_="chart wide"
            ),
        }
    )


def lede(result: Mapping[str, Any]) -> str:
    """The evaluation in a sentence or two."""
    status, models = result.get("status"), _models(result)
    if not models:
        played = sum(n for n in section(result, "answers").values() if isinstance(n, int))
        return (
            f"This evaluation is {status or 'not there'}: {played:,} of {result.get('of', 0):,} "
            "answers are in answers.jsonl, and nothing was computed of them."
        )
    name, first = next(iter(models.items()))
    measures = section(section(first, "modes"), str(result.get("mode")))
    said = (
        f"{name} answered {short_percent(measures.get('accuracy'))} of {result.get('questions')} "
        f"questions right and called a tool on {short_percent(measures.get('tool_rate'))}."
    )
    rates = section(section(first, "arbitration"), "rates")
    if rates:
        said += (
            f" A call gains on {short_percent(section(rates, 'needed_rate').get('value'))} of them;"
            f" of those {short_percent(section(rates, 'missed_rate').get('value'))} were missed."
        )
    return said


def _arms(result: Mapping[str, Any]) -> Run:
    """The models as arms of a comparison, each a point with its intervals; of a single one also
    what it would be with never a call and with always one."""
    models, mode = _models(result), str(result.get("mode"))
    points = [(name, section(section(one, "modes"), mode)) for name, one in models.items()]
    if len(models) == 1:
        modes = section(next(iter(models.values())), "modes")
        extremes = (("forbidden", "never a call"), ("forced", "always a call"))
        points += [(words, modes[one]) for one, words in extremes if section(modes, one)]
    arms = [{"name": name, "seed": None, "final": final} for name, final in points]
    return Run(name="", compare={"arms": arms})


def _height(result: Mapping[str, Any]) -> int:
    return max(420, 104 + 42 * len(_models(result)))


def _kinds(models: Mapping[str, Any], mode: str) -> dict[str, None]:
    return dict.fromkeys(
        kind
        for entry in models.values()
        for kind in section(section(section(entry, "modes"), mode), "by_kind")
    )


def _model(name: str, entry: Mapping[str, Any], mode: str) -> dict[str, Any]:
    measures = section(section(entry, "modes"), mode)
    difference = section(entry, "differences")
    shown = [
        ("accuracy", 100.0, 1),
        ("tool_rate", 100.0, 1),
        ("calls", 1.0, 2),
        ("tokens", 1.0, 0),
        ("seconds", 1.0, 3),
    ]
    cells = [
        (
            eval_tables.interval(eval_tables.of(measures, key), scale, digits),
            eval_tables.interval(difference.get(key), scale, digits, "+") if difference else None,
        )
        for key, scale, digits in shown
    ]
    kinds = section(measures, "by_kind")
    of_kind = section(difference, "by_kind")
    return {
        "name": name,
        "n": measures.get("n"),
        "unscored": measures.get("unscored"),
        "cells": cells,
        "kinds": {
            kind: {
                "n": one.get("n"),
                "accuracy": eval_tables.interval(eval_tables.of(one, "accuracy")),
                "tool_rate": eval_tables.interval(eval_tables.of(one, "tool_rate")),
                "difference": eval_tables.interval(
                    section(of_kind, kind).get("accuracy"), sign="+"
                ),
            }
            for kind, one in kinds.items()
        },
    }


def _arbitrated(arbitration: Mapping[str, Any]) -> dict[str, Any]:
    rates = section(arbitration, "rates")
    total = number(arbitration.get("questions")) or 1.0
    table = {}
    for name, _, _ in CLASSES:
        row = section(section(arbitration, "table"), name)
        for side in ("called", "not_called"):
            count = number(row.get(side)) or 0.0
            table[name, side] = {
                "count": short(count),
                "share": count / total,
                "good": (name, side) in GOOD,
            }
    rows = section(arbitration, "by_kind").items()
    return {
        "questions": arbitration.get("questions"),
        "samples": arbitration.get("samples"),
        "unscored": arbitration.get("unscored"),
        "table": table,
        "labels": {name: section(section(arbitration, "table"), name) for name, _, _ in CLASSES},
        "rates": [
            (words, eval_tables.interval(rates.get(name)), note) for name, words, note in RATES
        ],
        "cost": section(arbitration, "cost"),
        "kinds": [
            (
                kind,
                one.get("questions"),
                [section(section(one, "rates"), name).get("value") for name in BY_KIND],
            )
            for kind, one in rows
        ],
    }
