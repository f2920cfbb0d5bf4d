"""What the report and the pictures are made from: the run folder read back, and SVG.

Everything is read from the run folder (see log.py) and nothing else is asked, so a report can be
made of a run that was interrupted, or that was copied from another machine. What a model or a
tool wrote is hostile text: every string passes through `el`, or through Jinja's autoescaping.

Units: accuracies, rates and shares are fractions in [0, 1] in the files, percent when shown.
"""

from __future__ import annotations

import json
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from markupsafe import Markup, escape

from trainer.log import RunError, write_whole
from trainer.table import number, section, short, short_percent

Point = tuple[float, float]
"""(step or rate, value)"""

SAMPLES_PER_KIND = 2

# ---------------------------------------------------------------------------------------------
# The run folder


@dataclass
class Run:
    """What a run folder holds. A file that is missing or broken leaves a note, not an error."""

    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """stage -> its lines, in order"""
    heldout: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    """a few questions of each kind: stage -> its rollout"""
    training: list[dict[str, Any]] = field(default_factory=list)
    """the last few training rollouts; shown where no held-out ones were kept"""
    compare: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise RunError(f"there is no run folder '{folder}': give the folder that a run wrote")
    run = Run(name=folder.resolve().name)
    run.summary = read_json(folder / "summary.json", run.notes)
    run.compare = read_json(folder / "compare.json", run.notes)
    for line in _lines(folder / "metrics.jsonl", run.notes):
        if number(line.get("step")) is not None:
            run.metrics.setdefault(str(line.get("stage")), []).append(line)
    _read_rollouts(run, folder / "rollouts.jsonl")
    try:
        run.config = (folder / "config.yaml").read_text("utf-8", "replace")
    except OSError:
        run.config = None
    return run


def _read_rollouts(run: Run, path: Path) -> None:
    """Keep the first held-out questions of each kind, those with images first."""
    questions: dict[str, dict[str, dict[str, Any]]] = {}
    training: deque[dict[str, Any]] = deque(maxlen=4)
    for line in _lines(path, run.notes):
        question = line.get("question")
        if not isinstance(question, dict) or not isinstance(line.get("tokens"), list):
            continue
        if (stage := line.get("stage")) in ("sft_eval", "final_eval"):
            questions.setdefault(str(question.get("id")), {}).setdefault(stage, line)
        elif stage == "rl":
            training.append(line)
    kinds: dict[str, list[dict[str, dict[str, Any]]]] = {}
    for stages in questions.values():
        kind = next(iter(stages.values()))["question"].get("kind")
        kinds.setdefault(str(kind), []).append(stages)
    for some in kinds.values():
        # A stable sort: the order of the file decides between equals.
        some.sort(key=lambda stages: not any("images" in line for line in stages.values()))
        run.heldout += some[:SAMPLES_PER_KIND]
    run.training = list(training)


def read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8", "replace"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} could not be read: {error}")
        return {}
    return value if isinstance(value, dict) else {}


