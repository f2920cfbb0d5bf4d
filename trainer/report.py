"""The report of a run: one HTML file that needs nothing but itself.

`write_report` reads the run folder and fills report.html.j2; the functions above it make what the
template shows: the run in a sentence, the health strip, the rollouts token by token. Equal folders
give equal bytes. What a model or a tool wrote is hostile text: it passes through `svg.el` or
through Jinja's autoescaping, and the page forbids scripts and requests in its own policy.
"""

from __future__ import annotations

import base64
import math
import re
import struct
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from trainer.pictures import arms_of, pareto
from trainer.svg import (
    CURVES,
    PALETTES,
    Plot,
    Run,
    curve_chart,
    kind_rows,
    last_step,
    line_chart,
    needed_rate,
    read_run,
    save,
    series,
    svg,
    svg_style,
    visible,
)
from trainer.table import duration, number, percent, section, short, short_percent

# ---------------------------------------------------------------------------------------------
# Words and numbers


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


CURRICULUM = (
    ("Gradient", {"gradient_share/acc": "acc", "gradient_share/tool": "tool"},
     "each channel's share of |d loss / d logprob|"),
    ("Groups with a signal", {"groups/acc_signal": "acc", "groups/tool_signal": "tool"},
     "share of the groups that are learned from"),
    ("Pass rates", {"groups/all_right": "acc", "groups/all_wrong": "ink"},
     "share of groups all right (blue) and all wrong (grey); groups.jsonl has every prompt's"),
)  # fmt: skip


def curriculum(run: Run) -> list[dict[str, Any]]:
    """What moved the policy, step by step: accuracy first, then economy."""
    rows = run.metrics.get("rl", [])
    charts = [
        {"words": words, "note": note, "chart": line_chart(rows, keys, f"{words}: {note}")}
        for words, keys, note in CURRICULUM
    ]
    return [one for one in charts if one["chart"] is not None]


def kind_chart(run: Run, kind: str) -> Markup | None:
    keys = {f"accuracy/{kind}": "acc", f"tool_rate/{kind}": "tool"}
    return line_chart(run.metrics.get("rl", []), keys, f"accuracy and tool rate on {kind}")


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


# ---------------------------------------------------------------------------------------------
# Rollouts

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
    out = []
    for entry in record["tokens"]:
        if not (isinstance(entry, list) and len(entry) >= 3):
            continue
        text, policy = str(entry[0]), entry[2] is True
        found = _IMAGE.fullmatch(text)
        if found and not policy:
            index = int(found[1]) - 1
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
    return out


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
    for stages in run.heldout:
        after = "after RL" if "sft_eval" in stages else "held out"
        names = {"sft_eval": "after the cold start", "final_eval": after}
        out.append(card({words: stages[key] for key, words in names.items() if key in stages}))
    for record in () if out else run.training:
        out.append(card({f"in training, step {record.get('step')}": record}))
    return out


def card(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rollouts of one question, side by side; the prompt that they share is shown once."""
    columns = [sample(label, record) for label, record in records.items()]
    texts = [[token["text"] for token in column["prompt"]] for column in columns]
    shared = all(text == texts[0] for text in texts)
    for column in columns:
        full = column["reply"] if shared else column["prompt"] + column["reply"]
        column["tokens"] = elide(full, 1200, 600)
    return {
        "question": next(iter(records.values()))["question"],
        "prompt": elide(columns[0]["prompt"]) if shared else [],
        "columns": columns,
    }


# ---------------------------------------------------------------------------------------------
# The page

COMPARED = (
    ("accuracy", None, "accuracy"),
    ("tool_rate", None, "tool rate"),
    ("redundant_rate", None, "redundant"),
    ("missed_rate", None, "missed"),
    ("accuracy", "glyph_medium", "accuracy, glyph_medium"),
    ("tool_rate", "glyph_medium", "tool rate, glyph_medium"),
)


def write_report(folder: str | Path) -> Path:
    """Write report.html from the files of a run folder, and return its path."""
    folder = Path(folder)
    page = template("report.html.j2").render(context(read_run(folder)))
    return save(folder / "report.html", page)


def template(name: str) -> Template:
    """A template of this folder, with autoescaping and the filters of `table`."""
    return _environment().get_template(name)


@cache
def _environment() -> Environment:
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
    return environment


def context(run: Run) -> dict[str, Any]:
    """What report.html.j2 shows of a run."""
    rl, sft = run.metrics.get("rl", []), run.metrics.get("sft", [])
    arms = arms_of(run)
    plot = Plot(56, 14, 560, 250, (0, float(max(last_step(run), 1))))
    drawing = curve_chart(run, plot, hover=True)
    curves = svg(720, 312, "accuracy and tool rate over RL", drawing, class_="chart")
    return dict(
        run=run,
        palettes=PALETTES,
        svg_style=svg_style(),
        lede=lede(run),
        figures=FIGURES,
        base=section(run.summary, "base"),
        before=section(run.summary, "sft"),
        uncurated=section(run.summary, "uncurated"),
        after=section(run.summary, "final"),
        needed=needed_rate(run),
        stages=section(run.summary, "stages"),
        curves=curves if any(series(rl, key) for key, _, _ in CURVES) else None,
        sft_chart=line_chart(sft, {"loss": "ink"}, "loss of the cold start"),
        sft_loss=[y for _, y in series(sft, "loss")],
        kinds=[row | {"chart": kind_chart(run, row["kind"])} for row in kind_rows(run)],
        curriculum=curriculum(run),
        health=health(run),
        nonfinite=nonfinite(run),
        cards=cards(run),
        arms=[(arm, [arm.spread(k, kind) for k, kind, _ in COMPARED]) for arm in arms],
        compared=[words for _, _, words in COMPARED],
        pareto=svg(720, 420, "accuracy against tool rate", pareto(run), class_="chart wide"),
    )
