"""Evaluation, its files, and models side by side."""

from __future__ import annotations

import json

import pytest
from test_arbitration import ANSWERS, answer

from trainer.answers import Answer, read_answers
from trainer.comparison import evaluation, read_runs
from trainer.evaluate import evaluate
from trainer.log import RunError, RunLog
from trainer.types import Question, Rollout


class Scripted:
    """An agent that is right with odd seeds."""

    name, batch = "scripted", 4

    def __init__(self):
        self.asked = []

    def play(self, questions, seeds, *, mode="allowed", stopping=lambda: False):
        if stopping():
            raise KeyboardInterrupt
        self.asked.append((len(questions), mode))
        return [
            Rollout(
                question, seed, [], [], [], [], 0, mode=mode, correct=bool(seed % 2), calls=seed % 3
            )
            for question, seed in zip(questions, seeds, strict=True)
        ]


QUESTIONS = [Question(f"q/{n}", "even" if n % 2 else "odd", "?", (), "1") for n in range(5)]


def test_every_question_is_played_as_often_as_asked_with_seeds_of_its_own(tmp_path):
    agent, recorded = Scripted(), []
    with RunLog(tmp_path) as log:
        for mode in ("allowed", "forced"):
            answers, shown = evaluate(
                agent, QUESTIONS, log, "x", lambda: False, mode=mode, samples=2,
                record=recorded.extend,
            )  # fmt: skip
    assert agent.asked == [(n, mode) for mode in ("allowed", "forced") for n in (4, 4, 2)]
    allowed, forced = recorded[:10], recorded[10:]
    assert forced == answers and [a.seed for a in allowed] == [a.seed for a in forced]
    assert len({a.seed for a in allowed}) == 10
    assert [(a.id, a.sample) for a in allowed] == [(q.id, s) for q in QUESTIONS for s in range(2)]
    assert [r.question.kind for r in shown] == ["odd"] * 3 + ["even"] * 3


def test_what_was_played_before_an_interrupt_was_recorded(tmp_path):
    recorded = []
    with RunLog(tmp_path) as log, pytest.raises(KeyboardInterrupt):
        evaluate(Scripted(), QUESTIONS, log, "x", lambda: bool(recorded), record=recorded.extend)
    assert len(recorded) == 4


def test_answers_are_read_back_as_they_were_written(tmp_path):
    path = tmp_path / "answers.jsonl"
    with RunLog(tmp_path) as log:
        log.answers(a.record() for a in ANSWERS)
    assert read_answers(path) == ANSWERS
    whole = path.read_text()
    path.write_text(whole + '{"model": "m", "id"')  # killed while it wrote
    assert read_answers(path) == ANSWERS
    for text, message in (
        ("", "holds no answers"),
        ('{"id": 1}\n', "line 1 is no answer"),
        ("nonsense\n" + whole, "line 1 is no answer"),
    ):
        path.write_text(text)
        with pytest.raises(RunError, match=message):
            read_answers(path)
    with pytest.raises(RunError, match="cannot be read"):
        read_answers(tmp_path / "nowhere.jsonl")


def _answers(rights, calls=0, **fields) -> list[Answer]:
    return [
        answer(f"q{n}", "allowed", right, calls, kind="ab"[n % 2], **fields)
        for n, right in enumerate(rights)
    ]


def test_differences_are_to_the_first_and_paired():
    base = _answers([True, False] * 20)
    better = _answers([True, True] + [True, False] * 19, calls=1)
    lost = [answer("q39", "allowed", False, 0, kind="b", status="unscored")]
    result = evaluation({"base": base, "better": better, "lost": base[:-1] + lost})
    assert result["questions"] == 40 and result["mode"] == "allowed"
    assert "differences" not in result["models"]["base"]
    difference = result["models"]["better"]["differences"]
    assert difference["accuracy"]["value"] == pytest.approx(1 / 40)
    assert difference["accuracy"]["low"] == 0.0 and difference["n"] == 40
    assert difference["tool_rate"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert difference["by_kind"]["a"]["accuracy"]["value"] == 0.0
    assert difference["by_kind"]["b"]["accuracy"]["value"] == pytest.approx(1 / 20)
    # What one of them has not scored says nothing of the difference.
    assert result["models"]["lost"]["differences"]["n"] == 39
    assert result["models"]["lost"]["differences"]["accuracy"]["value"] == 0.0


def test_arbitration_is_compared_where_every_way_was_played():
    always = [
        answer(a.id, a.mode, a.correct, 1 if a.mode == "allowed" else a.calls, kind=a.kind)
        for a in ANSWERS
    ]
    result = evaluation({"some": ANSWERS, "always": always})
    difference = result["models"]["always"]["differences"]
    assert difference["missed_rate"]["value"] == -0.5
    assert difference["redundant_rate"]["value"] == 0.5
    assert result["models"]["some"]["arbitration"]["questions"] == 8
    assert set(result["models"]["some"]["modes"]) == {"allowed", "forbidden", "forced"}


def test_other_questions_are_refused():
    with pytest.raises(RunError, match=r"1 only of one, such as q2 \(allowed\)"):
        evaluation({"one": _answers([True] * 3), "two": _answers([True] * 2)})
    other = [answer("q0", "direct", True, 0)]
    with pytest.raises(RunError, match="not asked the same questions.*only of one.*only of two"):
        evaluation({"one": _answers([True]), "two": other})


def test_finished_runs_are_read_and_others_refused(tmp_path):
    def run(name, status="complete", models=("m",), parent=tmp_path):
        folder = parent / name
        folder.mkdir(parents=True)
        with RunLog(folder) as log:
            log.evaluation({"status": status})
            for model in models:
                log.answers(a.record() for a in _answers([True, False], model=model))
        return folder

    one, two = run("one"), run("two", models=("a", "b"))
    assert set(read_runs([one, two])) == {"one", "two/a", "two/b"}
    again = run("one", parent=tmp_path / "elsewhere")
    assert set(read_runs([one, again])) == {str(one), str(again)}
    with pytest.raises(RunError, match="is interrupted: run it again"):
        read_runs([run("half", "interrupted")])
    with pytest.raises(RunError, match="holds no eval.json"):
        read_runs([tmp_path])
    with pytest.raises(RunError, match="no run folder"):
        read_runs([tmp_path / "nowhere"])
    (one / "eval.json").write_text(json.dumps([]))
    with pytest.raises(RunError, match="cannot be read"):
        read_runs([one])
