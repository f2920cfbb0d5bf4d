"""Synthetic run folders, whole, cut short and hostile, and the checks that read a page back."""

from __future__ import annotations

import base64
import io
import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

from PIL import Image

from trainer.log import RunLog

NEEDS = {
    "glyph_large": False,
    "glyph_small": True,
    "glyph_medium": True,
    "sum_easy": False,
    "product_hard": True,
    "fact_known": False,
    "fact_search": True,
    "emblem": True,
}

HOSTILE = (
    "<script>alert(1)</script>",
    "</span></div></main><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "{{ 7 * 7 }}{% raw %}",
    "<!-- --><style>*{display:none}</style>",
    "\u202egnirts desrever",
    "nul\x00 bell\x07 escape\x1b[31m",
    "lone \ud800 surrogate",
    "]]></svg><svg onload=alert(1)>",
)


# ---------------------------------------------------------------------------------------------
# Synthetic runs


def png(seed: int, size: tuple[int, int]) -> str:
    rng = random.Random(seed)
    image = Image.new("RGB", size, (24, 26, 38))
    for x in range(0, size[0], 4):
        for y in range(0, size[1], 4):
            tone = rng.randrange(40, 230)
            image.paste((tone, tone // 2 + 60, 255 - tone), (x, y, x + 4, y + 4))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def evaluation(after: bool, seed: int = 0, kinds=NEEDS, shift: float = 0.0) -> dict:
    rng = random.Random(seed + 100 * after)
    by_kind = {}
    for kind, needs in kinds.items():
        rate = (0.97 if needs else 0.02) + rng.uniform(-0.02, 0.02) + shift if after else 0.995
        if after and kind == "glyph_medium":
            rate = 0.8 + rng.uniform(-0.1, 0.1)
        rate = min(max(rate, 0.0), 1.0)
        by_kind[kind] = {
            "n": 50,
            "needs_tool": needs,
            "accuracy": min(1.0, 0.93 + 0.03 * after + rng.uniform(-0.04, 0.04)),
            "tool_rate": rate,
            "calls": rate * 1.04,
            "direct_accuracy": None if rate > 0.99 else 0.9,
            "called_accuracy": 0.95,
        }

    def mean(key, only=None):
        rows = [r for r in by_kind.values() if only is None or r["needs_tool"] is only]
        return sum(row[key] for row in rows) / max(len(rows), 1)

    return {
        "accuracy": mean("accuracy"),
        "tool_rate": mean("tool_rate"),
        "calls": mean("calls"),
        "redundant_rate": mean("tool_rate", False),
        "missed_rate": 1 - mean("tool_rate", True),
        "needed_rate": sum(NEEDS.values()) / len(NEEDS),
        "n": 50 * len(kinds),
        "truncated": 1,
        "unscored": 0,
        "by_kind": by_kind,
    }


def base_evaluation(kinds=NEEDS) -> dict:
    """The base model, asked to answer directly: it cannot read what needs a tool."""
    direct = {kind: 0.08 if needs else 0.98 for kind, needs in kinds.items()}
    shared = {"tool_rate": 0.0, "calls": 0.0, "called_accuracy": None}
    by_kind = {
        kind: {"n": 50, "needs_tool": needs, "accuracy": direct[kind],
               "direct_accuracy": direct[kind], **shared}
        for kind, needs in kinds.items()
    }  # fmt: skip
    mean = sum(direct.values()) / len(direct)
    return {"n": 50 * len(kinds), "accuracy": mean, "direct_accuracy": mean, "by_kind": by_kind,
            **shared, "redundant_rate": 0.0, "missed_rate": 1.0, "needed_rate": 0.625}  # fmt: skip


def rollout(stage: str, kind: str, index: int, calls: int, hostile: bool = False) -> dict:
    rng = random.Random(f"{stage}{kind}{index}")
    image = kind.startswith("glyph") or kind == "emblem"

    def given(text):
        pieces = re.findall(r"\s*\S+|\s+$", text)
        return [[piece, rng.randrange(2000), False, 0.0] for piece in pieces]

    def wrote(text):
        pieces = re.findall(r"<[^>]+>|\s*[^\s<]+|\s+", text)
        return [[p, rng.randrange(2000), True, -rng.expovariate(4)] for p in pieces]

    tokens = given(
        "<|im_start|> system\nAnswer. Tools: crop(image, box), search(query). <|im_end|>"
    )
    tokens += given("\n<|im_start|> user\n")
    if image:
        tokens.append(["<image 1>", 7, False, 0.0])
    tokens += given(f" Which sign is in square b{index}? <|im_end|>\n<|im_start|> assistant\n")
    for call in range(calls):
        tokens += wrote('<reason> too small </reason><tool_call> {"name": "crop"} </tool_call>')
        tokens += given("<|im_end|>\n<|im_start|> tool\n")
        if image:
            tokens.append([f"<image {call + 2}>", 7, False, 0.0])
        if hostile:
            tokens += [[text, 5, bool(i % 2), -0.1] for i, text in enumerate(HOSTILE)]
        tokens += given(" ok<|im_end|>\n<|im_start|> assistant\n")
    tokens += wrote("<reason> it reads 7 </reason><answer> 7 </answer><|im_end|>")
    record = {
        "stage": stage,
        "step": 0,
        "question": {
            "id": f"glyphs/heldout/{kind}/{index}",
            "kind": kind,
            "text": HOSTILE[index] if hostile else f"Which sign is in square b{index}?",
            "answer": "7",
            "needs_tool": NEEDS.get(kind),
        },
        "status": "ok",
        "calls": calls,
        "answer": "7",
        "correct": index != 1,
        "formatted": True,
        "acc_advantage": None,
        "tool_advantage": None,
        "seed": index,
        "tokens": tokens,
    }
    if image and stage != "rl":
        record["images"] = [png(index, (64, 64)), *(png(9 + c, (24, 24)) for c in range(calls))]
    return record


def log_training(log: RunLog, sft: int, rl: int, kinds=NEEDS) -> None:
    rng = random.Random(3)
    for step in range(1, sft + 1):
        loss = 4.2 * math.exp(-step / 30) + 0.18 + rng.uniform(0, 0.06)
        log.metrics("sft", step, loss=loss, lr=1e-3, tokens_per_second=9000)
    for step in range(1, rl + 1):
        done = 1 / (1 + math.exp(-(step - 0.35 * rl) / (0.06 * rl)))
        by_kind = {}
        for kind, needs in kinds.items():
            rate = 0.99 - (0.05 if needs else 0.96) * done
            by_kind[f"tool_rate/{kind}"] = min(1, max(0, rng.gauss(rate, 0.05)))
            by_kind[f"accuracy/{kind}"] = min(1, max(0, rng.gauss(0.9 + 0.06 * done, 0.05)))
        log.metrics(
            "rl",
            step,
            loss=rng.gauss(0, 0.01),
            accuracy=rng.gauss(0.9 + 0.06 * done - 0.08 * done * (1 - done), 0.015),
            tool_rate=rng.gauss(0.99 - 0.37 * done, 0.012),
            calls=1.0,
            reward=0.9,
            tokens_per_second=rng.gauss(7000, 300),
            clip_fraction_acc=abs(rng.gauss(0.01, 0.005)),
            clip_fraction_tool=abs(rng.gauss(0.02, 0.01)),
            approx_kl=abs(rng.gauss(1e-3, 5e-4)),
            grad_norm=math.nan if step == 4 else abs(rng.gauss(0.5, 0.1)),
            entropy=0.3 - 0.2 * done,
            effective_tool_weight=rng.gauss(0.3, 0.04),
            no_signal_share=min(1, 0.2 + 0.6 * done),
            **{
                "gradient_share/acc": 0.9 - 0.6 * done,
                "gradient_share/tool": 0.1 + 0.6 * done,
                "groups/acc_signal": 0.7 - 0.5 * done,
                "groups/tool_signal": 0.2 + 0.2 * done,
                "groups/all_right": 0.3 + 0.5 * done,
                "groups/all_wrong": 0.05,
            },
            truncated=int(rng.random() < 0.05),
            unscored=0,
            lr=3e-4,
            **by_kind,
        )


def make_run(folder: Path, *, rl: int = 60, final: bool = True, hostile: bool = False) -> Path:
    folder.mkdir(parents=True)
    kinds = dict(NEEDS)
    if hostile:
        kinds = {kind + HOSTILE[i]: needs for i, (kind, needs) in enumerate(NEEDS.items())}
    with RunLog(folder) as log:
        log.config({"seed": 0, "rl": {"w_tool": 0.15, "steps": rl}, "note": HOSTILE[0]})
        log_training(log, 40, rl, kinds)
        for stage in ("sft_eval", "rl", "final_eval")[: 3 if final else 2]:
            for kind, needs in NEEDS.items():
                for index in range(3):
                    calls = 1 if stage == "sft_eval" or needs else 0
                    log.rollouts([rollout(stage, kind, index, calls, hostile)])
        summary = {
            "seconds": 312.4,
            "seed": 0,
            "base": base_evaluation(kinds),
            "sft": evaluation(False, kinds=kinds),
            "needed_rate": 0.625,
            "steps": rl,
            "torch": "2.11.0",
            "metis_kernels": "0.1.0",
            "status": "complete" if final else "interrupted",
            "stages": {"sft_seconds": 61.2, "rl_seconds": 231.0, "evaluate_seconds": 20.2},
        }
        if final:
            summary["final"] = evaluation(True, kinds=kinds)
        log.summary(summary)
    return folder


def make_comparison(folder: Path, name: str = "HDPO w_tool=0.15") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arms = []
    for a, arm in enumerate((name, "HDPO w_tool=0.05", "coupled reward", "no tool channel")):
        for seed in range(3):
            final = evaluation(True, seed=seed + 10 * a)
            final["tool_rate"] = min(1.0, (0.6, 0.68, 0.2, 0.99)[a] + 0.012 * seed)
            final["accuracy"] = (0.96, 0.95, 0.78, 0.94)[a] - 0.01 * seed
            sft = evaluation(False, seed=seed)
            arms.append({"name": arm, "seed": seed, "sft": sft, "final": final})
    text = json.dumps({"seeds": [0, 1, 2], "arms": arms})
    (folder / "compare.json").write_text(text)
    return folder


# ---------------------------------------------------------------------------------------------
# Reading HTML back


class Page(HTMLParser):
    """Checks that every element closes where it should, and keeps what there is to attack."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.stack, f"left open: {self.stack}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> repeats an attribute: {names}"
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag):
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-3:]}"
        self.stack.pop()

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


def check_page(path: Path) -> Page:
    page = Page(path.read_text("utf-8"))
    assert not {"script", "iframe", "object", "embed", "link", "form", "base"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name, value)
        if name in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            assert value.startswith("data:image/png;base64,"), (tag, name, value)
    css = "".join(re.findall(r"<style>(.*?)</style>", path.read_text("utf-8"), re.S))
    assert "url(" not in css and "@import" not in css and "http" not in css
    assert ("meta", "http-equiv", "Content-Security-Policy") in page.attributes
    return page


def check_svg(path: Path) -> ElementTree.Element:
    root = ElementTree.parse(path).getroot()
    text = path.read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "http" not in text and "url(" not in text and "nan" not in re.sub(r">[^<]*<", "><", text)
    assert {e.tag.split("}")[1] for e in root.iter()} <= {
        "svg", "style", "rect", "text", "line", "path", "g", "circle", "title",
    }  # fmt: skip
    return root
