"""`metis rl` on questions from files, graded by rules and by a judge that may be down."""

from __future__ import annotations

import asyncio
import json

import pytest
from data_files import rl_row, write_rl
from judge_server import JudgeServer, judge_of, verdict
from processes import metis

import trainer.rl
from trainer.cli import main
from trainer.config import ConfigError, load
from trainer.grade import Grader
from trainer.judge import JudgeDown
from trainer.reward import grade, score
from trainer.reward_functions import RewardFunction
from trainer.setup import make_grader
from trainer.tasks import load_task
from trainer.types import Question, Rollout, TrainingError, Turn

SMALL = (
    "task=file", "rl.steps=1", "rl.prompts=2", "rl.group_size=2", "evaluate.questions=4",
    "rollout.max_tokens=4096", "rollout.temperature=3", "data.heldout_share=0.3",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Answers that no rule can decide: texts that the tiny model never writes."""
    rows = [
        rl_row(n, reward_model={"ground_truth": f"a box {n}", "style": "rule"}) for n in range(24)
    ]
    write_rl(tmp_path / "rl.parquet", [*rows, rl_row(99, images=[{"bytes": b"no picture"}])])
    return tmp_path


def run(folder, *settings):
    base = load_task("glyphs").base
    return metis(
        "rl", *SMALL, "data.paths=[rl.parquet]", f"model.path={base}", *settings, cwd=folder
    )


def test_questions_from_a_parquet_file_of_the_reference(folder):
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert "25 rows in 1 files (metis-rl), 1 rejected" in done.stdout
    rows = [json.loads(x) for x in (folder / "runs/rl/metrics.jsonl").read_text().splitlines()]
    graded = {k: v for k, v in rows[-1].items() if k.startswith("graded/")}
    assert sum(graded.values()) > 0 and rows[-1]["unscored"] == 0


def test_a_judge_that_is_asked(folder):
    with JudgeServer([verdict("CORRECT")]) as server:
        done = run(folder, f"judge.base_url={server.url}", "judge.model=judge")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "runs/rl/summary.json").read_text())
    assert summary["final"]["unscored"] == 0


def _answered(text: str) -> Rollout:
    question = Question("q", "k", "What stands there?", (), "a red box")
    rollout = Rollout(question, 0, [1, 2], [False, True], [0.0, 0.0], [], 1)
    rollout.turns.append(Turn(f"<reason>x</reason><answer>{text}</answer>"))
    score(rollout)
    return rollout


def test_what_no_judge_could_say_is_unscored_and_never_wrong():
    rollouts = [_answered("a red box"), _answered("the crimson crate"), _answered("the same crate")]
    rollouts.append(_answered("cut off"))
    rollouts[-1].status = "truncated"
    with JudgeServer(["401"]) as server:
        judge = judge_of(server, minimum=1, window=4, max_unscored=0.0)
        with pytest.raises(JudgeDown):
            asyncio.run(grade(rollouts, Grader(judge)))
    assert [r.status for r in rollouts] == ["ok", "unscored", "unscored", "truncated"]
    assert rollouts[0].correct and not rollouts[1].scored


def test_a_judge_that_is_down_saves_and_ends_with_a_code_of_its_own(folder, monkeypatch, capsys):
    def down(*_, **__):
        raise JudgeDown("9 of 10 answers could not be judged")

    monkeypatch.chdir(folder)
    monkeypatch.setattr(trainer.rl, "rl", down)
    base = load_task("glyphs").base
    words = [*SMALL, "data.paths=[rl.parquet]", f"model.path={base}"]
    assert main(["rl", *words]) == 75
    assert "could not be judged" in capsys.readouterr().err
    assert (folder / "runs/rl/final/config.json").exists()
    assert json.loads((folder / "runs/rl/summary.json").read_text())["status"] == "failed"


def test_what_is_wrong_is_said_before_any_work(folder):
    done = metis("rl", "task=file", cwd=folder)
    assert done.returncode == 2 and "data.paths names no file" in done.stderr
    done = metis("rl", "task=file", "data.paths=[rl.parquet]", cwd=folder)
    assert done.returncode == 2 and "set model.path" in done.stderr
    done = run(
        folder, "judge.base_url=http://127.0.0.1:1", "judge.model=x", "judge.key_variable=NOPE"
    )
    assert done.returncode == 2 and "NOPE, which is not set" in done.stderr


FUNCTIONS = '''
def score(data_source, solution_str, ground_truth, extra_info=None):
    """Half a point for an answer at all."""
    assert data_source == "vthinker-sft" and extra_info["pass8"] == 0, extra_info
    if extra_info["calls"]:
        raise ValueError("no opinion on calls")
    return {"score": 0.5 + 0.5 * (len(solution_str) % 2), "length": len(solution_str)}


def broken(completions, solution, **columns):
    return [float("nan")] * len(completions)
'''


def test_a_reward_function_of_ones_own(folder):
    (folder / "mine.py").write_text(FUNCTIONS)
    done = run(folder, "reward.function=mine.py:score", "rl.steps=2", "reward.correct_at=0.5")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(x) for x in (folder / "runs/rl/metrics.jsonl").read_text().splitlines()]
    graded = {k: v for k, v in rows[-1].items() if k.startswith("graded/")}
    assert set(graded) <= {
        "graded/function correct", "graded/function unscored: raised ValueError",
    }  # fmt: skip
    records = [json.loads(x) for x in (folder / "runs/rl/rollouts.jsonl").read_text().splitlines()]
    played = [r for r in records if r["stage"] == "rl"]
    assert len(played) == 8
    for record in played:
        if record["status"] == "ok":
            assert record["calls"] == 0 and record["score"] in (0.5, 1.0) and record["correct"]
        else:
            assert record["status"] in ("truncated", "unscored") and "score" not in record
            assert not record["correct"]


def test_a_reward_function_that_is_wrong_or_of_no_use_is_said(folder, monkeypatch):
    (folder / "mine.py").write_text(FUNCTIONS)
    monkeypatch.chdir(folder)
    config = ("task=file", "data.paths=[rl.parquet]")
    for spec, message in [
        ("mine.py:nothing", "has no function 'nothing'; its functions are: broken, score"),
        ("nowhere.py:score", "no file at"),
        ("score", "module:function or file.py:function"),
    ]:
        with pytest.raises(ConfigError, match=f"reward.function: .*{message}"):
            make_grader(load(None, [*config, f"reward.function={spec}"]), folder)
    with pytest.raises(ConfigError, match="leave out judge, or reward"):
        load(None, [*config, "reward.function=a:b", "judge.base_url=http://x", "judge.model=x"])
    grader = make_grader(load(None, [*config, "reward.function=mine.py:broken"]), folder)
    rollouts = [_answered("a red box") for _ in range(20)]
    with pytest.raises(TrainingError, match="20 of the last 20 rollouts: it returned nan"):
        asyncio.run(grade(rollouts, grader))
    assert {r.status for r in rollouts} == {"unscored"} and not any(r.correct for r in rollouts)
    assert grader.counts == {"function unscored: returned nan": 20}


def test_the_number_of_a_reward_function_is_the_answers_share_of_the_reward():
    function = RewardFunction(lambda completions: [0.25, 0.75], bounds=(0.0, 1.0))
    rollouts = [_answered("a red box"), _answered("a blue one")]
    asyncio.run(grade(rollouts, Grader(function=function, correct_at=0.75)))
    assert [r.correct for r in rollouts] == [False, True]
    assert [r.accuracy_reward for r in rollouts] == pytest.approx([0.325, 0.775])
