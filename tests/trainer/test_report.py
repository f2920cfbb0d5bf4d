"""The report, made from synthetic run folders: whole, cut short, and hostile."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from synthetic import (
    HOSTILE,
    NEEDS,
    Page,
    base_evaluation,
    check_page,
    check_svg,
    evaluation,
    make_comparison,
    make_run,
    png,
    rollout,
)

from trainer import report, svg
from trainer.log import RunError, RunLog
from trainer.pictures import write_comparison, write_picture
from trainer.report import write_report
from trainer.svg import read_run


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
    for words in ("What moved the policy", *(words for words, _, _ in report.CURRICULUM)):
        assert words in page.words, words
    assert "Not finite: grad_norm at rl 4" in page.words
    assert "emblem50needed8.0" in "".join(page.words.split())  # n, tool, by itself
    assert "all40062.5%41.8" in "".join(page.words.split())
    images = [v for t, n, v in page.attributes if (t, n) == ("img", "src")]
    # Four kinds with images, two samples each: the question's once, a crop per call. glyph_large
    # is called on before alone, the other three before and after.
    assert len(images) == 2 * (1 + 1) + 6 * (1 + 2)
    assert ("img", "class", "pixelated") in page.attributes
    widths = [int(v) for t, n, v in page.attributes if (t, n) == ("img", "width")]
    assert set(widths) == {128, 144}  # 64 doubled, 24 six-fold: whole pixels
    titles = "".join(page.text)
    assert "step 30 · accuracy" in titles


def test_a_curated_cold_start_stands_beside_the_raw_one(tmp_path):
    folder = make_run(tmp_path / "demo")
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["uncurated"] = summary["sft"] | {"accuracy": 0.777, "calls": 1.25}
    path.write_text(json.dumps(summary))
    words = check_page(write_report(folder)).words
    assert "an accuracy of 77.7" in words and "with 1.25 instead of" in words


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
        write = (write_report, write_picture, write_comparison)
        first = [make(whole).read_bytes() for make in write]
        assert [make(whole).read_bytes() for make in write] == first
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


def test_interrupted_before_the_cold_start(tmp_path):
    with RunLog(tmp_path) as log:
        log.summary({"status": "interrupted", "base": base_evaluation()})
    page = check_page(write_report(tmp_path))
    assert "by itself, %" in page.words and "98.0" in page.words
    assert "called, of the questions" not in page.words


def test_evaluation_alone(tmp_path):
    with RunLog(tmp_path) as log:
        log.rollouts([rollout("final_eval", "emblem", i, 1) for i in range(3)])
        log.summary({"status": "complete", "final": evaluation(True)})
    page = check_page(write_report(tmp_path))
    assert page.words.count("held out · ") == 2
    assert "→" not in page.words and "by itself" not in page.words
    assert "before and after RL" not in page.words


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


def test_full_disk_names_the_file(whole, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(svg, "write_whole", full)
    with pytest.raises(RunError, match=r"report\.html.*No space left.*untouched"):
        write_report(whole)


def test_read_run_keeps_pairs(whole):
    run = read_run(whole)
    assert len(run.heldout) == 2 * len(NEEDS)
    assert all(set(stages) == {"sft_eval", "final_eval"} for stages in run.heldout)


def test_compared_arms(tmp_path):
    folder = make_comparison(tmp_path / "compare")
    page = check_page(write_report(folder))
    assert "95.094.0 to 96.0" in page.words  # accuracy of the first arm: mean, min, max
    assert "accuracy, glyph_medium" in page.words
