"""The report and the pictures, made from synthetic run folders: whole, cut short, and hostile."""

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

import pytest
from PIL import Image

from trainer import report
from trainer.log import RunError, RunLog
from trainer.report import read_run, write_comparison, write_picture, write_report

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


# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo")


def test_whole_run(whole):
    path = write_report(whole)
    assert path == whole / "report.html"
    page = check_page(path)
    assert {path.name for path in whole.iterdir()} == {
        "config.yaml", "metrics.jsonl", "rollouts.jsonl", "summary.json", "report.html",
    }  # fmt: skip
    summary = json.loads((whole / "summary.json").read_text())
    for key in ("tool_rate", "accuracy", "redundant_rate", "missed_rate"):
        for stage in ("sft", "final"):
            assert report.short_percent(summary[stage][key]) in "".join(page.text), (stage, key)
    for words in ("5 min 12 s", "Arbitration", "Health", "Resolved config", "w_tool: 0.15", *NEEDS):
        assert words in page.words, words
    assert "Not finite: grad_norm at rl 4" in page.words
    images = [v for t, n, v in page.attributes if (t, n) == ("img", "src")]
    # Four kinds with images, two samples each: the question's once, a crop per call. glyph_large
    # is called on before alone, the other three before and after.
    assert len(images) == 2 * (1 + 1) + 6 * (1 + 2)
    assert ("img", "class", "pixelated") in page.attributes
    widths = [int(v) for t, n, v in page.attributes if (t, n) == ("img", "width")]
    assert set(widths) == {128, 144}  # 64 doubled, 24 six-fold: whole pixels
    titles = "".join(page.text)
    assert "step 30 · accuracy" in titles


def test_order_of_sections(whole):
    text = write_report(whole).read_text("utf-8")
    order = ["Tool rate", "RL step</text>", "Cold start", "<h2>Arbitration", "<h2>Health",
             "<h2>Rollouts", "Resolved config"]  # fmt: skip
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_tokens_carry_mask_id_and_logprob(whole):
    page = Page(write_report(whole).read_text("utf-8"))
    titles = [v for t, n, v in page.attributes if t == "span" and n == "title"]
    assert any(re.fullmatch(r"token \d+ · logprob \u22120\.\d{3}", title) for title in titles)
    classes = {v for t, n, v in page.attributes if t == "span" and n == "class"}
    assert {"p", "g", "g x", "p x"} <= classes


def test_equal_input_gives_equal_bytes(whole):
    make_comparison(whole)
    try:
        first = [write_report(whole), write_picture(whole), write_comparison(whole)]
        bytes_ = [path.read_bytes() for path in first]
        again = [write_report(whole), write_picture(whole), write_comparison(whole)]
        assert [path.read_bytes() for path in again] == bytes_
    finally:
        for name in ("compare.json", "pareto.svg", "demo.svg"):
            (whole / name).unlink(missing_ok=True)


def test_hostile_strings_are_inert(tmp_path):
    folder = make_run(tmp_path / "run <b>&\"'", hostile=True)
    make_comparison(folder, name=HOSTILE[0] + HOSTILE[6])
    page = check_page(write_report(folder))
    check_svg(write_comparison(folder))
    check_svg(write_picture(folder))
    text = "".join(page.text)
    assert HOSTILE[0] in text and HOSTILE[2] in text and HOSTILE[3] in text  # shown as text
    assert "nul\u2400 bell\u2407" in text
    raw = (folder / "report.html").read_bytes()
    assert b"\x00" not in raw and b"\x1b" not in raw
    assert "onmouseover" not in {name for _, name, _ in page.attributes}
    assert page.tags.count("style") == 1


def test_hostile_images_are_dropped(tmp_path):
    good = png(1, (8, 8))
    for bad in ('x" onerror="alert(1)', "aGVsbG8=", "", 7, None, good[:12], "iVBORw0KGgo="):
        assert report.picture(bad) is None
    assert report.picture(good) == {
        "src": f"data:image/png;base64,{good}", "width": 160, "pixelated": True,
    }  # fmt: skip
    assert report.picture(png(1, (1000, 4)))["width"] == 320


def test_interrupted_before_rl(tmp_path):
    page = check_page(write_report(make_run(tmp_path / "cut", rl=0, final=False)))
    assert "interrupted before RL began" in page.words
    assert "There is no evaluation after RL" in page.words
    assert "No RL step is in metrics.jsonl" in page.words
    check_svg(write_picture(tmp_path / "cut"))


def test_interrupted_during_rl(tmp_path):
    page = check_page(write_report(make_run(tmp_path / "cut", rl=25, final=False)))
    assert "interrupted at RL step 25" in page.words
    check_svg(write_picture(tmp_path / "cut"))


