"""What the README quotes comes from bench/results, and is up to date."""

import json

from bench import bench_demo, render


def test_the_readme_is_not_stale():
    text = render.README.read_text()
    assert render.render(text) == text, "run: python -m bench.render"


def test_the_recorded_demo_meets_every_bar():
    record = json.loads((render.RESULTS / "demo.json").read_text())
    assert len(record["runs"]) >= 3
    for summary in record["runs"]:
        assert bench_demo.missed_bars(summary) == []


def test_a_bar_can_be_missed():
    record = json.loads((render.RESULTS / "demo.json").read_text())
    summary = record["runs"][0]
    worse = summary | {"final": summary["final"] | {"redundant_rate": 0.2, "missed_rate": 0.3}}
    assert bench_demo.missed_bars(worse) == ["redundant calls <= 0.05", "missed calls <= 0.10"]
