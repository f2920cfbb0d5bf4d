"""Rewards of a finished rollout: r_ans by rule, judge or a user's function, r_fmt by protocol."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal

from trainer.chat import find_answer, is_formatted
from trainer.grade import Answered, Grader
from trainer.reward_functions import RewardFunction, row_of
from trainer.types import Question, Rollout

_ROUNDING = 1e-6
"""Of a number that a reward function computed in float32."""
MAX_ANSWER = 200
"""Characters of an answer that are compared; a longer one is no answer."""


def normalise(text: str) -> str:
    """Case, width, spaces and a final full stop do not matter."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


_NUMBER = re.compile(r"[-+]?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?")
"""Commas only where thousands are: "1,2,3" is a list of guesses and not 123."""


def matches(answer: str | None, expected: str) -> bool:
    """Whether an answer is the expected one: equal after `normalise`, or exactly the same number.

    An answer of nothing but spaces and full stops matches nothing, whatever is expected.
    """
    if answer is None or len(answer) > MAX_ANSWER:
        return False
    answer, expected = normalise(answer), normalise(expected)
    if not answer or answer == expected:
        return bool(answer)
    if _NUMBER.fullmatch(answer) and _NUMBER.fullmatch(expected):
        return Decimal(answer.replace(",", "")) == Decimal(expected.replace(",", ""))
    return False


def score(rollout: Rollout) -> None:
    """Fills answer, correct and formatted. A truncated rollout answered nothing, nor did one whose
    answer is longer than MAX_ANSWER.

    Of several answers in the last turn the last one counts, alone (`find_answer`), and the format
    is broken. Only turns, which the policy wrote, are read: never an observation (DESIGN: the
    reference can be made to judge what a tool printed).
    """
    turns = [turn.text for turn in rollout.turns]
    finished = rollout.status == "ok" and bool(turns)
    answer = find_answer(turns[-1]) if finished else None
    short = answer is None or len(answer) <= MAX_ANSWER
    rollout.answer = answer if short else None
    truths = (rollout.question.answer, *rollout.question.also)
    rollout.correct = any(matches(rollout.answer, truth) for truth in truths)
    rollout.formatted = finished and short and is_formatted(turns)


def answered(question: Question, answer: str | None) -> Answered:
    """A question and an answer to it as a grader takes them."""
    return Answered(
        question.text,
        (question.answer, *question.also),
        answer,
        question.images,
        question.options or None,
        question.id,
        question.extra.get("decimals"),
    )


async def grade(rollouts: Sequence[Rollout], grader: Grader) -> None:
    """Puts a grader's word in place of `matches`, for scored rollouts that ended by themselves.
    What nobody could judge becomes unscored. Raises JudgeDown, after all are graded, and
    TrainingError where the grader's function is of no use."""
    ended = [rollout for rollout in rollouts if rollout.status == "ok"]
    if grader.function is not None:
        # In a thread: it is the user's own, and may take its time.
        await asyncio.to_thread(_grade_by_function, ended, grader, grader.function)
        return
    items = [answered(rollout.question, rollout.answer) for rollout in ended]
    grades = await asyncio.gather(*map(grader.grade, items))
    for rollout, one in zip(ended, grades, strict=True):
        rollout.correct = one.correct
        if not one.scored:
            rollout.status = "unscored"
    if grader.judge is not None:
        grader.judge.check()


def _grade_by_function(
    rollouts: Sequence[Rollout], grader: Grader, function: RewardFunction
) -> None:
    rewards = function([row_of(rollout) for rollout in rollouts])
    for rollout, reward in zip(rollouts, rewards, strict=True):
        rollout.score = reward.value
        rollout.correct = reward.value is not None and reward.value >= grader.correct_at - _ROUNDING
        if reward.value is None:
            rollout.status = "unscored"
            grader.counts[f"function unscored: {reward.cause}"] += 1
        else:
            grader.counts[f"function {'correct' if rollout.correct else 'incorrect'}"] += 1
    function.check()
