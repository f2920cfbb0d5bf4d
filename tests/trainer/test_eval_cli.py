"""`metis eval` and `metis compare` from end to end, with the glyphs task."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
from agent_server import AgentServer
from judge_server import JudgeServer
from synthetic import HOSTILE, check_page, check_svg

from trainer import cli
from trainer.answers import read_answers
from trainer.eval_report import write_comparison, write_report
from trainer.log import RunLog
from trainer.tasks import load_task

CALL = '<reason>hm</reason>\n<tool_call>{"name": "nothing", "arguments": {}}</tool_call>'
"""Of a tool that is not there: a call all the same, and no sandbox has to be started."""
ANSWER = "<reason>so</reason>\n<answer>1</answer>"


def metis(*words, runs):
    return cli.main([*map(str, words), *([] if words[0] == "compare" else ["--runs", str(runs)])])


def read(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two models (the same), played in every way."""
    runs = tmp_path_factory.mktemp("runs")
    base = load_task("glyphs").base
    models = ("--model", f"one={base}", "--model", f"two={base}")
    assert metis("eval", "--arbitrate", *models, "evaluate.questions=8", runs=runs) == 0
    return runs / "eval"


def test_an_evaluation_leaves_its_answers_and_all_that_was_computed(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.yaml", "answers.jsonl", "eval.json", "rollouts.jsonl", "summary.json",
        "report.html", "pareto.svg",
    }  # fmt: skip
    answers = read_answers(finished / "answers.jsonl")
    result = read(finished / "eval.json")
    count = result["questions"]
    assert len(answers) == count * 2 * 3 and result["status"] == "complete"
    modes = {
        mode: [a for a in answers if a.mode == mode] for mode in result["models"]["one"]["modes"]
    }
    assert {mode: len(some) for mode, some in modes.items()} == dict.fromkeys(modes, 2 * count)
    assert all(a.calls for a in modes["forced"]) and not any(a.calls for a in modes["forbidden"])
    assert all(a.forced is not None and a.tokens > 0 for a in modes["forced"])
    one, two = result["models"]["one"], result["models"]["two"]
    assert one["modes"].keys() == two["modes"].keys()
    assert two["differences"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    arbitration = one["arbitration"]
    cells = [
        row[side] for row in arbitration["table"].values() for side in ("called", "not_called")
    ]
    assert sum(cells) == arbitration["questions"] == count
    assert set(arbitration["by_kind"]) == set(load_task("glyphs").kinds)
    low, high = one["modes"]["allowed"]["intervals"]["accuracy"]
    assert 0 <= low <= one["modes"]["allowed"]["accuracy"] <= high <= 1
    summary = read(finished / "summary.json")
    assert summary["final"] == one["modes"]["allowed"] and summary["status"] == "complete"


def test_the_page_of_an_evaluation_shows_the_table_and_the_picture(finished):
    page = check_page(finished / "report.html")
    for words in (
        "Accuracy against tool rate", "Did calling help? one", "Did calling help? two",
        "redundant", "missed", "regret", "wrong both ways", "glyph_small", "labelled needed",
    ):  # fmt: skip
        assert words in page.words, words
    assert "Cold start" not in page.words and "No RL step" not in page.words
    root = check_svg(finished / "pareto.svg")
    titles = [e.text for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any(re.fullmatch(r"one: accuracy .*, tool rate .*", title) for title in titles)


def test_the_report_can_be_written_again(finished):
    before = (finished / "report.html").read_bytes()
    (finished / "report.html").unlink()
    assert cli.main(["report", str(finished)]) == 0
    assert (finished / "report.html").read_bytes() == before


def test_finished_runs_are_compared(finished, tmp_path, capsys):
    for suffix in ("html", "svg", "json"):
        out = tmp_path / f"compared.{suffix}"
        assert metis("compare", finished, "--out", out, runs=None) == 0
    said = capsys.readouterr().out
    assert "eval/one" in said and "eval/two" in said and "did calling help?" in said
    assert max(map(len, said.replace(str(tmp_path), "").splitlines())) <= 80
    check_page(tmp_path / "compared.html")
    check_svg(tmp_path / "compared.svg")
    assert set(read(tmp_path / "compared.json")["models"]) == {"eval/one", "eval/two"}
    few = tmp_path / "few"
    few.mkdir()
    lines = (finished / "answers.jsonl").read_text().splitlines(keepends=True)
    (few / "answers.jsonl").write_text("".join(lines[1 : len(lines) // 2]))
    (few / "eval.json").write_text('{"status": "complete"}')
    assert metis("compare", finished, few, runs=None) == 2
    assert "were not asked the same questions: 1 only of" in capsys.readouterr().err
    assert metis("compare", finished, "--out", "x.png", runs=None) == 2
    assert "must end with .html, .svg or .json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "base"], "expected --model NAME=PATH, got 'base'"),
        (["--model", "a=x", "--model", "a=y"], "--model a is given twice"),
        (["--model", "a=./missing"], "no model at ./missing"),
        (["evaluate.samples=4"], "evaluate.samples is 4 but evaluate.temperature is 0"),
        (["--model", "a=x", "agent.base_url=http://localhost:1/v1", "agent.model=m"], "give one"),
        (["agent.base_url=localhost", "agent.model=m"], "agent.base_url must look like"),
        (["agent.base_url=http://localhost:1/v1"], "agent.model: Field required"),
        (
            ["agent.base_url=http://localhost:1/v1", "agent.model=m", "agent.key_variable=NO_KEY"],
            "agent.key_variable is NO_KEY, which is not set",
        ),
        (
            ["agent.base_url=http://localhost:1/v1", "agent.model=m", "agent.extra={stop: x}"],
            "agent.extra may not hold stop",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, words, message):
    assert metis("eval", *words, "evaluate.questions=8", runs=tmp_path) == 2
    assert message in capsys.readouterr().err


def _agent(server, **more):
    given = {"base_url": server.url, "model": "policy", "concurrency": 4} | more
    return [f"agent.{key}={value}" for key, value in given.items()]


def test_a_server_is_evaluated_like_a_model_in_process(tmp_path, capsys):
    def policy(messages):
        last = messages[-1]
        if last["role"] == "assistant":
            return "1</answer>" if last["content"].endswith("<answer>") else CALL.split("call>")[1]
        return ANSWER if len(messages) > 2 else CALL

    limits = ("evaluate.questions=8", "rollout.max_tokens=20000", "rollout.max_new_tokens=200")
    with AgentServer(policy) as server:
        words = ["eval", "--arbitrate", *_agent(server), *limits]
        assert metis(*words, runs=tmp_path) == 0
    result = read(tmp_path / "eval" / "eval.json")
    assert result["forcing"] == "prefill" and set(result["models"]) == {"policy"}
    arbitration = result["models"]["policy"]["arbitration"]
    assert arbitration["obeyed"] == {"forced": 1.0, "forbidden": 1.0}
    assert arbitration["rates"]["tool_rate"]["value"] == 1.0
    assert arbitration["rates"]["calls_saved"]["value"] == 0.0
    page = check_page(tmp_path / "eval" / "report.html")
    picture = (tmp_path / "eval" / "pareto.svg").read_text()
    assert "never a call" in picture and "always a call" in picture
    assert "policy" in page.words and "<reason>hm</reason>" in "".join(page.text)
    said = capsys.readouterr().out.replace(str(tmp_path), "")
    assert max(map(len, said.splitlines())) <= 80

    with AgentServer(policy, continues=None) as server:
        words = ["eval", "--arbitrate", "--name", "refused", *_agent(server), *limits]
        assert metis(*words, runs=tmp_path) == 2
        assert "agent.forcing=prompt" in capsys.readouterr().err
        words = ["eval", "--arbitrate", "--name", "prompt", *_agent(server, forcing="prompt")]
        assert metis(*words, *limits, runs=tmp_path) == 0
    result = read(tmp_path / "prompt" / "eval.json")
    assert result["forcing"] == "prompt"
    assert result["models"]["policy"]["arbitration"]["obeyed"]["forbidden"] == 0.0
    assert "did not do as told: 100.0 % of the forbidden" in capsys.readouterr().out


def test_a_server_that_fails_now_and_then_leaves_those_questions_unscored(tmp_path, capsys):
    with JudgeServer([ANSWER, ANSWER, "400", ANSWER]) as server:
        words = ["eval", *_agent(server, concurrency=1), "evaluate.questions=8"]
        assert metis(*words, runs=tmp_path) == 0
    result = read(tmp_path / "eval" / "eval.json")
    measures = result["models"]["policy"]["modes"]["allowed"]
    assert measures["unscored"] == 1 and measures["n"] == result["questions"] - 1
    said = capsys.readouterr().out
    assert "1 unscored, in no count" in said and "unscored rejected: 1" in said


def test_ctrl_c_keeps_the_answers_so_far_and_says_that_they_are_not_all(tmp_path, capsys):
    asked = []

    def policy(messages):
        asked.append(messages)
        if len(asked) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return ANSWER

    with AgentServer(policy) as server:
        words = ["eval", *_agent(server, concurrency=2), "evaluate.questions=80"]
        assert metis(*words, "rollout.max_tokens=20000", runs=tmp_path) == 130
    folder = tmp_path / "eval"
    kept = read_answers(folder / "answers.jsonl")
    result = read(folder / "eval.json")
    assert 0 < len(kept) < 12 and result["status"] == "interrupted"
    assert result["answers"] == {"policy": len(kept)} and result["of"] > len(kept)
    assert read(folder / "summary.json")["status"] == "interrupted"
    assert "answers.jsonl is incomplete" in capsys.readouterr().out
    assert "This evaluation is interrupted" in check_page(folder / "report.html").words
    assert metis("compare", folder, runs=None) == 2
    assert "is interrupted: run it again" in capsys.readouterr().err


def test_hostile_names_are_only_shown(finished, tmp_path):
    result = read(finished / "eval.json")
    (one, *_) = result["models"].values()
    text = json.dumps(one).replace("glyph_small", json.dumps(HOSTILE[0])[1:-1])
    result["models"] = {name: json.loads(text) for name in HOSTILE}
    check_page(write_comparison(tmp_path / "x.html", result))
    check_svg(write_comparison(tmp_path / "x.svg", result))


@pytest.mark.parametrize("models", [{"a": 1, "b": {}}, {"a": {"modes": []}}, "none"])
def test_a_broken_eval_json_still_gives_a_page(tmp_path, models):
    with RunLog(tmp_path) as log:
        log.evaluation({"status": "complete", "models": models, "mode": "allowed"})
    check_page(write_report(tmp_path))
    (tmp_path / "eval.json").write_text("{")
    assert "eval.json could not be read" in check_page(write_report(tmp_path)).words
