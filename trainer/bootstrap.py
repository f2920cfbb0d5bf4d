"""Intervals of rates over questions, by the bootstrap.

A rate is a ratio of two sums over questions. Questions are drawn again, with replacement, as often
as there are questions; the interval is between percentiles of the rates of 2,000 such draws (Efron,
"Bootstrap methods: another look at the jackknife", 1979). All answers to a question are drawn
together, for they depend on one another. A rate that is the same for every question (all right, or
all wrong) has an interval of no width: it says what these questions say, and not what is possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Parts = Mapping[str, tuple[Floats, Floats]]
"""name -> (numerators, denominators), each [Q] over questions."""

ROUNDS = 2_000
LEVEL = 0.95
_CHUNK = 2_000_000
"""Numbers drawn at once."""


def estimates(parts: Parts, *, rounds: int = ROUNDS, level: float = LEVEL) -> dict[str, Any]:
    """name -> {"value", "low", "high"}: sum of numerators over sum of denominators and its
    interval; all None where the denominators are zero."""
    values, draws = resampled(parts, rounds)
    return {name: _estimate(values[name], draws[name], level) for name in parts}


def differences(
    one: Parts, other: Parts, *, rounds: int = ROUNDS, level: float = LEVEL
) -> dict[str, Any]:
    """name -> {"value", "low", "high"} of rate in `one` minus rate in `other`, paired: both are of
    the same questions in the same order, and each draw takes the same questions of both."""
    values, draws = resampled(one, rounds)
    base_values, base_draws = resampled(other, rounds)
    return {
        name: _estimate(values[name] - base_values[name], draws[name] - base_draws[name], level)
        for name in one
    }


def resampled(parts: Parts, rounds: int) -> tuple[dict[str, float], dict[str, Floats]]:
    """(name -> the rate, name -> the rates [rounds] of the draws). NaN where a denominator is 0.

    The draws depend on the number of questions alone, so that equal numbers give equal draws.
    """
    if not parts:
        return {}, {}
    top, bottom = (np.stack([pair[side] for pair in parts.values()], axis=1) for side in (0, 1))
    count = len(top)
    random = np.random.default_rng(count)
    step = max(1, _CHUNK // max(count, 1))
    drawn = []
    for start in range(0, rounds if count else 0, step):
        size = min(step, rounds - start)
        chosen = random.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=size * count).reshape(size, count)
        drawn.append(_ratio(weights @ top, weights @ bottom))
    rates = np.concatenate(drawn) if drawn else np.full((rounds, len(parts)), np.nan)
    whole = _ratio(top.sum(0), bottom.sum(0))
    return dict(zip(parts, whole.tolist(), strict=True)), dict(zip(parts, rates.T, strict=True))


def _ratio(top: Floats, bottom: Floats) -> Floats:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom != 0)


def _estimate(value: float, draws: Floats, level: float) -> dict[str, float | None]:
    found = draws[~np.isnan(draws)]
    if np.isnan(value) or not len(found):
        return {"value": None, "low": None, "high": None}
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return {"value": float(value), "low": float(low), "high": float(high)}
