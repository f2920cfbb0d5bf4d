"""Numbers in words, and the table of an evaluation on the terminal."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from trainer.log import RunLog
from trainer.table import duration, percent, short, short_percent


def evaluation(rate: float) -> dict:
    kinds = {"sum_easy": False, "product_[b]": True}
    row = {"n": 50, "accuracy": 1.0, "tool_rate": rate, "calls": rate, "direct_accuracy": None}
    return {
        "accuracy": 0.93, "tool_rate": rate, "calls": rate, "n": 100, "needed_rate": 0.5,
        "redundant_rate": rate, "missed_rate": None,
        "by_kind": {kind: row | {"needs_tool": needs} for kind, needs in kinds.items()},
    }  # fmt: skip


@pytest.fixture
def shown(tmp_path):
    """Prints a table through a log and returns the lines of it."""

    def show(*evaluations, width: int = 80, title: str = "Held-out [i]", **named) -> list[str]:
        out = io.StringIO()
        console = Console(file=out, width=width)
        RunLog(tmp_path, console=console).table(title, *evaluations, **named)
        return out.getvalue().splitlines()

    return show


def test_one_evaluation_and_two(shown):
    one = "\n".join(shown(evaluation(1.0)))
    assert "Held-out [i]" in one and "product_[b]" in one and "→" not in one
    two = "\n".join(shown(evaluation(1.0), evaluation(0.4)))
    assert "100.0 → 40.0" in two and "1.00 → 0.40" in two and "– → –" in two
    assert "itself" not in two
    assert shown({}, {})


def test_the_base_model_by_itself(shown):
    base = evaluation(0.0) | {"direct_accuracy": 0.625}
    base["by_kind"]["sum_easy"] |= {"direct_accuracy": 0.98}
    lines = shown(evaluation(1.0), evaluation(1.0), base=base)
    assert "…" not in "".join(lines) and all(len(line.rstrip()) <= 80 for line in lines)
    rows = {line.split()[0]: line.split() for line in lines if line.split()}
    assert rows["sum_easy"][1:4] == ["50", "–", "98.0"]
    assert rows["product_[b]"][1:4] == ["50", "yes", "–"]
    assert rows["all"][1:4] == ["100", "50.0", "62.5"]
    assert shown(evaluation(1.0), base={})


def test_numbers_in_words():
    assert [percent(v) for v in (0.5, 1, None, math.nan, "x", True)] == ["50.0", "100.0", *"––––"]
    assert [short_percent(v) for v in (0.413, 1.0)] == ["41.3\u202f%", "100\u202f%"]
    assert [short(v) for v in (0.0312, 6710, 1.17e-5, 10**400)] == [
        "0.0312", "6,710", "1.17e\u22125", "–",
    ]  # fmt: skip
    assert [duration(s) for s in (3.14, 59, 60, 3725)] == [
        "3.1\u202fs", "59\u202fs", "1\u202fmin 00\u202fs", "1\u202fh 02\u202fmin",
    ]  # fmt: skip
