import pytest

from trainer.chat import turn_text
from trainer.reward import matches, score
from trainer.types import Observation, Question, Rollout, Turn


@pytest.mark.parametrize(
    ("answer", "expected", "same"),
    [
        ("7", "7", True),
        (" Red. ", "red", True),
        ("1,776", "1776", True),
        ("7.0", "7", True),
        ("７", "7", True),  # full-width
        ("17", "7", False),
        ("7 or 8", "7", False),
        ("", "", False),
        (None, "7", False),
        ("nan", "nan", True),  # as words, never as numbers
        ("0 1 2 3 4 5 6 7 8 9 " * 20, "7", False),
        ("inf", "7", False),
        ("1,2,3", "123", False),  # guesses, no thousands
        ("12,34", "1234", False),
        ("1,234,567.50", "1234567.5", True),
        ("10000000000000000001", "10000000000000000002", False),  # equal as floats
        (".", "", False),
    ],
)
def test_matches(answer, expected, same):
    assert matches(answer, expected) is same


def _rollout(*turns: Turn, status="ok") -> Rollout:
    question = Question("q", "k", "?", (), "7")
    return Rollout(question, 0, [], [], [], [], 0, list(turns), status)


def test_an_answer_in_an_observation_is_nobodys_answer():
    leak = Observation("<answer>7</answer>")
    call = turn_text("look", call=("text_search", {"query": "x"}))
    rollout = _rollout(Turn(call, None, leak), Turn("<reason>hm</reason>"))
    score(rollout)
    assert (rollout.answer, rollout.correct, rollout.formatted) == (None, False, False)


def test_only_the_last_turn_answers():
    early = Turn("<reason>a</reason>\n<answer>7</answer>")
    rollout = _rollout(early, Turn(turn_text("b", answer="8")))
    score(rollout)
    assert rollout.answer == "8" and not rollout.correct


def test_of_several_answers_the_last_counts_and_the_format_is_broken():
    text = "<reason>a</reason><answer>7</answer><answer>8</answer>"
    rollout = _rollout(Turn(text))
    score(rollout)
    assert (rollout.answer, rollout.correct, rollout.formatted) == ("8", False, False)
    rollout = _rollout(Turn(text + "<answer>7"))
    score(rollout)
    assert (rollout.answer, rollout.correct, rollout.formatted) == ("8", False, False)


def test_an_answer_that_is_too_long_is_none():
    rollout = _rollout(Turn(turn_text("a", answer="7" * 200)))
    score(rollout)
    assert rollout.answer == "7" * 200 and rollout.formatted
    rollout = _rollout(Turn(turn_text("a", answer="7" * 201)))
    score(rollout)
    assert rollout.answer is None and not rollout.formatted


def test_a_truncated_rollout_answered_nothing():
    rollout = _rollout(Turn(turn_text("a", answer="7")), status="truncated")
    score(rollout)
    assert not rollout.correct and not rollout.formatted and rollout.accuracy_reward == 0.0


def test_the_reward_is_the_papers():
    rollout = _rollout(Turn(turn_text("a", answer="7")))
    score(rollout)
    assert rollout.accuracy_reward == pytest.approx(1.0)
    rollout = _rollout(Turn("<answer>7</answer>"))
    score(rollout)
    assert rollout.accuracy_reward == pytest.approx(0.9)
