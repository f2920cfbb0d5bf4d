"""Intervals against what they are: all draws enumerated, coverage, and pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.bootstrap import differences, estimates


def _rate(top, bottom=None):
    top = np.array(top, dtype=np.float64)
    return {"rate": (top, np.ones(len(top)) if bottom is None else np.array(bottom, float))}


def test_the_interval_is_that_of_all_draws():
    top, bottom = np.array([0.0, 1.0, 3.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 1.0, 4.0])
    draws = [list(draw) for draw in itertools.product(range(5), repeat=5)]
    rates = np.array([top[draw].sum() / bottom[draw].sum() for draw in draws])
    # Where the enumerated distribution has steps, a quantile may fall on either side of one.
    for level in (0.8, 0.95):
        found = estimates(_rate(top, bottom), rounds=20_000, level=level)["rate"]
        assert found["value"] == 7 / 11
        for end, q in (("low", (1 - level) / 2), ("high", (1 + level) / 2)):
            near = np.quantile(rates, [q - 0.005, q + 0.005])
            assert near[0] <= found[end] <= near[1], (level, end)


def test_a_95_percent_interval_covers_the_truth_about_so_often():
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        found = estimates(_rate(random.random(80) < 0.7), rounds=500)["rate"]
        covered += found["low"] <= 0.7 <= found["high"]
    assert 0.90 <= covered / 200 <= 0.98


def test_a_ratio_is_resampled_as_a_ratio():
    """Not the mean of single ratios: a question with four calls weighs four times."""
    found = estimates(_rate([4.0, 0.0], [4.0, 1.0]))["rate"]
    assert (found["value"], found["low"], found["high"]) == (4 / 5, 0.0, 1.0)


def test_where_there_is_nothing_there_is_no_rate():
    none = {"value": None, "low": None, "high": None}
    assert estimates(_rate([0.0, 0.0], [0.0, 0.0]))["rate"] == none
    assert estimates(_rate([]))["rate"] == none and estimates({}) == {}
    # A draw without any denominator says nothing, and is not taken for 0.
    found = estimates(_rate([1.0, 0.0, 0.0], [1.0, 0.0, 0.0]))["rate"]
    assert found == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_equal_questions_give_equal_intervals_and_equal_runs_no_difference():
    values = np.random.default_rng(1).random(50) < 0.5
    assert estimates(_rate(values)) == estimates(_rate(values))
    same = differences(_rate(values), _rate(values))["rate"]
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_paired_difference_is_known_better_than_its_ends():
    random = np.random.default_rng(2)
    one = random.random(200) < 0.5
    other = one.copy()
    other[:12] = True
    difference = differences(_rate(other), _rate(one))["rate"]
    assert difference["value"] == pytest.approx(other.mean() - one.mean()) and difference["low"] > 0
    ends = [estimates(_rate(values))["rate"] for values in (one, other)]
    assert ends[0]["high"] > ends[1]["low"]  # by themselves they could be the same


def test_many_questions_are_drawn_in_parts():
    values = (np.arange(30_000) % 4 == 0).astype(float)
    found = estimates(_rate(values), rounds=200)["rate"]
    assert found["value"] == 0.25 and 0.24 < found["low"] < 0.25 < found["high"] < 0.26
