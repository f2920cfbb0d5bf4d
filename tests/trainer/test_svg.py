"""The parts of a drawing: ticks, labels kept apart, curves smoothed and thinned."""

from __future__ import annotations

import pytest

from trainer.svg import el, series, smooth, spread, ticks


def test_elements_are_escaped():
    assert el("text", "<b>&\x00", x=1.04, class_='"', title="<i>") == (
        '<text x="1" class="&#34;"><title>&lt;i&gt;</title>&lt;b&gt;&amp;\u2400</text>'
    )


def test_ticks():
    assert ticks(0) == [0]
    assert ticks(1) == [0, 1]
    assert ticks(300) == [0, 50, 100, 150, 200, 250, 300]
    assert all(len(ticks(n)) <= 7 for n in range(1, 2000))


def test_spread():
    assert spread([11, 10, 50], 20) == pytest.approx([20.5, 0.5, 50])
    assert spread([10, 11, 30], 20) == pytest.approx([-3, 17, 37])
    assert spread([], 20) == []


def test_smooth_and_series():
    flat = smooth([(float(i), 1.0) for i in range(100)])
    assert all(y == pytest.approx(1) for _, y in flat) and len(flat) == 100
    rows = [{"step": i, "v": None if i % 2 else i} for i in range(2000)]
    points = series(rows, "v")
    assert len(points) == 400 and points[0][0] < points[-1][0]
