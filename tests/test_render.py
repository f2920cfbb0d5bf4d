"""Timings in the README and their pictures: up to date, and right about results made up here."""

import json
import xml.etree.ElementTree as ET

import pytest

from bench import render

STAMP = {
    "device": "Made-up Card",
    "torch": "2.13.0",
    "triton": "3.9.0",
    "commit": "0123456789abcdef",
    "dirty": False,
}
EMPTY = "before\n<!-- kernels: any words -->\n<!-- /kernels -->\nafter\n"


def timed(provider, ms, objective="hdpo", **more):
    record = {"provider": provider, "objective": objective, "median_ms": ms, "p20_ms": 0.98 * ms}
    return record | {"p80_ms": 1.03 * ms, "peak_bytes": 512 << 20} | more


def case(*records, full=20.0, **setting):
    """full: milliseconds of the products where every token carries loss."""
    shape = {"head": "Qwen3-VL-8B", "tokens": 8192, "active": 1.0, "frozen": False}
    shape |= {"dtype": "bfloat16", "entropy": 7.6} | setting
    floor = full * shape["active"]
    filled = []
    for record in (timed("products", floor, "floor"), *records):
        if ms := record.get("median_ms"):
            record |= {"of_floor": ms / floor, "tflops": 600 * floor / ms}
        filled.append(shape | record)
    return filled


def suite():
    """The cases of a GPU in short: everybody, shares, a frozen head, the filter, another head."""
    return [
        *case(
            timed("ours", 24.0, gradient_error=2.4e-3),
            timed("ours filtered", 25.0, gradient_error=2.5e-3),
            timed("torch eager", 61.5, gradient_error=2.2e-3),
            {"provider": "torch.compile", "objective": "hdpo", "skipped": "gradients are 1e-1 off"},
            timed("CCE", 31.0, "ce", gradient_error=3.1e-3),
            {"provider": "Liger FLCE", "skipped": "ImportError: no `liger` | <here>"},
            {"provider": "Liger FLSCE", "skipped": "ImportError: no `liger` | <here>"},
        ),
        *case(timed("ours", 12.2), active=0.5, entropy=7.61),
        *case(timed("ours", 2.6), active=0.1, entropy=7.59),
        *case(timed("ours", 17.3), frozen=True),
        *case(timed("ours", 24.1), timed("ours filtered", 18.2), entropy=0.4),
        *case(timed("ours", 13.0), head="Qwen3-VL-2B"),
    ]


LOGPROBS = [
    {"variant": name, "tokens": 8192, "vocab": 151_936, "dtype": "bfloat16", "median_ms": ms}
    | {"p20_ms": ms, "p80_ms": ms, "gigabytes_per_second": 2500.0, "of_copy": 0.9}
    for name, ms in [("copy", 1.66), ("ours triton, forward", 0.912), ("ours triton, both", 2.6)]
]
ADVANTAGES = [
    {"impl": impl, "rollouts": n, "group_size": 16, "median_ms": ms, "p20_ms": ms, "p80_ms": ms}
    for impl, n, ms in [("torch", 128, 0.19), ("torch", 2048, 0.2), ("triton", 2048, 0.0312)]
]


def write(folder, name="card", /, stamp=STAMP, **benchmarks):
    entries = {key: {"stamp": stamp, "records": rows} for key, rows in benchmarks.items()}
    (folder / f"{name}.json").write_text(json.dumps(entries))


def block(folder):
    return render.kernels(render.timings(folder))


def drawn(folder):
    return render.pictures(render.timings(folder))


def rows(text, after):
    """The cells of the first table below a line that begins with `after`."""
    lines = text[text.index(after) :].splitlines()[2:]
    table = lines[: lines.index("")] if "" in lines else lines
    return [line.strip("| ").split(" | ") for line in table]


def words(svg):
    return ["".join(e.itertext()) for e in ET.fromstring(svg).iter() if e.tag.endswith("text")]


# ---- what is checked in --------------------------------------------------------------------------


def test_the_readme_and_its_pictures_are_not_stale():
    for path, text in render.written(render.README, render.RESULTS).items():
        fresh = path.exists() and path.read_text() == text
        assert fresh, f"{path.name} is stale, run: python -m bench.render"


