"""What `metis eval` and `metis compare` print: the tables of eval.json, within 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.table import arbitration_table, number, percent, section, short

PAGE = 4
"""Models beside one another in the table by kind."""


def say(console: Console, result: Mapping[str, Any]) -> None:
    """Prints all of an evaluation."""
    models = section(result, "models")
    mode = str(result.get("mode"))
    if len(models) == 1:
        (entry,) = models.values()
        measures = section(section(entry, "modes"), mode)
        console.print(arbitration_table("held-out questions", measures))
        for line in interval_lines(measures):
            console.print(Text(line, style="dim"))
    else:
        console.print(comparison_table(models, mode))
        names = list(models)
        for start in range(0, len(names), PAGE):
            some = {name: models[name] for name in names[start : start + PAGE]}
            console.print(kinds_table(some, mode))
    arbitrated = {name: a for name, e in models.items() if (a := section(e, "arbitration"))}
    if len(arbitrated) > 1:
        console.print(arbitrated_table(models))
    for name, arbitration in arbitrated.items():
        if len(models) == 1:
            console.print(classes_table("did calling help?", arbitration))
            for line in lines(arbitration):
                console.print(Text(line, style="dim"))
        title = "by kind" if len(models) == 1 else f"by kind: {name}"
        console.print(classes_by_kind(f"{title}, percent", arbitration))


def interval(estimate: Any, scale: float = 100.0, digits: int = 1, sign: str = "") -> str:
    """`12.1 [9.4, 15.0]` of {"value", "low", "high"}; percent, unless `scale` says otherwise."""
    found = [number(estimate.get(key)) for key in ("value", "low", "high")] if estimate else [None]
    if None in found:
        return "–"
    value, low, high = (f"{scale * x:{sign}.{digits}f}".replace("-", "\u2212") for x in found)
    return f"{value} [{low}, {high}]"


def of(measures: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A rate and its interval as {"value", "low", "high"}."""
    low, high = section(measures, "intervals").get(name) or (None, None)
    return {"value": measures.get(name), "low": low, "high": high}


def interval_lines(measures: Mapping[str, Any]) -> list[str]:
    shown = [
        f"{words} {interval(of(measures, name))} %"
        for name, words in (("accuracy", "accuracy"), ("tool_rate", "tool rate"))
    ]
    lost = measures.get("unscored")
    more = [f"{lost} unscored, in no count"] if lost else []
    return [" · ".join([*shown, "95 % intervals"]), *more]


def _table(title: str, names: Sequence[str]) -> Table:
    table = Table(
        title=Text(title, style="bold not italic"), title_justify="left", header_style="dim",
        box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
    )  # fmt: skip
    for n, name in enumerate(names):
        table.add_column(name, justify="right" if n else "left", vertical="bottom", no_wrap=n > 0)
    return table


def comparison_table(models: Mapping[str, Any], mode: str) -> Table:
    """Rates of each model and, below, its differences to the first with their intervals."""
    table = _table("side by side", ["model", "accuracy %", "tool rate %", "calls", "tokens"])
    for name, entry in models.items():
        measures = section(section(entry, "modes"), mode)
        table.add_row(
            Text(name),
            percent(measures.get("accuracy")),
            percent(measures.get("tool_rate")),
            _plain(measures.get("calls")),
            short(measures.get("tokens")),
        )
        difference = section(entry, "differences")
        if not difference:
            continue
        shown = [
            interval(difference.get("accuracy"), sign="+"),
            interval(difference.get("tool_rate"), sign="+"),
            interval(difference.get("calls"), 1.0, 2, "+").partition(" ")[0],
            interval(difference.get("tokens"), 1.0, 0, "+").partition(" ")[0],
        ]
        table.add_row("  change", *shown, style="dim")
    return table


def kinds_table(models: Mapping[str, Any], mode: str) -> Table:
    """Accuracy and tool rate of each kind, models beside one another."""
    table = _table("by kind: accuracy %, tool rate %", ["kind", "n", *(n[:14] for n in models)])
    measures = [section(section(entry, "modes"), mode) for entry in models.values()]
    for kind in section(measures[0], "by_kind"):
        rows = [section(section(one, "by_kind"), kind) for one in measures]
        cells = [f"{percent(r.get('accuracy'))}  {percent(r.get('tool_rate')):>5}" for r in rows]
        table.add_row(Text(kind), str(rows[0].get("n", "–")), *cells)
    return table