def test_empty_folder_and_no_folder(tmp_path):
    page = check_page(write_report(tmp_path))
    for words in ("no summary.json", "config.yaml is missing", "No SFT loss", "no rollout to show"):
        assert words in page.words, words
    check_svg(write_picture(tmp_path))
    with pytest.raises(RunError, match="no run folder .*nowhere"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(RunError, match="holds no arms"):
        write_comparison(tmp_path)


def test_torn_and_foreign_lines(tmp_path):
    folder = make_run(tmp_path / "torn", rl=5)
    with open(folder / "metrics.jsonl", "a") as handle:
        handle.write('[1, 2]\n"text"\n{"stage": "rl", "step": null}\n')
        handle.write('{"stage": "rl", "step": 1e999}\n{"stage": "rl", "st')
    with open(folder / "rollouts.jsonl", "ab") as handle:
        handle.write(b'{"question": {}, "tokens": [1, [], ["a"]]}\n\xff\xfe{')
    foreign = '{"sft": [1], "final": {"accuracy": "high", "by_kind": 3}, "seed": 1' + "0" * 400
    (folder / "summary.json").write_text(foreign)
    page = check_page(write_report(folder))
    assert "metrics.jsonl: 1 broken line left out" in page.words
    assert "summary.json could not be read" in page.words
    (folder / "summary.json").write_text(foreign + "}")
    check_page(write_report(folder))
    check_svg(write_picture(folder))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_very_short_runs(tmp_path, steps):
    check_page(write_report(make_run(tmp_path / "short", rl=steps)))
    check_svg(write_picture(tmp_path / "short"))


def test_without_held_out_rollouts_training_ones_are_shown(tmp_path):
    folder = make_run(tmp_path / "bare", rl=5)
    record = rollout("rl", "emblem", 0, 1) | {"acc_advantage": -0.7, "tool_advantage": 1.25}
    (folder / "rollouts.jsonl").write_text(json.dumps(record) + "\n")
    words = check_page(write_report(folder)).words
    assert "the last ones of training" in words
    assert "A acc \u22120.7" in words and "A tool 1.25" in words


def test_long_runs_and_long_rollouts_stay_small(tmp_path):
    folder = make_run(tmp_path / "long", rl=3000)
    record = rollout("sft_eval", "sum_easy", 0, 0)
    record["tokens"] = [["w ", 1, i > 4000, -0.1] for i in range(12_000)]
    (folder / "rollouts.jsonl").write_text(json.dumps(record) + "\n")
    path = write_report(folder)
    words = check_page(path).words
    assert "3,401 tokens" in words and "6,199 tokens" in words
    assert path.stat().st_size < 1_000_000


def test_comparison(tmp_path):
    folder = make_comparison(tmp_path / "compare")
    path = write_comparison(folder)
    root = check_svg(path)
    assert (root.get("width"), root.get("height")) == ("720", "420")
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum(t.startswith("HDPO w_tool=0.15, seed") for t in titles) == 3
    assert sum(t.startswith("SFT start") for t in titles) == 3
    page = check_page(folder / "report.html")
    assert "95.094.0 to 96.0" in page.words  # accuracy of the first arm: mean, min, max
    assert "accuracy, glyph_medium" in page.words
    assert "Health" not in page.words  # a comparison by itself has no run to show


def test_arms_tell_apart_without_colour():
    assert len(set(report.SHAPES)) == 7


def test_picture(whole):
    path = write_picture(whole)
    texts = [e.text for e in check_svg(path).iter("{http://www.w3.org/2000/svg}text")]
    assert {*NEEDS, "accuracy", "tool rate", "tool needed", "no tool needed"} <= set(texts)
    path.unlink()


def test_full_disk_names_the_file(whole, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "write_whole", full)
    with pytest.raises(RunError, match=r"report\.html.*No space left.*untouched"):
        write_report(whole)


def test_small_helpers():
    assert report.ticks(0) == [0]
    assert report.ticks(1) == [0, 1]
    assert report.ticks(300) == [0, 50, 100, 150, 200, 250, 300]
    assert all(len(report.ticks(n)) <= 7 for n in range(1, 2000))
    assert report.spread([11, 10, 50], 20) == pytest.approx([20.5, 0.5, 50])
    assert report.spread([10, 11, 30], 20) == pytest.approx([-3, 17, 37])
    assert report.spread([], 20) == []
    assert [report.duration(s) for s in (3.14, 59, 60, 3725)] == [
        "3.1\u202fs", "59\u202fs", "1\u202fmin 00\u202fs", "1\u202fh 02\u202fmin",
    ]  # fmt: skip
    flat = report.smooth([(float(i), 1.0) for i in range(100)])
    assert all(y == pytest.approx(1) for _, y in flat) and len(flat) == 100
    rows = [{"step": i, "v": None if i % 2 else i} for i in range(2000)]
    points = report.series(rows, "v")
    assert len(points) == 400 and points[0][0] < points[-1][0]


def test_read_run_keeps_pairs(whole):
    run = read_run(whole)
    assert len(run.before) == 2 * len(NEEDS) and len(run.after) == len(run.before)