def test_a_stale_page_or_picture_is_found_and_written(tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(EMPTY)
    monkeypatch.setattr(render, "README", readme)
    monkeypatch.setattr(render, "RESULTS", tmp_path)
    write(tmp_path, linear_hdpo=suite())
    for damaged in (readme, tmp_path / "card-providers.svg", tmp_path / "card-active.svg"):
        monkeypatch.setattr("sys.argv", ["render"])
        assert render.main() == 0
        monkeypatch.setattr("sys.argv", ["render", "--check"])
        assert render.main() == 0
        damaged.write_text(damaged.read_text().replace("24", "23"))
        assert render.main() == 1
    (tmp_path / "card-active.svg").unlink()
    assert render.main() == 1


def test_words_around_the_block_stay(tmp_path):
    write(tmp_path, advantages=ADVANTAGES)
    text = render.render(EMPTY, tmp_path)
    assert text.startswith("before\n<!-- kernels: any words -->\n\n**Made-up Card**")
    assert text.endswith("\n\n<!-- /kernels -->\nafter\n")
    assert render.render(text, tmp_path) == text
    with pytest.raises(ValueError, match="no block for kernels"):
        render.render("no markers", tmp_path)


# ---- which files ---------------------------------------------------------------------------------


def test_without_timings_one_sentence_says_how_to_take_them(tmp_path):
    (tmp_path / "demo.json").write_text('{"machine": {}, "runs": []}')
    (tmp_path / "list.json").write_text("[1]")
    write(tmp_path, "empty", linear_hdpo=[])
    assert block(tmp_path) == render.NO_TIMINGS and "bench/run_gpu.sh" in render.NO_TIMINGS
    assert drawn(tmp_path) == {}


def test_two_devices_have_a_part_each(tmp_path):
    write(tmp_path, "a-card", linear_hdpo=suite())
    other = STAMP | {"device": "Other Card", "triton": None, "commit": "", "dirty": False}
    write(tmp_path, "b-card", stamp=other, linear_hdpo=case(timed("ours", 9.0)))
    text = block(tmp_path)
    first, second = text.split("**Other Card**, torch 2.13.0, no triton, no commit.")
    assert first.startswith(render.LEGEND) and first.count(render.LEGEND) == 1
    assert "**Made-up Card**, torch 2.13.0, triton 3.9.0, commit `0123456`." in first
    assert "a-card-active.svg)" in first and "b-card" not in first
    assert "b-card-providers.svg)" in second and "a-card" not in second
    assert sorted(drawn(tmp_path)) == [
        "a-card-active.svg",
        "a-card-providers.svg",
        "b-card-providers.svg",
    ]


def test_absent_benchmarks_leave_nothing_behind(tmp_path):
    write(tmp_path, logprobs=LOGPROBS)
    text = block(tmp_path)
    assert "linear_hdpo" not in text and "hdpo_advantages" not in text and "svg" not in text
    assert render.LEGEND not in text and drawn(tmp_path) == {}


def test_stamps_that_differ_are_told_by_benchmark(tmp_path):
    entry = {"stamp": STAMP, "records": LOGPROBS}
    later = {"stamp": STAMP | {"commit": "f" * 40, "dirty": True}, "records": ADVANTAGES}
    (tmp_path / "card.json").write_text(json.dumps({"logprobs": entry, "advantages": later}))
    sentence = block(tmp_path).splitlines()[0]
    assert "commit `0123456` (logprobs); " in sentence
    assert sentence.endswith("commit `fffffff` with changes (advantages).")


# ---- the tables ----------------------------------------------------------------------------------


def test_everybody_on_the_first_case_fastest_first(tmp_path):
    write(tmp_path, linear_hdpo=suite())
    text = block(tmp_path)
    assert "Qwen3-VL-8B, 8,192 tokens, 100% active, bfloat16, entropy 7.60 nats:" in text
    head, _, *body = rows(text, "`linear_hdpo_loss`")
    assert head[2:5] == ["ms", "x products", "TFLOP/s"]
    assert [row[0] for row in body] == ["products", "ours", "ours filtered", "CCE", "torch eager"]
    assert body[0] == ["products", "floor", "20.0", "1.00", "600", "512", "–"]
    assert body[1] == ["ours", "hdpo", "24.0", "1.20", "500", "512", "2.4e-03"]


def test_who_was_not_timed_is_named_with_the_reason_as_code(tmp_path):
    write(tmp_path, linear_hdpo=suite())
    assert (
        "Not timed:\n\n- torch.compile: `gradients are 1e-1 off`\n"
        "- Liger FLCE, Liger FLSCE: `ImportError: no 'liger' | <here>`\n\n"
    ) in block(tmp_path)


def test_ours_in_every_case_with_and_without_filter(tmp_path):
    write(tmp_path, linear_hdpo=suite())
    head, _, *body = rows(block(tmp_path), "`ours` in every case")
    assert head[-1] == "ms, filtered" and len(body) == 6
    assert body[1][:6] == ["Qwen3-VL-8B", "8,192", "50%", "no", "7.61", "12.2"]
    assert [row[3] for row in body] == ["no", "no", "no", "yes", "no", "no"]
    assert [row[-1] for row in body] == ["25.0", "–", "–", "–", "18.2", "–"]


def test_no_column_for_a_filter_that_was_never_timed(tmp_path):
    wrong = {"provider": "ours", "objective": "hdpo", "skipped": "gradients are 1e-1 off"}
    write(tmp_path, linear_hdpo=case(timed("ours", 24.0)) + case(wrong, tokens=64))
    head, _, *body = rows(block(tmp_path), "`ours` in every case:")
    assert head[-1] == "peak MiB" and body[1][-4:] == ["–"] * 4


def test_logprobs_and_advantages(tmp_path):
    write(tmp_path, logprobs=LOGPROBS, advantages=ADVANTAGES)
    text = block(tmp_path)
    assert "`logprobs` of 8,192 x 151,936 logits, bfloat16" in text
    assert rows(text, "`logprobs`")[2:] == [
        ["copy of the logits", "–", "1.66", "2,500", "0.900"],
        ["ours triton", "forward", "0.912", "2,500", "0.900"],
        ["ours triton", "forward, backward", "2.60", "2,500", "0.900"],
    ]
    assert text.endswith(
        "`hdpo_advantages` of 128 / 2,048 rollouts in groups of 16, in µs: "
        "torch 190 / 200; triton – / 31.2."
    )


# ---- the pictures --------------------------------------------------------------------------------


def test_bars_hold_who_was_timed_and_the_floor(tmp_path):
    write(tmp_path, linear_hdpo=suite())
    svg = drawn(tmp_path)["card-providers.svg"]
    said = words(svg)
    names = ["ours", "ours filtered", "CCE", "torch eager"]
    assert [w for w in said if w in names] == names
    assert "products 20 ms" in said and "61.5 ms, 3.08 x" in said
    assert not any("Liger" in w for w in said)
    assert svg.count('class="bar tool faint"') == 1 and any("Faint" in w for w in said)
    assert "prefers-color-scheme:dark" in svg


def test_bars_are_as_long_as_the_times(tmp_path):
    write(tmp_path, linear_hdpo=suite())
    tree = ET.fromstring(drawn(tmp_path)["card-providers.svg"])
    wide = [float(e.get("width")) for e in tree.iter() if (e.get("class") or "")[:4] == "bar "]
    assert [w / wide[0] for w in wide] == pytest.approx([1, 25 / 24, 31 / 24, 61.5 / 24], 1e-2)


def test_the_line_takes_the_cases_that_differ_in_share_alone(tmp_path):
    write(tmp_path, linear_hdpo=suite())
    svg = drawn(tmp_path)["card-active.svg"]
    tree = ET.fromstring(svg)
    dots = [e for e in tree.iter() if e.tag.endswith("circle") and e.get("class") == "bar acc"]
    assert len(dots) == 3 and "ours 24 ms" in words(svg) and "products 20 ms" in words(svg)
    assert not any("torch eager" in w for w in words(svg))
    assert any("8,192 tokens, bfloat16" in w for w in words(svg))


def test_times_far_below_a_millisecond_have_ticks(tmp_path):
    records = case(timed("ours", 0.024), full=0.02)
    records += case(timed("ours", 0.012), full=0.02, active=0.5)
    write(tmp_path, linear_hdpo=records)
    assert "0.02 ms" in words(drawn(tmp_path)["card-active.svg"])


def test_every_text_is_inside_of_its_picture(tmp_path):
    slow = timed("torch F.linear_cross_entropy", 1234.5, "ce")
    half = case(timed("ours", 12.0), slow, active=0.5)
    write(tmp_path, linear_hdpo=case(timed("ours", 24.0), slow) + half)
    for svg in drawn(tmp_path).values():
        tree = ET.fromstring(svg)
        for e in (e for e in tree.iter() if e.tag.endswith("text")):
            # 7.5 units a letter of 13 px is more than any usual font takes.
            wide = 7.5 * len("".join(e.itertext()))
            share = {"start": 0, "middle": 0.5, "end": 1}[e.get("text-anchor")]
            left = float(e.get("x")) - share * wide
            assert 0 <= left and left + wide <= float(tree.get("width")), "".join(e.itertext())


def test_nothing_but_the_results_decides(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        write(folder, linear_hdpo=suite(), logprobs=LOGPROBS, advantages=ADVANTAGES)
    assert block(one) == block(two) and drawn(one) == drawn(two)


def test_real_logits_have_a_table_of_what_the_filter_saves_and_loses(tmp_path):
    here = dict(head="A Model", tokens=2048, dtype="float32", temperature=0.5, entropy=0.74)
    records = case(
        timed("ours", 20.4, gradient_error=2e-6),
        timed("ours filtered", 11.0, gradient_error=1.6e-3, live_share=0.134),
        **here,
    )
    write(tmp_path, filter=records)
    text = block(tmp_path)
    assert "on the logits of A Model, 2,048 tokens, float32" in text
    assert "| 0.5 | 0.74 | 13.4% | 1.02 | 0.550 | 2.0e-06 | 1.6e-03 |" in text


def test_the_row_pass_and_the_step_on_a_cpu(tmp_path):
    rows = [
        {"variant": name, "rows": 512, "vocab": v, "dtype": "float32", "median_ms": ms}
        | {"of_ours": ms / 5.0, "of_copy": 1.0}
        for name, v, ms in [("copy", 32_000, 4.9), ("ours cpp", 32_000, 5.0), ("copy", 99, 1.0)]
    ]
    steps = [
        {"impl": "cpp", "steps": 9, "loss_ms": 10.1, "step_ms": 1930.0, "share": 0.005},
        {"impl": "torch", "steps": 9, "loss_ms": 12.7, "step_ms": 2004.0, "share": 0.006},
    ]
    write(tmp_path, cpu_rows=rows, demo_step=steps)
    text = block(tmp_path)
    assert "|  | 512 x 32,000, float32 | 512 x 99, float32 |" in text
    assert (
        "| copy | 4.90 (0.980) | 1.00 (0.200) |" in text
        and "| ours cpp | 5.00 (1.00) | – |" in text
    )
    assert "cpp 10.1 of 1,930 ms (0.5%); torch 12.7 of 2,004 ms (0.6%)" in text


def test_every_case_with_a_rival_has_a_table_of_everybody(tmp_path):
    records = [
        *case(timed("ours", 24.0), timed("torch eager", 60.0), dtype="float32"),
        *case(timed("ours", 12.0), timed("torch eager", 50.0)),
    ]
    write(tmp_path, linear_hdpo=records)
    text = block(tmp_path)
    assert text.count("| torch eager |") == 2 and "in every case" not in text


def test_whole_steps_have_a_block_of_their_own(tmp_path):
    setting = {"model": "tiny", "dtype": "float32", "groups": 4, "group_size": 16}
    setting |= {"tool_share": 0.3, "max_tokens": 4096, "micro": "group"}
    setting |= {"prompt": 256, "image": 64, "response": 64, "active": 1.0}

    def way(name, ms, mib):
        timed = {"way": name, "median_ms": ms, "tokens_per_second": 1e6 / ms}
        return setting | timed | {"peak_bytes": mib << 20}

    gone = setting | {"way": "packed", "skipped": "out of memory: CUDA"}
    write(tmp_path, step=[way("padded", 800.0, 240), gone, way("ours", 200.0, 60)])
    text = render.render(EMPTY + "<!-- steps: words -->\n<!-- /steps -->\n", tmp_path)
    _, _, *found = rows(text, "One whole update")
    assert [row[2] for row in found] == list(render.render_steps.WAYS.values())
    assert found[0][3:] == ["800", "1.00", "1,250", "240", "1.00"]
    assert found[1][3:] == ["out of memory: CUDA", "–", "–", "–", "–"]
    assert found[2][3:] == ["200", "0.250", "5,000", "60", "0.250"]
