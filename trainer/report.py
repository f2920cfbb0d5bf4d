"""The report of a run: one HTML file that needs nothing but itself, and two pictures.

Everything is read from the run folder (see log.py) and nothing else is asked, so a report can be
made of a run that was interrupted, or that was copied from another machine. Equal folders give
equal bytes. What a model or a tool wrote is hostile text: every string passes through `el` or
through Jinja's autoescaping, and the page forbids scripts and requests in its own policy.

Units: accuracies, rates and shares are fractions in [0, 1] in the files, percent on the page.
"""

from __future__ import annotations

import base64
import json
import math
import re
import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from .log import RunError, write_whole

Point = tuple[float, float]
"""(step or rate, value)"""

SAMPLES_PER_KIND = 2

# ---------------------------------------------------------------------------------------------
# Reading the run folder


@dataclass
class Run:
    """What a run folder holds. A file that is missing or broken leaves a note, not an error."""

    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """stage -> its lines, in order"""
    before: list[dict[str, Any]] = field(default_factory=list)
    after: dict[str, dict[str, Any]] = field(default_factory=dict)
    training: list[dict[str, Any]] = field(default_factory=list)
    """the last few training rollouts; shown where no held-out ones were kept"""
    compare: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise RunError(f"there is no run folder '{folder}': give the folder that a run wrote")
    run = Run(name=folder.resolve().name)
    run.summary = _json(folder / "summary.json", run.notes)
    run.compare = _json(folder / "compare.json", run.notes)
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
    """Keep the first held-out samples of each kind, those with images first, and their pairs."""
    kept: dict[str, list[dict[str, Any]]] = {}
    finals: dict[str, dict[str, Any]] = {}
    training: deque[dict[str, Any]] = deque(maxlen=4)
    for line in _lines(path, run.notes):
        question = line.get("question")
        if not isinstance(question, dict) or not isinstance(line.get("tokens"), list):
            continue
        stage, key = line.get("stage"), str(question.get("id"))
        if stage == "sft_eval":
            samples = kept.setdefault(str(question.get("kind")), [])
            samples.append(line)
            # A stable sort: the order of the file decides between equals.
            samples.sort(key=lambda sample: "images" not in sample)
            del samples[SAMPLES_PER_KIND:]
        elif stage == "final_eval" and (key not in finals or "images" in line):
            finals[key] = line
        elif stage == "rl":
            training.append(line)
    run.before = [sample for samples in kept.values() for sample in samples]
    run.after = {str(s["question"].get("id")): s for s in run.before}
    run.after = {key: finals[key] for key in run.after if key in finals}
    run.training = list(training)


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
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


# ---------------------------------------------------------------------------------------------
# Numbers and words


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


_CONTROL = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def visible(value: Any) -> str:
    """Text with its control characters shown as pictures: neither HTML nor XML may hold them."""
    text = str(value).translate(_CONTROL)
    return re.sub("[\ud800-\udfff\ufffe\uffff\x80-\x9f]", "\ufffd", text)


# ---------------------------------------------------------------------------------------------
# SVG


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
    return [(_mean([x for x, _ in b]), _mean([y for _, y in b])) for b in bins]


