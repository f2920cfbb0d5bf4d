"""The page of a curation: what went in, what each stage dropped, and examples of each reason.

It needs nothing but itself and is a function of the curation alone, so that equal curations give
equal bytes. Texts of the rows are hostile: they pass through Jinja's autoescaping or `svg.el`, and
the page forbids scripts and requests in its own policy.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from trainer.curate.outputs import place
from trainer.curate.pipeline import Curation, Fate
from trainer.curate.rows import question_of
from trainer.curate.verdicts import REASONS
from trainer.data import BadRow, Conversation, Picture
from trainer.images import png_uri
from trainer.report import template
from trainer.svg import PALETTES, el, save, svg, svg_style

EXAMPLES = 3
"""Rows of each reason that are shown, and of those that are kept."""
MAX_TEXT = 1_200
MAX_SIDE = 320
"""Pixels of a picture that is shown; a larger one is shrunk."""
_ROW, _LEFT, _WIDTH = 34, 170, 520


@dataclass(frozen=True)
class Step:
    """A stage as the funnel shows it."""

    name: str
    entered: int
    dropped: int

    @property
    def left(self) -> int:
        return self.entered - self.dropped


def steps(curation: Curation) -> list[Step]:
    """From the rows that went in to those that are kept."""
    dropped = Counter(fate.stage for fate in curation.fates if fate.verdict != "kept")
    found, left = [], len(curation.fates)
    for name in ["read", *curation.plan.names]:
        found.append(Step(name, left, dropped[name]))
        left = found[-1].left
    assert left == sum(fate.verdict == "kept" for fate in curation.fates)
    return found


def funnel(found: list[Step]) -> Markup:
    """A bar a stage: what is left after it, and what it dropped, faint."""
    total = max(1, found[0].entered)
    parts = []
    for number, step in enumerate(found):
        y = 14 + _ROW * number
        width = _WIDTH * step.entered / total
        left = _WIDTH * step.left / total
        said = f"{step.name}: {step.entered:,} rows in, {step.dropped:,} dropped"
        bar = {"x": _LEFT, "y": y, "height": 20}
        parts += [
            el("text", step.name, x=_LEFT - 12, y=y + 15, text_anchor="end", class_="t strong"),
            el("rect", **bar, width=width, class_="bar tool faint", title=said),
            el("rect", **bar, width=left, class_="bar acc", title=said),
            el("text", f"{step.left:,}", x=_LEFT + _WIDTH + 56, y=y + 15, text_anchor="end",
               class_="t strong"),
            el("text", f"\u2212{step.dropped:,}" if step.dropped else "", x=_LEFT + _WIDTH + 64,
               y=y + 15, class_="t"),
        ]  # fmt: skip
    height = 20 + _ROW * len(found)
    return svg(_LEFT + _WIDTH + 120, height, "rows left after each stage", *parts, class_="chart")


def write_report(curation: Curation, folder: Path, title: str, settings: str) -> Path:
    """Writes report.html. settings: YAML, shown at the page's end. Raises RunError."""
    found = steps(curation)
    counts = Counter(fate.verdict for fate in curation.fates)
    page = template("curate/report.html.j2").render(
        title=title,
        palettes=PALETTES,
        svg_style=svg_style(),
        rows=len(curation.fates),
        counts={name: counts[name] for name in ("kept", "dropped", "bad")},
        funnel=funnel(found),
        reasons=_reasons(curation),
        skipped=curation.plan.skipped,
        tokens=curation.tokens(),
        kinds=_kinds(curation),
        settings=settings,
    )
    return save(folder / "report.html", page)


def _reasons(curation: Curation) -> list[dict[str, Any]]:
    """Every reason that dropped a row, in the order of REASONS; bad rows behind them, kept last."""
    groups: dict[tuple[str, str], list[Fate]] = {}
    for fate in curation.fates:
        groups.setdefault((fate.verdict, fate.reason), []).append(fate)
    names = list(REASONS)
    order = {"dropped": 0, "bad": 1, "kept": 2}

    def rank(key: tuple[str, str]) -> tuple[int, int, str]:
        verdict, reason = key
        return order[verdict], names.index(reason) if reason in names else 0, reason

    return [
        {
            "name": "kept" if verdict == "kept" else reason,
            "verdict": verdict,
            "words": REASONS.get(reason, "not readable" if verdict == "bad" else "passed all"),
            "count": len(groups[verdict, reason]),
            "examples": [_example(curation, f) for f in groups[verdict, reason][:EXAMPLES]],
        }
        for verdict, reason in sorted(groups, key=rank)
    ]


def _example(curation: Curation, fate: Fate) -> dict[str, Any]:
    path, row = place(curation.data, fate.number)
    shown = {
        "id": fate.id or "",
        "where": f"{path.name} row {row}",
        "stage": fate.stage,
        "detail": fate.detail,
        "steps": [],
    }
    try:
        item = curation.data[fate.number]
    except BadRow:
        return shown
    question = question_of(item)
    asked = {"by": "question", "text": _cut(question.text), "pictures": _shown(question.pictures)}
    shown["steps"].append(asked)
    if isinstance(item, Conversation):
        for message in item.messages:
            if message.speaker in ("policy", "observation"):
                pictures = [item.pictures[number] for number in message.shown]
                step = {"text": _cut(message.text), "pictures": _shown(pictures)}
                shown["steps"].append({"by": message.speaker, **step})
    else:
        shown["steps"].append({"by": "answer", "text": _cut(item.answer), "pictures": []})
    return shown


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    left = len(text) - MAX_TEXT
    return f"{text[: MAX_TEXT // 2]} [{left:,} characters left out] {text[-MAX_TEXT // 2 :]}"


def _shown(pictures: Any) -> list[dict[str, Any]]:
    """The first pictures as data: URIs."""
    return [found for one in pictures[:4] if (found := _uri(one)) is not None]


def _uri(picture: Picture) -> dict[str, Any] | None:
    try:
        image = picture.open()
    except BadRow:
        return None
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    return {"src": png_uri(image), "width": image.width}


def _kinds(curation: Curation) -> list[dict[str, Any]]:
    """Of every ability: its share of the rows that went in, and of those that are kept."""
    rows = Counter(fate.kind for fate in curation.fates if fate.verdict != "bad")
    kept = Counter(fate.kind for fate in curation.fates if fate.verdict == "kept")
    shares = []
    for kind in sorted(rows):
        of_rows = rows[kind] / max(1, rows.total())
        of_kept = kept[kind] / max(1, kept.total())
        shares.append(
            {"kind": kind, "rows": rows[kind], "kept": kept[kind], "in": of_rows, "out": of_kept}
        )
    return shares
