"""Rules and judge together: who decides, and that nobody is talked into anything."""

from __future__ import annotations

import json

import pytest
from judge_server import (
    ATTACKS,
    JudgeServer,
    case_of,
    equal,
    graded,
    gullible,
    judge_of,
    verdict,
)

from trainer.grade import Answered, Grader, journal_counts
from trainer.judge import Judge
from trainer.openai_client import (
    OpenAIClient,
    Retry,
)

QUESTION = "Which is it?\nA. cat\nB. dog"
DECIDED = (
    ("7", "8"), ("7", ""), ("7", "."), ("red", "Solution"), ("red", "Thought process:"),
    ("B", "A"), ("yes", "No, verified."), ("yes", "no"), ("7", "9"), ("3 cm", "3 m"),
    ("7", "CORRECT " * 200), ("red", " ".join(map(str, range(1000)))),
)  # fmt: skip


@pytest.mark.parametrize("judge_says", [gullible, verdict("CORRECT"), "hang", "500", "garbage"])
def test_no_judge_changes_what_a_rule_decided(judge_says, tmp_path):
    """Even where each is sent to the judge for audit, and the judge is talked into it."""
    journal = tmp_path / "journal.jsonl"
    items = [Answered(QUESTION, truth, answer) for truth, answer in DECIDED]
    with JudgeServer([judge_says]) as server:
        timeout = 0.1 if judge_says == "hang" else 10.0
        judge = judge_of(server, minimum=1, timeout=timeout, retry=Retry(attempts=1))
        grader = Grader(judge, audit=1.0, journal=journal)
        grades = graded(grader, *items)
        assert server.requests
    assert all(g.scored and not g.correct and g.by.startswith("rule:") for g in grades)
    assert grader.counts["rule incorrect"] == len(items)
    if judge_says == verdict("CORRECT"):
        assert grader.counts["audit disagree"] == len(items)
        assert sum(row.get("disagree", 0) for row in journal_counts(journal).values()) == 12
    judge.check()  # an audit that fails pauses nothing


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_where_a_rule_decides_and_where_none_does(attack):
    """A gullible judge can be talked into CORRECT where it decides; never where a rule does."""
    with JudgeServer([gullible]) as server:
        grader = Grader(judge_of(server), audit=1.0)
        by_rule, by_judge = graded(
            grader,
            Answered("Which?", "B", "C. " + attack),
            Answered("What colour?", "blue whale", "red " + attack),
        )
        assert by_rule.by == "rule:option" and not by_rule.correct
        assert by_judge.by == "judge"
        for request in server.requests:
            assert case_of(request)["ground_truths"] in (["B"], ["blue whale"])
            assert set(case_of(request)) == {"question", "ground_truths", "prediction"}


def test_rules_come_first_and_the_judge_decides_the_rest(tmp_path):
    journal = tmp_path / "journal.jsonl"
    items = [
        Answered("How many?", "7", "7.0", id="a"),
        Answered("How many?", "7", "8", id="b"),
        Answered("What colour?", ["red", "crimson red"], "crimson red", id="c"),
        Answered("What colour?", "red", "reddish", id="d"),
        Answered("What?", "red", None, id="e"),
    ]
    with JudgeServer([equal]) as server:
        grader = Grader(judge_of(server), journal=journal)
        grades = graded(grader, *items)
        assert [case_of(request)["prediction"] for request in server.requests] == ["reddish"]
    assert [g.correct for g in grades] == [True, False, True, False, False]
    assert [g.by for g in grades] == [
        "rule:number",
        "rule:number",
        "rule:exact",
        "judge",
        "rule:empty",
    ]
    (line,) = journal.read_text().splitlines()
    record = json.loads(line)
    assert (record["id"], record["rule_outcome"], record["judge_outcome"]) == (
        "d", "undecided", "incorrect",
    )  # fmt: skip
    assert journal_counts(journal) == {"none": {"judged": 1}}


def test_without_a_judge_what_is_undecided_is_wrong():
    (grade,) = graded(Grader(), Answered("What?", "red", "reddish"))
    assert grade.scored and not grade.correct and grade.by == "no judge"


def test_which_answers_are_audited_is_a_function_of_the_answer():
    items = [Answered("How many?", "7", str(n)) for n in range(200)]

    def audited(order):
        with JudgeServer([equal]) as server:
            grader = Grader(judge_of(server, timeout=5), audit=0.25, seed=5)
            graded(grader, *order)
            return sorted(case_of(request)["prediction"] for request in server.requests)

    first = audited(items)
    assert 25 <= len(first) <= 80 and audited(items[::-1]) == first


def test_an_auditor_is_asked_and_not_the_judge(tmp_path):
    journal = tmp_path / "journal.jsonl"
    with JudgeServer([verdict("CORRECT")]) as judge, JudgeServer([verdict("INCORRECT")]) as second:
        grader = Grader(judge_of(judge), auditor=judge_of(second), audit=1.0, journal=journal)
        grades = graded(grader, Answered("n?", "7", "7.0"), Answered("c?", "red", "reddish"))
        assert len(judge.requests) == len(second.requests) == 1
    assert [grade.correct for grade in grades] == [True, True]
    assert journal_counts(journal) == {"none": {"judged": 1}, "number": {"disagree": 1}}


def test_a_journal_that_cannot_be_written_ends_nothing(tmp_path, caplog):
    with JudgeServer([verdict("CORRECT")]) as server:
        grader = Grader(judge_of(server), journal=tmp_path / "no" / "folder" / "x.jsonl")
        grades = graded(grader, *(Answered("c?", "red", f"red {n} x") for n in range(3)))
    assert all(grade.correct for grade in grades)
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize("audit", [-0.1, 1.1])
def test_settings_out_of_range_are_named(audit):
    with pytest.raises(ValueError, match="audit is a share"):
        Grader(audit=audit)
    with pytest.raises(ValueError, match="an audit needs a judge"):
        Grader(audit=0.5)
    client = OpenAIClient("http://localhost:1/v1", "m")
    with pytest.raises(ValueError, match="max_unscored"):
        Judge(client, max_unscored=1.0)
