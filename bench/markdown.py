"""Numbers and tables as the README shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

NOTHING = "–"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def figures(value: float | None) -> str:
    """Three significant ones, with their zeros."""
    if value is None:
        return NOTHING
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{max(decimals, 0)}f}"