def smooth(points: Sequence[Point]) -> list[Point]:
    """A centred moving average over about one twentieth of the curve."""
    half = max(1, len(points) // 40) if len(points) >= 12 else 0
    return [
        (x, _mean([y for _, y in points[max(0, i - half) : i + half + 1]]))
        for i, (x, _) in enumerate(points)
    ]


def _mean(values: Sequence[float]) -> float:
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
        return _mean([wanted[i] for i in stack])

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
    if not all("rate/" in key or "accuracy" in key for key in curves):
        values = [y for points in curves.values() for _, y in points]
        low, high = min(values), max(values)
        plot.y_range = (low, high) if high > low else (low - 1, high + 1)
    rules = [plot.rule(y, "grid") for y in plot.y_range]
    lines = [plot.curve(curves[key], keys[key], 1.1, 1.6) for key in curves]
    return svg(200, 68, label, el("title", label), *rules, *lines)


# ---------------------------------------------------------------------------------------------
# What the page shows


def needed_rate(run: Run) -> float | None:
    for holder in (run.summary, section(run.summary, "final"), section(run.summary, "sft")):
        if (value := number(holder.get("needed_rate"))) is not None:
            return value
    return None


def last_step(run: Run) -> int:
    return int(max((row["step"] for row in run.metrics.get("rl", [])), default=0))


def lede(run: Run) -> str:
    """The run in a sentence or two."""
    sft, final = section(run.summary, "sft"), section(run.summary, "final")
    steps = last_step(run)
    if not run.summary:
        reached = f"RL step {steps}" if steps else "the cold start" if run.metrics else "no step"
        return (
            "This run has no summary.json: it still goes on, or it was killed. "
            f"It reached {reached}."
        )
    parts = []
    if number(sft.get("tool_rate")) is not None:
        parts.append(
            f"After the cold start the policy called a tool on {short_percent(sft['tool_rate'])} "
            "of the held-out questions"
        )
        if number(final.get("tool_rate")) is not None:
            parts.append(f", after {steps} steps of RL on {short_percent(final['tool_rate'])}")
        if (needed := needed_rate(run)) is not None:
            parts.append(f". A tool is needed on {short_percent(needed)}")
        parts.append(".")
    status = run.summary.get("status")
    if status in ("interrupted", "failed"):
        where = f"at RL step {steps}" if steps else "before RL began"
        verb = "was interrupted" if status == "interrupted" else "failed"
        parts.append(f" The run {verb} {where}; what it had measured by then is below.")
    elif not final:
        parts.append(" There is no evaluation after RL.")
    return "".join(parts).strip()


FIGURES = (
    ("tool_rate", "Tool rate", "questions on which a tool was called"),
    ("accuracy", "Accuracy", "held-out questions answered correctly"),
    ("redundant_rate", "Redundant", "called, of the questions that need none"),
    ("missed_rate", "Missed", "not called, of the questions that need one"),
)

HEALTH = (
    ("reward", "reward"),
    ("clip_fraction_acc", "clipped, accuracy"),
    ("clip_fraction_tool", "clipped, tool"),
    ("approx_kl", "approximate KL"),
    ("grad_norm", "gradient norm"),
    ("entropy", "entropy, nats"),
    ("no_signal_share", "groups without signal"),
    ("effective_tool_weight", "effective tool weight"),
    ("truncated", "truncated rollouts"),
    ("unscored", "unscored rollouts"),
    ("tokens_per_second", "tokens per second"),
    ("lr", "learning rate"),
)


def health(run: Run) -> list[dict[str, Any]]:
    rows = run.metrics.get("rl", [])
    strip = []
    for key, words in HEALTH:
        chart = line_chart(rows, {key: "ink"}, words)
        values = [y for _, y in series(rows, key)]
        if chart is not None:
            extent = f"{short(min(values))} to {short(max(values))}"
            strip.append(
                {"words": words, "chart": chart, "last": short(values[-1]), "range": extent}
            )
    return strip


def nonfinite(run: Run) -> str | None:
    """Which values were NaN or inf, and at which steps first."""
    seen: dict[str, list[str]] = {}
    for stage, rows in run.metrics.items():
        for row in rows:
            names = row.get("nonfinite")
            for name in names if isinstance(names, list) else ():
                seen.setdefault(str(name), []).append(f"{stage} {row['step']:.0f}")
    said = []
    for name, steps in seen.items():
        more = f" and {len(steps) - 4} more" if len(steps) > 4 else ""
        said.append(f"{name} at {', '.join(steps[:4])}{more}")
    return "; ".join(said) or None


def kind_rows(run: Run) -> list[dict[str, Any]]:
    """One entry per kind of question, in the order of the evaluation."""
    before = section(section(run.summary, "sft"), "by_kind")
    after = section(section(run.summary, "final"), "by_kind")
    rl = run.metrics.get("rl", [])
    kinds = dict.fromkeys([*before, *after])
    logged = {key.split("/", 1)[1] for row in rl for key in row if key.startswith("tool_rate/")}
    kinds.update(dict.fromkeys(sorted(logged)))
    out = []
    for kind in kinds:
        one, two = section(before, kind), section(after, kind)
        keys = {f"accuracy/{kind}": "acc", f"tool_rate/{kind}": "tool"}
        out.append(
            {
                "kind": kind,
                "before": one,
                "after": two,
                "n": two.get("n", one.get("n")),
                "needs": two.get("needs_tool", one.get("needs_tool")),
                "chart": line_chart(rl, keys, f"accuracy and tool rate on {kind}"),
            }
        )
    return out


_IMAGE = re.compile(r"<image (\d{1,4})>")
_SPECIAL = re.compile(r"<[|/]?[\w ]{1,40}[|]?>")


def picture(data: Any) -> dict[str, Any] | None:
    """A base64 PNG as a data: URI with a size in CSS pixels, small ones scaled by an integer."""
    try:
        raw = base64.b64decode(data, validate=True)
        if raw[:8] != b"\x89PNG\r\n\x1a\n":
            return None
        width, height = struct.unpack(">II", raw[16:24])
    except (ValueError, TypeError, struct.error):
        return None
    if not (width and height):
        return None
    scale = max(1, 160 // max(width, height)) if max(width, height) <= 160 else None
    shown = width * scale if scale else min(width, 320)
    return {"src": f"data:image/png;base64,{data}", "width": shown, "pixelated": scale is not None}


def tokens_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tokens of a rollout as the page shows them. Class p: written by the policy; g: given;
    x: special; d: written though less likely than not."""
    images = record.get("images") if isinstance(record.get("images"), list) else []
    out, shown = [], set()
    for entry in record["tokens"]:
        if not (isinstance(entry, list) and len(entry) >= 3):
            continue
        text, policy = str(entry[0]), entry[2] is True
        found = _IMAGE.fullmatch(text)
        if found and not policy:
            index = int(found[1]) - 1
            shown.add(index)
            image = picture(images[index]) if 0 <= index < len(images) else None
            out.append({"image": image, "text": text, "cls": "g x", "title": text})
            continue
        logprob = number(entry[3]) if len(entry) > 3 else None
        title = f"token {visible(entry[1])}"
        cls = "p" if policy else "g"
        if policy and logprob is not None:
            title += f" · logprob {logprob:.3f}".replace("-", "\u2212")
            cls += " d" * (logprob < math.log(0.5))
        cls += " x" * bool(_SPECIAL.fullmatch(text.strip()))
        out.append({"text": visible(text.replace("\n", "↵\n")), "cls": cls, "title": title})
    left = [picture(data) for i, data in enumerate(images) if i not in shown]
    return out + [{"image": image, "text": "", "cls": "g", "title": ""} for image in left if image]


def elide(tokens: list[dict[str, Any]], head: int = 300, tail: int = 300) -> list[dict[str, Any]]:
    cut = len(tokens) - head - tail
    if cut <= 40:
        return tokens
    gap = {"text": f" … {cut:,} tokens … ", "cls": "gap", "title": "left out of this page"}
    return [*tokens[:head], gap, *tokens[-tail:]]


def sample(label: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """One rollout as a column; what was given before the policy's first token apart."""
    tokens = tokens_of(record)
    start = next((i for i, t in enumerate(tokens) if t["cls"].startswith("p")), len(tokens))
    calls, status = record.get("calls"), record.get("status")
    chips = ["correct" if record.get("correct") is True else "wrong"]
    if number(calls) is not None:
        chips.append(f"{calls:.0f} tool call{'s' * (calls != 1)}" if calls else "no tool call")
    if status not in ("ok", None):
        chips.append(str(status))
    for key, words in (("acc_advantage", "A acc"), ("tool_advantage", "A tool")):
        if number(record.get(key)) is not None:
            chips.append(f"{words} {short(record[key])}")
    return {"label": label, "chips": chips, "prompt": tokens[:start], "reply": tokens[start:]}


def cards(run: Run) -> list[dict[str, Any]]:
    """The same held-out question before and after; training rollouts where none were kept."""
    out = []
    for record in run.before or run.training:
        question = record["question"]
        if run.before:
            columns = [sample("after the cold start", record)]
            after = run.after.get(str(question.get("id")))
            if after is not None:
                columns.append(sample("after RL", after))
        else:
            columns = [sample(f"in training, step {record.get('step')}", record)]
        texts = [[token["text"] for token in column["prompt"]] for column in columns]
        shared = all(text == texts[0] for text in texts)
        prompt = elide(columns[0]["prompt"]) if shared else []
        for column in columns:
            full = column["reply"] if shared else column["prompt"] + column["reply"]
            column["tokens"] = elide(full, 1200, 600)
        out.append({"question": question, "prompt": prompt, "columns": columns})
    return out


# ---------------------------------------------------------------------------------------------
# Arms compared


@dataclass
class Arm:
    """One setting of the loss over several seeds."""

    name: str
    points: list[tuple[Any, dict[str, Any]]]
    """(seed, EVAL)"""

    def spread(self, key: str, kind: str | None = None) -> tuple[float, float, float] | None:
        """Mean, min and max over the seeds."""
        evals = [e for _, e in self.points]
        if kind is not None:
            evals = [section(section(e, "by_kind"), kind) for e in evals]
        values = [v for e in evals if (v := number(e.get(key))) is not None]
        return (_mean(values), min(values), max(values)) if values else None


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


COMPARED = (
    ("accuracy", None, "accuracy"),
    ("tool_rate", None, "tool rate"),
    ("redundant_rate", None, "redundant"),
    ("missed_rate", None, "missed"),
    ("accuracy", "glyph_medium", "accuracy, glyph_medium"),
    ("tool_rate", "glyph_medium", "tool rate, glyph_medium"),
)

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
                title = f"{arm.name}, seed {seed}: {said}"
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


# ---------------------------------------------------------------------------------------------
# The page and the pictures

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
    return _write(folder / "demo.svg", standalone(860, 380, label, *parts))


def write_comparison(folder: str | Path) -> Path:
    """Write pareto.svg from compare.json, and the report with its table of arms."""
    folder = Path(folder)
    run = read_run(folder)
    if not arms_of(run):
        raise RunError(f"'{folder / 'compare.json'}' holds no arms: run the comparison first")
    label = "accuracy against tool rate for every arm and seed"
    out = _write(folder / "pareto.svg", standalone(720, 420, label, pareto(run)))
    write_report(folder)
    return out


def write_report(folder: str | Path) -> Path:
    """Write report.html from the files of a run folder, and return its path."""
    folder = Path(folder)
    run = read_run(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        percent=percent, short_percent=short_percent, short=short, visible=visible,
        duration=duration, number=number,
    )  # fmt: skip
    rl, sft = run.metrics.get("rl", []), run.metrics.get("sft", [])
    arms = arms_of(run)
    plot = Plot(56, 14, 560, 250, (0, float(max(last_step(run), 1))))
    drawing = curve_chart(run, plot, hover=True)
    curves = svg(720, 312, "accuracy and tool rate over RL", drawing, class_="chart")
    losses = [y for _, y in series(sft, "loss")]
    page = environment.get_template("report.html.j2").render(
        run=run,
        palettes=PALETTES,
        svg_style=svg_style(),
        lede=lede(run),
        figures=FIGURES,
        before=section(run.summary, "sft"),
        after=section(run.summary, "final"),
        needed=needed_rate(run),
        stages=section(run.summary, "stages"),
        curves=curves if any(series(rl, key) for key, _, _ in CURVES) else None,
        sft_chart=line_chart(sft, {"loss": "ink"}, "loss of the cold start"),
        sft_loss=losses,
        kinds=kind_rows(run),
        health=health(run),
        nonfinite=nonfinite(run),
        cards=cards(run),
        arms=[(arm, [arm.spread(k, kind) for k, kind, _ in COMPARED]) for arm in arms],
        compared=[words for _, _, words in COMPARED],
        pareto=svg(720, 420, "accuracy against tool rate", pareto(run), class_="chart wide")
        if arms
        else None,
        alone=bool(arms) and not (run.summary or run.metrics),
    )
    return _write(folder / "report.html", page)


def _write(path: Path, text: str) -> Path:
    try:
        write_whole(path, text)
    except OSError as error:
        raise RunError(
            f"could not write '{path}': {error.strerror or error}. The run's own files are "
            "untouched: free some space or mend the folder, then make the report again."
        ) from error
    return path
