"""How an evaluation is said: numbers in words, and its table on the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text


def number(value: Any) -> float | None:
    """A finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has no bound on its integers
        return None


def section(mapping: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = mapping.get(name)
    return value if isinstance(value, dict) else {}


def percent(value: Any, digits: int = 1) -> str:
    found = number(value)
    return "–" if found is None else f"{100 * found:.{digits}f}"


def short_percent(value: Any) -> str:
    """`41.3 %`, `100 %`: for running text."""
    found = percent(value)
    return found if found == "–" else f"{found.removesuffix('.0')}\u202f%"


def short(value: Any) -> str:
    """Three significant digits: `0.0312`, `6,710`, `1.17e−5`."""
    found = number(value)
    if found is None:
        return "–"
    if 1000 <= abs(found) < 1e7:
        return f"{found:,.0f}".replace("-", "\u2212")
    return f"{found:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "\u2212")


def duration(seconds: Any) -> str:
    found = number(seconds)
    if found is None:
        return "–"
    if found < 60:
        return f"{found:.0f}\u202fs" if found >= 10 else f"{found:.1f}\u202fs"
    minutes, rest = divmod(round(found), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}\u202fh {minutes:02d}\u202fmin"
    return f"{minutes}\u202fmin {rest:02d}\u202fs"


def arbitration_table(
    title: str,
    before: Mapping[str, Any],
    after: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Table:
    """When a tool is called, and how often the answer is right: percent, and calls per question.
    `base`, the evaluation of the base model without tools, gives the column `by itself`."""
    both = [before] if after is None else [before, after]
    heading = Text(title, style="bold not italic")
    if after is not None:
        heading.append("  before → after", style="dim not bold")
    table = Table(
        title=heading, title_justify="left", header_style="dim", box=SIMPLE_HEAD, pad_edge=False,
        collapse_padding=True,
    )  # fmt: skip
    names = ["kind", "n", "tool", "accuracy %", "tool rate %", "calls"]
    if base is not None:
        names.insert(3, "by\nitself %")
    for name in names:
        side = "left" if name in ("kind", "tool") else "right"
        table.add_column(name, justify=side, vertical="bottom", no_wrap=True)

    def add(kind: str, evals: list, alone: Mapping[str, Any], needed: str, style: str = "") -> None:
        def joined(key: str, show: Callable[[Any], str] = percent) -> str:
            return " → ".join(show(e.get(key)) for e in evals)

        by_itself = [] if base is None else [percent(alone.get("direct_accuracy"))]
        n = evals[-1].get("n", evals[0].get("n", "–"))
        calls = joined("calls", lambda v: "–" if v is None else f"{v:.2f}")
        rates = joined("accuracy"), joined("tool_rate"), calls
        table.add_row(Text(kind), str(n), needed, *by_itself, *rates, style=style)

    def of_kind(evaluation: Mapping[str, Any] | None, kind: str) -> dict[str, Any]:
        return section(section(evaluation or {}, "by_kind"), kind)

    for kind in dict.fromkeys(kind for e in both for kind in section(e, "by_kind")):
        rows = [of_kind(e, kind) for e in both]
        needs = rows[-1].get("needs_tool", rows[0].get("needs_tool"))
        add(kind, rows, of_kind(base, kind), {True: "yes", False: "–"}.get(needs, "?"))
    table.add_section()
    add("all", both, base or {}, percent(both[-1].get("needed_rate")), style="bold")
    for key, words in (("redundant_rate", "redundant"), ("missed_rate", "missed")):
        blank = [""] * (len(names) - 3)
        table.add_row(words, *blank, " → ".join(percent(e.get(key)) for e in both), "")
    return table