WORDS = {
    "needed": "needed: the tool gains",
    "spare": "not needed: right both ways",
    "harmful": "not needed: a call costs",
    "neither": "neither: wrong both ways",
}


def classes_table(title: str, arbitration: Mapping[str, Any]) -> Table:
    """What calling was worth, by whether a tool was called; the task's own labels beside it."""
    table = _table(
        title, ["", "called", "not called", "questions", "labelled\nneeded", "labelled\nnot"]
    )
    for name, words in WORDS.items():
        row = section(section(arbitration, "table"), name)
        called, not_called = (number(row.get(k)) or 0.0 for k in ("called", "not_called"))
        table.add_row(
            words,
            f"{called:g}" if called % 1 == 0 else f"{called:.1f}",
            f"{not_called:g}" if not_called % 1 == 0 else f"{not_called:.1f}",
            f"{called + not_called:.0f}",
            str(row.get("labelled_needed", "–")),
            str(row.get("labelled_idle", "–")),
        )
    return table


def lines(arbitration: Mapping[str, Any]) -> list[str]:
    """The rates, accuracies and costs in words; each fits into 80 columns."""
    rates, cost = section(arbitration, "rates"), section(arbitration, "cost")

    def rate(name: str) -> str:
        return interval(rates.get(name))

    def means(name: str) -> str:
        modes = ("forbidden", "allowed", "forced")
        return ", ".join(f"{mode} {short(section(cost, mode).get(name))}" for mode in modes)

    out = [
        f"redundant {rate('redundant_rate')} % · missed {rate('missed_rate')} %",
        f"regret {rate('regret')} %",
        "right, %: "
        + ", ".join(
            f"{words} {percent(section(rates, f'accuracy_{name}').get('value'))}"
            for name, words in (
                ("allowed", "allowed"),
                ("forbidden", "forbidden"),
                ("forced", "forced"),
                ("best", "the better of the two"),
            )
        ),
        f"saved against always calling: tokens {rate('tokens_saved')} %",
        f"  calls {rate('calls_saved')} % · seconds {rate('seconds_saved')} %",
        f"tokens a question: {means('tokens')}",
        f"seconds a question: {means('seconds')}",
    ]
    if lost := arbitration.get("unscored"):
        out.append(f"{lost} questions are unscored in some mode, and in no count")
    disobeyed = [
        f"{percent(1 - share)} % of the {mode}"
        for mode, share in section(arbitration, "obeyed").items()
        if share is not None and share < 1
    ]
    if disobeyed:
        out.append(f"did not do as told: {', '.join(disobeyed)} trajectories")
    return out


def arbitrated_table(models: Mapping[str, Any]) -> Table:
    """The rates of arbitration of each model and, below, its differences to the first."""
    names = {"redundant_rate": "redundant", "missed_rate": "missed", "regret": "regret"}
    table = _table("did calling help? percent", ["model", "needed", *names.values()])
    for name, entry in models.items():
        rates = section(section(entry, "arbitration"), "rates")
        needed = percent(section(rates, "needed_rate").get("value"))
        table.add_row(Text(name), needed, *(interval(rates.get(key)) for key in names))
        if difference := section(entry, "differences"):
            shown = [interval(difference.get(key), sign="+") for key in names]
            table.add_row("  change", "", *shown, style="dim")
    return table


def classes_by_kind(title: str, arbitration: Mapping[str, Any]) -> Table:
    names = {
        "needed_rate": "needed", "spare_rate": "spare", "harmful_rate": "harm",
        "neither_rate": "nei-\nther", "redundant_rate": "redun-\ndant", "missed_rate": "missed",
        "regret": "regret", "tokens_saved": "tokens\nsaved",
    }  # fmt: skip
    table = _table(title, ["kind", "n", *names.values()])
    rows = section(arbitration, "by_kind").items()
    for kind, one in [*rows, ("all", arbitration)]:
        rates = section(one, "rates")
        cells = [percent(section(rates, name).get("value"), 0) for name in names]
        if kind == "all":
            table.add_section()
        table.add_row(Text(kind), str(one.get("questions", "–")), *cells)
    return table


def _plain(value: Any) -> str:
    found = number(value)
    return "–" if found is None else f"{found:.2f}"
