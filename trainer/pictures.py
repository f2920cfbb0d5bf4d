"""The pictures of a run, each an SVG file that needs nothing but itself.

`write_picture` makes demo.svg, the README's: accuracy and tool rate over RL, and the tool rate of
every kind. `write_comparison` makes pareto.svg: accuracy against tool rate for every arm and seed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trainer.log import RunError
from trainer.svg import (
    Plot,
    Run,
    curve_chart,
    el,
    kind_rows,
    last_step,
    mean,
    path_of,
    read_run,
    save,
    standalone,
)
from trainer.table import number, percent, section, short_percent

# ---------------------------------------------------------------------------------------------
# The picture of a run


def kind_bars(run: Run, left: float, top: float) -> Markup:
    """Tool rate before (thin, faint) and after (bold), grouped by whether a tool is needed."""
    parts, y = [], top
    rows = [row for row in kind_rows(run) if row["before"] or row["after"]]
    for needs, words in ((False, "no tool needed"), (True, "tool needed"), (None, "unknown")):
        group = [row for row in rows if row["needs"] is needs]
        if not group:
            continue
        parts.append(el("text", words, x=left, y=y + 4, class_="t strong"))
        y += 21
        for row in group:
            parts.append(el("text", row["kind"], x=left, y=y + 4, class_="t"))
            parts.append(el("rect", x=left + 104, y=y - 5, width=110, height=10, class_="track"))
            for name, inset, cls in (("before", 0, "bar tool faint"), ("after", 2, "bar tool")):
                value = number(row[name].get("tool_rate"))
                if value is not None:
                    box = {"x": left + 104, "y": y - 5 + inset, "height": 10 - 2 * inset}
                    parts.append(el("rect", **box, width=110 * value, class_=cls))
            shown = [percent(row[name].get("tool_rate"), 0) for name in ("before", "after")]
            said = " → ".join(shown) + "\u202f%"
            parts.append(el("text", said, x=left + 298, y=y + 4, text_anchor="end", class_="t"))
            y += 23
        y += 10
    return Markup("").join(parts)


def write_picture(folder: str | Path) -> Path:
    """Write demo.svg: accuracy and tool rate over RL, and the tool rate of every kind."""
    folder = Path(folder)
    run = read_run(folder)
    plot = Plot(62, 62, 350, 260, (0, float(max(last_step(run), 1))))
    title = el("text", "Learning when to call a tool", x=22, y=30, class_="title")
    heading = el("text", "Tool rate by kind of question", x=540, y=30, class_="title")
    parts = [title, curve_chart(run, plot, hover=False), heading, kind_bars(run, 540, 62)]
    label = "accuracy and tool rate over the steps of RL, and tool rate by kind of question"
    return save(folder / "demo.svg", standalone(860, 380, label, *parts))


# ---------------------------------------------------------------------------------------------
# Arms compared


@dataclass
class Arm:
    """One setting of the loss over several seeds."""

    name: str
    points: list[tuple[Any, dict[str, Any]]]
    """(seed, EVAL)"""

    def spread(self, key: str, kind: str | None = None) -> tuple[float, float, float] | None:
        """Mean, min and max over the seeds; of a single one its 95 % interval, where it has one."""
        evals = [e for _, e in self.points]
        if kind is not None:
            evals = [section(section(e, "by_kind"), kind) for e in evals]
        if len(evals) == 1 and (interval := section(evals[0], "intervals").get(key)):
            ends = (evals[0].get(key), *interval)
            known = [end for end in map(number, ends) if end is not None]
            if len(known) == 3:
                return known[0], known[1], known[2]
        values = [v for e in evals if (v := number(e.get(key))) is not None]
        return (mean(values), min(values), max(values)) if values else None


def arms_of(run: Run) -> list[Arm]:
    """The SFT start, then every arm in the order of the file."""
    entries = run.compare.get("arms")
    arms: dict[str, Arm] = {}
    start = Arm("SFT start", [])
    for entry in entries if isinstance(entries, list) else []:
        if not isinstance(entry, dict):
            continue
        name, seed = str(entry.get("name")), entry.get("seed")
        if sft := section(entry, "sft"):
            if (seed, sft) not in start.points:  # the arms of one seed share their start
                start.points.append((seed, sft))
        if final := section(entry, "final"):
            arms.setdefault(name, Arm(name, [])).points.append((seed, final))
    return [start, *arms.values()] if start.points else list(arms.values())


SHAPES = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z",  # circle
    "M-4.4,-4.4H4.4V4.4H-4.4Z",  # square
    "M0,-5.6L5.2,4H-5.2Z",  # triangle
    "M0,-6L6,0L0,6L-6,0Z",  # diamond
    "M0,5.6L5.2,-4H-5.2Z",  # triangle, point down
    "M-5,-2H-2V-5H2V-2H5V2H2V5H-2V2H-5Z",  # cross
    "M-5.2,-3L0,-6L5.2,-3V3L0,6L-5.2,3Z",  # hexagon
)
"""One for each arm, in SVG units around the point, so that colour is not needed to tell them."""


def pareto(run: Run) -> Markup:
    """Accuracy against tool rate: one marker per seed, thin lines from min to max at the mean."""
    arms = arms_of(run)
    found = [y for arm in arms if (y := arm.spread("accuracy"))]
    low = min((y[1] for y in found), default=0.0)
    high = max((y[2] for y in found), default=1.0)
    unit = 0.05 if high - low < 0.3 else 0.1
    bottom = max(0.0, math.floor((low - unit / 2) / unit) * unit)
    top = min(1.0, math.ceil((high + unit / 4) / unit) * unit)
    plot = Plot(62, 72, 410, 290, (0.0, 1.0), (bottom, top))
    ys = [bottom + i * unit for i in range(round((top - bottom) / unit) + 1)]
    fifths = [i / 5 for i in range(6)]
    parts = [
        el("text", "Accuracy against tool rate, held-out questions", x=22, y=30, class_="title"),
        plot.grid(ys, fifths, "tool rate: questions on which a tool was called", short_percent),
    ]
    needed = [spread for arm in arms if (spread := arm.spread("needed_rate"))]
    if needed:
        x, floor = plot.x(needed[-1][0]), plot.top + plot.height
        parts.append(el("line", x1=x, x2=x, y1=plot.top, y2=floor, class_="dash"))
        words = f"needed {short_percent(needed[-1][0])}"
        parts.append(
            el("text", words, x=x, y=plot.top - 7, text_anchor="middle", class_="label need")
        )
    others, groups = 0, []
    for i, arm in enumerate(arms):
        hollow = arm.name == "SFT start"
        others += not hollow
        cls = "arm start" if hollow else f"arm arm{(others - 1) % 7}"
        shape = SHAPES[0 if hollow else (others - 1) % len(SHAPES)]
        x, y = arm.spread("tool_rate"), arm.spread("accuracy")
        marks = []
        if x and y:
            cross = path_of(plot.at([(x[1], y[0]), (x[2], y[0])]))
            cross += path_of(plot.at([(x[0], y[1]), (x[0], y[2])]))
            marks.append(el("path", d=cross, class_="thin"))
        for seed, e in arm.points:
            px, py = number(e.get("tool_rate")), number(e.get("accuracy"))
            if px is not None and py is not None:
                said = f"accuracy {short_percent(py)}, tool rate {short_percent(px)}"
                place = f"translate({plot.x(px):.1f},{plot.y(py):.1f})"
                named = arm.name if seed is None else f"{arm.name}, seed {seed}"
                title = f"{named}: {said}"
                marks.append(el("path", d=shape, transform=place, class_="mark", title=title))
        row = 84 + 42 * i
        name = arm.name if len(arm.name) <= 24 else arm.name[:23] + "…"
        marks.append(el("path", d=shape, transform=f"translate(514,{row - 4})", class_="mark"))
        marks.append(el("text", name, x=530, y=row, class_="t strong"))
        if x and y:
            said = f"{short_percent(y[0])} right, {short_percent(x[0])} called"
            marks.append(el("text", said, x=530, y=row + 17, class_="t"))
        groups.append(el("g", *marks, class_=cls))
    # The hollow start comes last: an arm that never left it would hide it.
    return Markup("").join([*parts, *groups[1:], *groups[:1]])


def write_comparison(folder: str | Path) -> Path:
    """Write pareto.svg from compare.json. The report draws it again: make that after this."""
    folder = Path(folder)
    run = read_run(folder)
    if not arms_of(run):
        raise RunError(f"'{folder / 'compare.json'}' holds no arms: run the comparison first")
    label = "accuracy against tool rate for every arm and seed"
    return save(folder / "pareto.svg", standalone(720, 420, label, pareto(run)))
