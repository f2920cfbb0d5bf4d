"""`metis curate sft`, from raw files to its outputs, whatever happens in between."""

import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from agent_server import AgentServer, said
from curate_rows import answered, noise, python, row, small
from data_files import write_lines
from judge_server import JudgeServer, case_of
from processes import start

from trainer.chat import turn_text
from trainer.cli import main
from trainer.curate.rubric import DIMENSIONS
from trainer.data import Checks, Dataset
from trainer.tasks.glyphs.raw import write_raw

OUTPUTS = ("dataset.jsonl", "curation.jsonl", "report.html")
FOUND_AS = {"tool_answer": "answer_from_tool"}
"""Flaw -> reason, where the two have different names."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_raw(tmp_path_factory.mktemp("raw"), 7, 160)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("few") / "few.jsonl", small(36))


def curate(*arguments) -> int:
    return main(["curate", "sft", *map(str, arguments)])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def reasons(folder: Path) -> Counter:
    return Counter(line["reason"] for line in lines(folder / "curation.jsonl"))


# ---- what comes out ------------------------------------------------------------------------------


def test_planted_flaws_are_found_each_for_its_reason(raw, tmp_path):
    out = tmp_path / "out"
    assert curate(raw, "--out", out, "--task", "glyphs") == 0
    labels = {one["id"]: one["flaw"] for one in lines(raw.parent / "labels.jsonl")}
    verdicts = lines(out / "curation.jsonl")
    assert [one["id"] for one in verdicts] == list(labels)
    told = [one for one in verdicts if labels[one["id"]] != "solvable"]  # which takes a model
    dropped = {one["id"] for one in told if one["verdict"] == "dropped"}
    flawed = {one["id"] for one in told if labels[one["id"]] is not None}
    assert len(dropped & flawed) >= 0.99 * len(dropped)
    assert len(dropped & flawed) >= 0.99 * len(flawed)
    for one in told:
        if one["id"] in dropped & flawed:
            flaw = labels[one["id"]]
            assert one["reason"] == FOUND_AS.get(flaw, flaw), one
    kept = [one["id"] for one in verdicts if one["verdict"] == "kept"]
    again = Dataset(out / "dataset.jsonl")
    assert [one.id for one in again] == kept and not len(again.rejections)
    by_id = {one.id: one for one in Dataset(raw)}
    assert all(one == by_id[one.id] for one in again)
    assert json.loads((out / "summary.json").read_text())["rows"] == len(verdicts) == 160


def test_every_row_is_accounted_for_and_the_page_shows_why(tmp_path):
    broken = "not even JSON"
    cut = row(python("image_1"), "<image>", images=[noise(1)])
    damaged = row(answered("7"), question="<image>\nWhat is it?")
    damaged["images"] = [damaged["images"][0][:-60] + "A" * 60]
    wrong = row(answered("8"), question="What is 3 + 4?", extra_info={"answer": "7"})
    evil = row(answered("<script>alert(1)</script>"), question="<b>What?</b>")
    path = write_lines(tmp_path / "raw.jsonl", [broken, cut, damaged, wrong, evil])
    out = tmp_path / "out"
    assert curate(path, "--out", out, "curate.stages=[rules,answer]") == 0
    verdicts = [
        (one["row"], one["verdict"], one["reason"]) for one in lines(out / "curation.jsonl")
    ]
    assert verdicts == [
        (0, "bad", "not_json"),
        (1, "dropped", "truncated"),
        (2, "bad", "bad_image"),
        (3, "dropped", "wrong_answer"),
        (4, "kept", None),
    ]
    page = (out / "report.html").read_text()
    assert "1 + 2 + 2 = 5" in page and "data:image/png;base64," in page
    assert (
        "<script" not in page and "<b>What?" not in page and "http" not in page.split("</style>")[1]
    )
    for words in ("truncated", "wrong_answer", "bad_image", "not_json", "execute (not asked for)"):
        assert words in page, words


def test_a_row_whose_picture_has_gone_is_bad_and_nothing_else(tmp_path, monkeypatch):
    from trainer.curate import pipeline

    noise(1).save(tmp_path / "one.png")
    given = row(answered("7"), id="a") | {"images": ["one.png"]}
    path = write_lines(tmp_path / "raw.jsonl", [given, row(answered("7"), id="b")])
    rows = pipeline.good_rows

    def late(data):
        (tmp_path / "one.png").unlink()
        return rows(data)

    monkeypatch.setattr(pipeline, "good_rows", late)
    assert curate(path, "--out", tmp_path / "out", "curate.stages=[rules]") == 0
    found = [(one["verdict"], one["reason"]) for one in lines(tmp_path / "out" / "curation.jsonl")]
    assert found == [("bad", "missing_image"), ("kept", None)]


def test_recorded_failures_may_be_mended_and_searches_may_be_trusted(tmp_path):
    fails, error = python("1 / 0"), "ZeroDivisionError: division by zero"
    mended = [fails, error, python("6 * 7"), "42", answered("42")]
    search = '<reason>So.</reason>\n<tool_call>{"name": "search", "arguments": {}}</tool_call>'
    rows = [
        row(*mended, question="<image>\nWhat is 6 * 7?"),
        row(fails, error, answered("42"), question="Why?"),
        row(search, "The web says so.", answered("so"), question="What does the web say?"),
        row(python("print(1 / 3)"), "0.33333", answered("1/3"), question="One by three?"),
    ]
    path = write_lines(tmp_path / "raw.jsonl", rows)
    out = tmp_path / "out"
    assert curate(path, "--out", out) == 0
    found = [one["reason"] for one in lines(out / "curation.jsonl")]
    assert found == [None, "execution_failure", "execution_failure", None]
    strict = ["curate.recovered=false", "curate.trusted=[search]", "curate.number_tolerance=1e-9"]
    assert curate(path, "--out", out, *strict, "--overwrite") == 0
    found = [one["reason"] for one in lines(out / "curation.jsonl")]
    assert found == ["execution_failure", "execution_failure", None, "mismatch"]


def test_a_duplicate_takes_the_place_of_a_row_that_is_dropped(tmp_path):
    wrong = [python("print(40 + 2)"), "43", answered("43")]
    right = [python("print(40 + 2)"), "42", answered("42")]
    asked = {"question": "<image>\nWhat is 40 + 2?"}
    path = write_lines(tmp_path / "raw.jsonl", [row(*t, **asked) for t in (wrong, right, right)])
    assert curate(path, "--out", tmp_path / "out", "data.ids=content") == 0
    found = [one["reason"] for one in lines(tmp_path / "out" / "curation.jsonl")]
    assert found == ["mismatch", None, "duplicate_id"]
    rows = [row(*t, id=str(n), **asked) for n, t in enumerate((wrong, right, right))]
    write_lines(path, rows)
    assert curate(path, "--out", tmp_path / "stated") == 0
    found = [one["reason"] for one in lines(tmp_path / "stated" / "curation.jsonl")]
    assert found == ["mismatch", None, "duplicate"]


# ---- a model and a judge -------------------------------------------------------------------------


def policy(messages) -> str:
    """Knows how to add, and nothing else."""
    time.sleep(0.005)
    found = re.search(r"What is (\d+) \+ (\d+)\?", said(messages[-1]))
    answer = str(int(found[1]) + int(found[2])) if found else "I do not know"
    return turn_text("So.", answer=answer)


def review(body) -> str:
    """Does not like emblems."""
    time.sleep(0.005)
    case = case_of(body)
    assert case["steps"][0]["by"] == "agent" and "ground_truths" not in case
    passed = dict.fromkeys(DIMENSIONS, "PASS")
    if "emblem" in case["question"]:
        passed["tool_use_rationale"] = "FAIL"
    return json.dumps(passed | {"reason": "I looked"})


@pytest.fixture
def servers(tmp_path):
    """(agent's server, judge's server, the settings that name them)"""
    with AgentServer(policy) as agent, JudgeServer([review]) as judge:
        settings = [f"agent.base_url={agent.url}", "agent.model=m", "agent.concurrency=2"]
        settings += [f"judge.base_url={judge.url}", "judge.model=j", "judge.concurrency=2"]
        yield agent, judge, [*settings, f"judge.cache={tmp_path / 'cache'}"]


READ = "curate.stages=[rules,solvable,judge]"
"""Without running anything."""


def test_model_and_judge_are_asked_once_and_only_where_a_tool_is_called(few, servers, tmp_path):
    agent, judge, settings = servers
    out = tmp_path / "out"
    assert curate(few, "--out", out, *settings, "curate.k=3", READ) == 0
    found = reasons(out)
    assert found == {"truncated": 6, "solvable": 6, "tool_use_rationale": 6, None: 18}
    detail = {one["reason"]: one["detail"] for one in lines(out / "curation.jsonl")}
    assert detail["solvable"] == "3 of 3 samples without tools are right"
    assert detail["tool_use_rationale"] == "tool_use_rationale: I looked"
    asked = len(agent.requests), len(judge.requests)
    system = agent.requests[-1]["messages"][0]["content"]
    assert "Tools" not in system and agent.requests[-1]["temperature"] == 1.0
    # What no one sample got right was drawn once, and three times what was.
    questions = Counter(
        json.dumps(request["messages"])
        for request in agent.requests
        if len(request["messages"]) > 1
    )
    assert set(questions.values()) == {1, 3}
    assert curate(few, "--out", out, *settings, "curate.k=3", "--overwrite") == 0
    assert (len(agent.requests) - 1, len(judge.requests)) == asked  # the one asks whether it lives


def test_what_nobody_can_say_pauses_the_run_and_drops_nothing(few, servers, tmp_path):
    _, judge, settings = servers
    out = tmp_path / "out"
    judge.script = ["401"]
    assert curate(few, "--out", out, *settings, "curate.k=1", READ) == 75
    assert not (out / "dataset.jsonl").exists()
    judge.script = [review]
    assert curate(few, "--out", out, *settings, "curate.k=1", READ) == 0
    assert reasons(out)["unscored"] == 0


def test_few_rows_of_which_nobody_can_say_anything_are_named(few, servers, tmp_path):
    _, judge, settings = servers
    judge.script = ["401", review]
    asked = [*settings, "curate.k=1", "curate.max_unscored=0.2", READ]
    assert curate(few, "--out", tmp_path / "out", *asked) == 0
    [lost] = [
        one for one in lines(tmp_path / "out" / "curation.jsonl") if one["reason"] == "unscored"
    ]
    assert lost["stage"] == "judge" and "401" in lost["detail"]
    assert curate(few, "--out", tmp_path / "out", *asked, "--overwrite") == 0
    assert reasons(tmp_path / "out")["unscored"] == 0


def test_the_model_in_this_process_solves_what_needs_no_tool(raw, tmp_path):
    some = tmp_path / "some.jsonl"
    some.write_text("".join(raw.open().readlines()[:32]))
    out = tmp_path / "out"
    asked = ["--task", "glyphs", "model.path=glyphs", "curate.stages=[rules,solvable]"]
    asked += ["curate.solvable_at=0.75", "rollout.max_batch=8"]
    assert curate(some, "--out", out, *asked) == 0
    labels = {one["id"]: one["flaw"] for one in lines(raw.parent / "labels.jsonl")}
    found = {one["id"]: one["reason"] for one in lines(out / "curation.jsonl")}
    easy = [name for name in found if labels[name] == "solvable"]
    assert len(easy) >= 2 and {found[name] for name in easy} == {"solvable"}
    assert list(found.values()).count("solvable") < 16


# ---- interrupted ---------------------------------------------------------------------------------


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(process) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.join()


def wait_for(journal: Path, entries: int, process) -> None:
    while count(journal) < entries and process.is_alive():
        time.sleep(0.001)


def test_ten_kills_at_random_points_leave_no_trace(few, servers, tmp_path):
    _, _, settings = servers
    asked = [few, *settings, "curate.k=3"]
    whole = tmp_path / "a" / "out"
    assert curate(*asked, "--out", whole) == 0
    total = count(whole / "journal.jsonl")
    out, hit = tmp_path / "b" / "out", []
    journal = out / "journal.jsonl"
    # Verdicts of the judge are in a cache of their own: these runs are to ask for theirs.
    asked = [f"judge.cache={tmp_path / 'other'}" if "cache" in str(a) else a for a in asked]
    rng = random.Random(3)  # whose points lie in every stage
    for point in sorted(rng.sample(range(1, total - 5), 10)):
        process = start(["curate", "sft", *asked, "--out", out], tmp_path / "log")
        wait_for(journal, max(count(journal) + 1, point), process)
        time.sleep(rng.uniform(0, 0.01))
        kill(process)
        assert not (out / "summary.json").exists(), (tmp_path / "log").read_text()
        hit.append(json.loads(journal.read_bytes().splitlines()[-2])["stage"])
    # Which one a kill hits is not exact: verdicts come in bursts, and so a point may be passed.
    assert len(set(hit)) >= 3, hit
    process = start(["curate", "sft", *asked, "--out", out], tmp_path / "log")
    process.join(120)
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    for name in OUTPUTS:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_an_interrupt_and_a_full_disk_can_be_gone_on_with(few, tmp_path):
    out = tmp_path / "out"
    asked = ["curate", "sft", few, "--out", out]
    log = tmp_path / "log"
    process = start(asked, log)
    wait_for(out / "journal.jsonl", 38, process)
    os.kill(process.pid, signal.SIGINT)
    before = time.monotonic()
    process.join(60)
    assert process.exitcode == 130 and time.monotonic() - before < 10
    assert "the same command goes on" in log.read_text()
    size = (out / "journal.jsonl").stat().st_size
    process = start(asked, log, file_bytes=size + 300)
    process.join(60)
    assert process.exitcode == 2
    assert "cannot be written" in log.read_text() and "to go on" in log.read_text()
    assert curate(*asked[2:]) == 0 and sum(reasons(out).values()) == 36


# ---- refused -------------------------------------------------------------------------------------


def test_a_folder_is_gone_on_with_or_refused(tmp_path, capsys):
    path = write_lines(tmp_path / "raw.jsonl", [row(answered("7"))])
    out = tmp_path / "out"
    asked = [path, "--out", out, "curate.stages=[rules]"]
    assert curate(*asked) == 0
    assert curate(*asked) == 2 and "is finished" in capsys.readouterr().err
    (out / "summary.json").unlink()
    assert curate(*asked, "curate.duplicate_bits=3") == 2
    said = capsys.readouterr().err
    assert "curate.duplicate_bits was 6, now 3" in said and "--overwrite" in said
    assert curate(*asked, "curate.sessions=3") == 0  # how, not what
    (out / "summary.json").unlink()
    write_lines(path, [row(answered("8"))])
    assert curate(*asked) == 2 and "the input files are others" in capsys.readouterr().err
    assert curate(*asked, "--overwrite") == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("Dear")
    assert curate(path, "--out", other) == 2 and "is not empty" in capsys.readouterr().err
    assert (other / "letter.txt").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["curate.stages=[solvable]"], "solvable needs a model: set model.path, or agent.base_url"),
        (["curate.stages=[judge]"], "judge needs a judge: set judge.base_url and judge.model"),
        (["curate.stages=[balance]"], "balance is no stage of sft"),
        (["curate.stages=[polish]"], "curate.stages.0"),
        (["curate.knob=1"], "did you mean"),
        (["no/such/file.jsonl"], "no such file"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(settings, message, tmp_path, capsys):
    path = write_lines(tmp_path / "raw.jsonl", [row(answered("7"))])
    assert curate(path, *settings, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_questions_are_for_the_other_command(tmp_path, capsys):
    question = {"question": "What is 3 + 4?", "answer": "7"}
    path = write_lines(tmp_path / "questions.jsonl", [question])
    assert curate(path, "--out", tmp_path / "out") == 2
    assert "metis curate rl" in capsys.readouterr().err
    assert len(Dataset(path, checks=Checks(max_bad=0.0))) == 1