def _lines(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file. A killed run may leave half a line at its end."""
    broken = 0
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            for text in handle:
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError):
                    broken += bool(text.strip())
                    continue
                if isinstance(value, dict):
                    yield value
    except FileNotFoundError:
        return
    except OSError as error:
        notes.append(f"{path.name} could not be read to its end: {error}")
    if broken:
        notes.append(f"{path.name}: {broken} broken line{'s' * (broken > 1)} left out")


def needed_rate(run: Run) -> float | None:
    stages = (section(run.summary, stage) for stage in ("final", "sft", "base"))
    for holder in (run.summary, *stages):
        if (value := number(holder.get("needed_rate"))) is not None:
            return value
    return None


def last_step(run: Run) -> int:
    return int(max((row["step"] for row in run.metrics.get("rl", [])), default=0))


def kind_rows(run: Run) -> list[dict[str, Any]]:
    """What is known of every kind of question, in the order of the evaluation."""
    base, before, after = (
        section(section(run.summary, stage), "by_kind") for stage in ("base", "sft", "final")
    )
    logged = {
        key.removeprefix("tool_rate/")
        for row in run.metrics.get("rl", [])
        for key in row
        if key.startswith("tool_rate/")
    }
    out = []
    for kind in dict.fromkeys([*base, *before, *after, *sorted(logged)]):
        zero, one, two = section(base, kind), section(before, kind), section(after, kind)
        known = zero | one | two
        out.append(
            {
                "kind": kind,
                "base": zero,
                "before": one,
                "after": two,
                "n": known.get("n"),
                "needs": known.get("needs_tool"),
            }
        )
    return out


def save(path: Path, text: str) -> Path:
    try:
        write_whole(path, text)
    except OSError as error:
        raise RunError(
            f"could not write '{path}': {error.strerror or error}. The run's own files are "
            "untouched: free some space or mend the folder, then make the report again."
        ) from error
    return path


# ---------------------------------------------------------------------------------------------
# SVG

_CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def visible(value: Any) -> str:
    """Text with its control characters shown as pictures: neither HTML nor XML may hold them."""
    text = str(value).translate(_CONTROL)
    return re.sub("[\ud800-\udfff\ufffe\uffff\x80-\x9f]", "\ufffd", text)


def el(name: str, *children: Any, title: str | None = None, **attributes: Any) -> Markup:
    """One escaped element. `class_` and `text_anchor` become class and text-anchor."""
    parts = [Markup("<") + name]
    for key, value in attributes.items():
        if isinstance(value, float):
            value = f"{value:.1f}".removesuffix(".0")
        key = key.rstrip("_").replace("_", "-") if key != "viewBox" else key
        parts.append(Markup(' {}="{}"').format(key, visible(value)))
    inner = ([el("title", title)] if title is not None else []) + [
        child if isinstance(child, Markup) else escape(visible(child)) for child in children
    ]
    return Markup("").join([*parts, Markup(">"), *inner, Markup("</" + name + ">")])


def svg(width: int, height: int, label: str, /, *children: Any, **attributes: Any) -> Markup:
    box = f"0 0 {width} {height}"
    return el("svg", *children, viewBox=box, role="img", aria_label=label, **attributes)


def path_of(points: Iterable[Point]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


@dataclass
class Plot:
    """A rectangle of an SVG, in its units, and the data ranges that it shows."""

    left: float
    top: float
    width: float
    height: float
    x_range: Point
    y_range: Point = (0.0, 1.0)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return self.left + self.width * (value - low) / ((high - low) or 1.0)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.top + self.height * (1 - (value - low) / ((high - low) or 1.0))

    def at(self, points: Iterable[Point]) -> list[Point]:
        return [(self.x(x), self.y(y)) for x, y in points]

    def rule(self, y: float, cls: str) -> Markup:
        right = self.left + self.width
        return el("line", x1=self.left, x2=right, y1=self.y(y), y2=self.y(y), class_=cls)

    def grid(self, ys: Sequence[float], xs: Sequence[float], x_words: str, x_text=short) -> Markup:
        """Horizontal lines with percents, ticks below, and the words of the x axis."""
        parts = []
        for y in ys:
            parts.append(self.rule(y, "grid"))
            label = f"{100 * y:.0f}\u202f%"
            parts.append(
                el("text", label, x=self.left - 8, y=self.y(y) + 4, text_anchor="end", class_="t")
            )
        floor = self.top + self.height
        for x in xs:
            anchor = {"x": self.x(x), "y": floor + 19, "text_anchor": "middle", "class_": "t"}
            parts.append(el("text", x_text(x), **anchor))
        middle = self.left + self.width / 2
        parts.append(el("text", x_words, x=middle, y=floor + 39, text_anchor="middle", class_="t"))
        return Markup("").join(parts)

    def curve(self, points: list[Point], cls: str, radius: float = 1.8, width: float = 2) -> Markup:
        """The raw points, faint, under their smoothed line."""
        dots = [el("circle", cx=x, cy=y, r=radius) for x, y in self.at(points)]
        line = path_of(self.at(smooth(points))) if points else "M0,0"
        return el("g", *dots, class_=f"dot {cls}") + el(
            "path", d=line, class_=f"line {cls}", stroke_width=width
        )


def series(rows: Iterable[Mapping[str, Any]], key: str, most: int = 400) -> list[Point]:
    """(step, value) of the lines that hold a finite value; at most `most`, by averaging."""
    found = ((float(row["step"]), number(row.get(key))) for row in rows)
    points = [(step, value) for step, value in found if value is not None]
    if len(points) <= most:
        return points
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    bins = [points[a:b] for a, b in zip(edges, edges[1:], strict=False)]
    return [(mean([x for x, _ in b]), mean([y for _, y in b])) for b in bins]


def smooth(points: Sequence[Point]) -> list[Point]:
    """A centred moving average over about one twentieth of the curve."""
    half = max(1, len(points) // 40) if len(points) >= 12 else 0
    return [
        (x, mean([y for _, y in points[max(0, i - half) : i + half + 1]]))
        for i, (x, _) in enumerate(points)
    ]


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def ticks(high: float, most: int = 6) -> list[float]:
    """0 and the multiples of 1, 2 or 5 times a power of ten up to `high`."""
    if high <= 0:
        return [0.0]
    unit = 10.0 ** math.floor(math.log10(high / most))
    step = next(unit * m for m in (1, 2, 5, 10) if high / (unit * m) <= most)
    step = max(step, 1.0)
    return [i * step for i in range(int(high / step + 1e-9) + 1)]


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Positions close to those wanted and at least `gap` apart: what is too close is stacked
    around its common middle."""
    stacks: list[list[int]] = []

    def middle(stack: list[int]) -> float:
        return mean([wanted[i] for i in stack])

    for i in sorted(range(len(wanted)), key=lambda i: (wanted[i], i)):
        stacks.append([i])
        while len(stacks) > 1:
            above, below = stacks[-2:]
            if middle(below) - middle(above) >= gap * (len(above) + len(below)) / 2:
                break
            stacks[-2:] = [above + below]
    out = [0.0] * len(wanted)
    for stack in stacks:
        for place, i in enumerate(stack):
            out[i] = middle(stack) + gap * (place - (len(stack) - 1) / 2)
    return out


CURVES = (("accuracy", "accuracy", "acc"), ("tool_rate", "tool rate", "tool"))


def curve_chart(run: Run, plot: Plot, *, hover: bool) -> Markup:
    """Accuracy and tool rate over the RL steps. Diamonds are the held-out evaluations."""
    rows = run.metrics.get("rl", [])
    parts = [plot.grid((0, 0.25, 0.5, 0.75, 1), ticks(plot.x_range[1]), "RL step")]
    labels: list[tuple[float, str, str]] = []
    needed = needed_rate(run)
    if needed is not None:
        parts.append(plot.rule(needed, "dash"))
        labels.append((plot.y(needed), "needed", "need"))
    for key, words, cls in CURVES:
        points = series(rows, key)
        if not points:
            continue
        parts.append(plot.curve(points, cls))
        labels.append((plot.y(smooth(points)[-1][1]), words, cls))
        for stage, step in (("sft", 0.0), ("final", plot.x_range[1])):
            value = number(section(run.summary, stage).get(key))
            if value is not None:
                x, y = plot.x(step), plot.y(value)
                diamond = path_of([(x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y)]) + "Z"
                when = "before" if stage == "sft" else "after"
                title = f"held-out {words} {when} RL: {short_percent(value)}"
                parts.append(el("path", d=diamond, class_=f"held {cls}", title=title))
    heights = spread([y for y, _, _ in labels], 19)
    right = plot.left + plot.width + 12
    for (_, words, cls), y in zip(labels, heights, strict=True):
        parts.append(el("text", words, x=right, y=y + 4, class_=f"label {cls}"))
    if hover and rows:
        parts.append(_hover_strips(plot, rows))
    return Markup("").join(parts)


def _hover_strips(plot: Plot, rows: list[dict[str, Any]]) -> Markup:
    """One transparent strip per step whose title says its numbers."""
    table = {key: dict(series(rows, key)) for key, _, _ in CURVES}
    steps = sorted(set().union(*table.values()))
    wide = plot.width / max(len(steps), 1)
    strips = []
    for step in steps:
        said = [f"{w} {short_percent(table[k].get(step))}" for k, w, _ in CURVES]
        strips.append(
            el(
                "rect", x=plot.x(step) - wide / 2, y=plot.top, width=wide, height=plot.height,
                class_="hit", title=" · ".join([f"step {step:.0f}", *said]),
            )
        )  # fmt: skip
    return Markup("").join(strips)


def line_chart(rows: list[dict[str, Any]], keys: Mapping[str, str], label: str) -> Markup | None:
    """A small chart without axes: key -> class. Rates are drawn in [0, 1], the rest to its own
    range; None where the log holds nothing under these keys."""
    curves = {key: points for key in keys if (points := series(rows, key, 160))}
    if not curves:
        return None
    steps = [x for points in curves.values() for x, _ in points]
    plot = Plot(3, 6, 194, 56, (min(steps), max(steps)))
    shares = ("rate/", "accuracy", "share/", "groups/")
    if not all(any(word in key for word in shares) for key in curves):
        values = [y for points in curves.values() for _, y in points]
        low, high = min(values), max(values)
        plot.y_range = (low, high) if high > low else (low - 1, high + 1)
    rules = [plot.rule(y, "grid") for y in plot.y_range]
    lines = [plot.curve(curves[key], keys[key], 1.1, 1.6) for key in curves]
    return svg(200, 68, label, el("title", label), *rules, *lines)


# ---------------------------------------------------------------------------------------------
# Colours

PALETTES = {
    "light": dict(
        paper="#fdfcfa", card="#f6f4ef", ink="#1f2126", muted="#6c6a66", rule="#e3dfd7",
        acc="#2b5f8f", tool="#bf5410", bad="#a3262a",
        arm0="#bf5410", arm1="#2b5f8f", arm2="#3c7d4f", arm3="#7d4e97", arm4="#8a6d14",
        arm5="#a8325e", arm6="#3b7f86",
    ),
    "dark": dict(
        paper="#15171b", card="#1d2025", ink="#e6e4df", muted="#9a9891", rule="#30343b",
        acc="#84b6e8", tool="#f2985c", bad="#f08a86",
        arm0="#f2985c", arm1="#84b6e8", arm2="#86c799", arm3="#c6a0dd", arm4="#d6ba62",
        arm5="#ee92b4", arm6="#84c6cd",
    ),
}  # fmt: skip

# Written out for both palettes rather than with var(): not every viewer of an SVG file knows it.
SVG_RULES = Template("""
text{font:13px system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
.page{fill:$paper;stroke:$rule}.t{fill:$muted}.strong,.title{fill:$ink}
.title{font-size:15px;font-weight:600}
.grid{stroke:$rule}.dash{stroke:$muted;stroke-dasharray:3 4}
.line{fill:none;stroke-linejoin:round;stroke-linecap:round}
.line.acc{stroke:$acc}.line.tool{stroke:$tool}.line.ink{stroke:$muted}
.dot{opacity:.25}.dot.acc,.label.acc,.bar.acc{fill:$acc}.dot.tool,.label.tool,.bar.tool{fill:$tool}
.dot.ink{fill:$muted}.label.need{fill:$muted}.bar.faint{opacity:.35}.track{fill:$rule}
.held{fill:$paper;stroke-width:1.8}.held.acc{stroke:$acc}.held.tool{stroke:$tool}
.thin{fill:none;stroke-width:1.1;opacity:.75}.start .thin{stroke:$muted}
.start .mark{fill:none;stroke:$ink;stroke-width:1.5}
$arms
""")


def svg_style() -> Markup:
    """The CSS of every drawing, in light and in dark."""
    css = []
    for palette in PALETTES.values():
        arms = "".join(
            f".arm{i} .mark{{fill:{palette[f'arm{i}']};fill-opacity:.85}}"
            f".arm{i} .thin{{stroke:{palette[f'arm{i}']}}}"
            for i in range(7)
        )
        css.append(SVG_RULES.substitute(palette, arms=arms).strip())
    light, dark = css
    return Markup(f"{light}\n@media (prefers-color-scheme:dark){{{dark}}}")


def standalone(width: int, height: int, label: str, *children: Markup) -> str:
    """An SVG file: a card with its own ground, so that it can be read on any page."""
    half = {"x": 0.5, "y": 0.5, "width": width - 1, "height": height - 1, "rx": 8}
    page = el("rect", **half, class_="page")
    size = {"xmlns": "http://www.w3.org/2000/svg", "width": width, "height": height}
    return str(svg(width, height, label, el("style", svg_style()), page, *children, **size)) + "\n"
