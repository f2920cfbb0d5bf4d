"""The pictures of the microbenchmarks: texts of SVG files that follow the page's light and dark.

A record is one provider's in one case, as `bench.bench_linear_hdpo` writes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from trainer.svg import Plot, el, path_of, spread, standalone, ticks
from trainer.table import short, short_percent

Record = dict[str, Any]
WIDTH = 860
LEFT = 22


def providers(words: str, case: Sequence[Record]) -> str:
    """A bar per provider that was timed, fastest first; the dashed line is the bare products."""
    floor = next(r["median_ms"] for r in case if r["provider"] == "products")
    timed = [r for r in case if "median_ms" in r and r["provider"] != "products"]
    timed.sort(key=lambda r: r["median_ms"])
    high = max([floor, *(r["p80_ms"] for r in timed)])
    plot = Plot(280, 92, 420, 28.0 * len(timed), (0, high))
    bottom = plot.top + plot.height
    x = plot.x(floor)
    parts = [
        *_heading("Time of loss and gradients, by provider", words),
        _text(f"products {short(floor)} ms", x, plot.top - 10, "t", "middle"),
        *(_bar(plot, record, plot.top + 28 * i) for i, record in enumerate(timed)),
        el("line", x1=x, x2=x, y1=plot.top - 4, y2=bottom, class_="dash"),
    ]
    notes = ["Median; whisker: 20th to 80th percentile. Dashed: the bare matrix products."]
    if any(r["objective"] != "hdpo" for r in timed):
        notes.append("Faint: another objective, less work than hdpo.")
    parts += [_text(note, LEFT, bottom + 28 + 19 * i, "t") for i, note in enumerate(notes)]
    height = round(bottom + 27 + 19 * len(notes))
    return standalone(WIDTH, height, f"time per provider, {words}", *parts)


def _bar(plot: Plot, record: Record, top: float) -> Markup:
    """Name, objective, bar with whisker, and the time in numbers."""
    cls = "bar acc" if record["provider"].startswith("ours") else "bar tool"
    cls += " faint" * (record["objective"] != "hdpo")
    end = plot.x(record["median_ms"])
    low, high = plot.x(record["p20_ms"]), plot.x(record["p80_ms"])
    middle, line = top + 14, top + 18
    said = f"{short(record['median_ms'])} ms, {short(record['of_floor'])} x"
    whisker = path_of([(low, middle), (high, middle)])
    whisker += path_of([(low, middle - 3), (low, middle + 3)])
    whisker += path_of([(high, middle - 3), (high, middle + 3)])
    return Markup("").join([
        _text(record["provider"], LEFT, line, "t strong"),
        _text(record["objective"], plot.left - 12, line, "t", "end"),
        el("rect", x=plot.left, y=middle - 8, width=end - plot.left, height=16, class_=cls),
        el("path", d=whisker, class_="line ink"),
        _text(said, max(end, high) + 10, line, "t strong"),
    ])  # fmt: skip


def active(words: str, cases: Sequence[Sequence[Record]]) -> str:
    """Time over the share of tokens that carry loss: a line per provider timed at two or more."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in (r for case in cases for r in case if "median_ms" in r):
        lines.setdefault(record["provider"], []).append((record["active"], record["median_ms"]))
    lines = {name: sorted(points) for name, points in lines.items() if len(points) > 1}
    high = 1.05 * max(y for points in lines.values() for _, y in points)
    plot = Plot(70, 84, 490, 260, (0, 1), (0, high))
    parts = [*_heading("Time against the share of tokens that carry loss", words), _axes(plot)]
    # Ours last, so that it lies on top.
    for name in sorted(lines, key=lambda name: name.startswith("ours")):
        line, mark, _ = _classes(name)
        dashed = {"stroke_dasharray": "3 4"} if name == "products" else {}
        points = plot.at(lines[name])
        parts.append(el("path", d=path_of(points), class_=line, stroke_width=2, **dashed))
        parts += [el("circle", cx=x, cy=y, r=3.5, class_=mark) for x, y in points]
    ends = [plot.at(points)[-1] for points in lines.values()]
    for (name, points), (x, _), y in zip(
        lines.items(), ends, spread([y for _, y in ends], 19), strict=True
    ):
        said = f"{name} {short(points[-1][1])} ms"
        parts.append(_text(said, x + 12, y + 4, _classes(name)[2]))
    return standalone(WIDTH, 408, f"time against active share, {words}", *parts)


def _classes(provider: str) -> tuple[str, str, str]:
    """Of its line, its marks and its label."""
    if provider == "products":
        return "line ink", "t", "label need"
    colour = "acc" if provider.startswith("ours") else "tool"
    return f"line {colour}", f"bar {colour}", f"label {colour}"


def _axes(plot: Plot) -> Markup:
    floor = plot.top + plot.height
    parts = []
    # In microseconds, since `ticks` has no step below 1.
    for y in (tick / 1e3 for tick in ticks(1e3 * plot.y_range[1])):
        parts.append(plot.rule(y, "grid"))
        parts.append(_text(f"{short(y)} ms", plot.left - 8, plot.y(y) + 4, "t", "end"))
    for x in (i / 5 for i in range(6)):
        parts.append(_text(short_percent(x), plot.x(x), floor + 19, "t", "middle"))
    parts.append(_text("active share", plot.left + plot.width / 2, floor + 41, "t", "middle"))
    return Markup("").join(parts)


def _heading(title: str, words: str) -> tuple[Markup, Markup]:
    return _text(title, LEFT, 30, "title"), _text(words, LEFT, 51, "t")


def _text(words: str, x: float, y: float, cls: str, anchor: str = "start") -> Markup:
    return el("text", words, x=float(x), y=float(y), text_anchor=anchor, class_=cls)
