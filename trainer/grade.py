"""Is an answer right? Rules first (`verify`), a judge where none decides, a journal of both.

A rule's verdict is final. A share of what rules decide can be sent to the judge all the same: that
changes no grade, but the journal then says how often the two disagree, by rule.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from trainer.judge import Case, Judge
from trainer.reward_functions import RewardFunction
from trainer.verify import MATH_SECONDS, MAX_ANSWER, RuleVerdict, truth_texts, verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answered:
    """A question with what is right and what was answered."""

    question: str
    truths: Any
    """A text or number, or several of which any will do."""
    answer: str | None
    images: tuple[Image, ...] = ()
    options: Mapping[str, str] | Sequence[str] | None = None
    id: str = ""
    """For the journal."""
    decimals: int | None = None
    """To how many the truth is rounded, where the data says so."""


@dataclass(frozen=True)
class Grade:
    scored: bool
    """False: nobody could say. The rollout is `unscored`; its reward is none, and not 0."""
    correct: bool
    by: str
    """"rule:<name>", "judge", or "no judge" for what was undecided and counts as wrong because no
    judge is set up."""
    reason: str = ""


class Grader:
    """Grades answers; `grade_all` raises JudgeDown once the judge left too many unscored.

    judge: None: what no rule decides is wrong. audit: share of the rule-decided answers that the
    judge (or the auditor, a second one that rewards never see) is asked about as well; which ones
    is a pure function of the answer and the seed. journal: a JSONL file, one line an answer that a
    judge was asked about; see `journal_counts`. rtol: see `verify`. function: a reward function of
    a user's, which then grades rollouts in the place of all this (`trainer.reward.grade`); from
    correct_at on its number means right.

    `counts`: grades by "rule correct", "rule incorrect", "judge correct", "judge incorrect",
    "unscored", "no judge", those of a function by "function correct", "function incorrect",
    "function unscored: <why>"; audits by "audit agree", "audit disagree", "audit unscored".
    """

    def __init__(
        self,
        judge: Judge | None = None,
        *,
        audit: float = 0.0,
        auditor: Judge | None = None,
        journal: str | Path | None = None,
        rtol: float | None = None,
        max_answer: int = MAX_ANSWER,
        math_seconds: float = MATH_SECONDS,
        seed: int = 0,
        function: RewardFunction | None = None,
        correct_at: float = 1.0,
    ):
        if not 0 <= audit <= 1:
            raise ValueError(f"audit is a share of answers and must be in [0, 1], got {audit}")
        if audit and (auditor or judge) is None:
            raise ValueError("an audit needs a judge or an auditor")
        self.judge = judge
        self.function, self.correct_at = function, correct_at
        self.auditor = auditor or judge
        self.audit = audit
        self.journal = None if journal is None else Path(journal)
        self.counts: Counter[str] = Counter()
        self._rule = {"rtol": rtol, "max_answer": max_answer, "math_seconds": math_seconds}
        self._seed = seed
        self._complained = False

    async def grade(self, item: Answered) -> Grade:
        """One grade. Never raises for an answer, a server or a full disk."""
        # In a thread: an expression may take as long as math_seconds.
        verdict = await asyncio.to_thread(
            verify,
            item.answer,
            item.truths,
            question=item.question,
            options=item.options,
            decimals=item.decimals,
            **self._rule,
        )
        if verdict.decided:
            self.counts[f"rule {verdict.outcome}"] += 1
            if self.audit and self._drawn(item):
                await self._audit(item, verdict)
            return Grade(True, verdict.outcome == "correct", f"rule:{verdict.rule}")
        if self.judge is None:
            self.counts["no judge"] += 1
            return Grade(True, False, "no judge", f"rule:{verdict.rule}")
        judgement = await self.judge.judge(_case(item))
        self._write(item, verdict, self.judge, judgement.verdict, judgement.reason)
        if judgement.verdict == "unscored":
            self.counts["unscored"] += 1
            return Grade(False, False, "judge", judgement.reason)
        self.counts[f"judge {judgement.verdict}"] += 1
        return Grade(True, judgement.verdict == "correct", "judge", judgement.reason)

    async def grade_all(self, items: Sequence[Answered]) -> list[Grade]:
        """Every grade, in order; then JudgeDown where the judge is: all are counted before."""
        grades = list(await asyncio.gather(*map(self.grade, items)))
        if self.judge is not None:
            self.judge.check()
        return grades

    async def close(self) -> None:
        for judge in {id(j): j for j in (self.judge, self.auditor) if j is not None}.values():
            await judge.close()

    def _drawn(self, item: Answered) -> bool:
        key = json.dumps([self._seed, item.question, truth_texts(item.truths), item.answer])
        number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big")
        return number < self.audit * 2**64

    async def _audit(self, item: Answered, verdict: RuleVerdict) -> None:
        assert self.auditor is not None
        judgement = await self.auditor.judge(_case(item), audit=True)
        if judgement.verdict == "unscored":
            self.counts["audit unscored"] += 1
        else:
            agree = judgement.verdict == verdict.outcome
            self.counts["audit agree" if agree else "audit disagree"] += 1
        self._write(item, verdict, self.auditor, judgement.verdict, judgement.reason)

    def _write(
        self, item: Answered, verdict: RuleVerdict, judge: Judge, judged: str, reason: str
    ) -> None:
        if self.journal is None:
            return
        agree = None
        if verdict.decided and judged != "unscored":
            agree = judged == verdict.outcome
        record = {
            "id": item.id,
            "rule": verdict.rule,
            "rule_outcome": verdict.outcome,
            "judge_outcome": judged,
            "agree": agree,
            "model": judge.client.model,
            "question": item.question[:1_000],
            "truths": [text[:1_000] for text in truth_texts(item.truths)],
            "answer": None if item.answer is None else str(item.answer)[:1_000],
            "reason": reason,
        }
        try:
            descriptor = os.open(
                self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644
            )
            try:  # one write a line: several processes may share the file
                os.write(descriptor, json.dumps(record).encode("ascii") + b"\n")
            finally:
                os.close(descriptor)
        except OSError as error:
            if not self._complained:
                self._complained = True
                log.warning("the journal of verdicts %s cannot be written: %s", self.journal, error)


def _case(item: Answered) -> Case:
    answer = "" if item.answer is None else str(item.answer)
    return Case(item.question, tuple(truth_texts(item.truths)), answer, item.images)


def journal_counts(journal: str | Path) -> dict[str, dict[str, int]]:
    """rule -> how often the judge agreed, disagreed, could not say ("unscored"), and was the only
    one to decide ("judged"). Lines that are not whole are skipped."""
    counts: dict[str, Counter[str]] = {}
    with open(journal, encoding="ascii", errors="replace") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                rule, agree, judged = record["rule"], record["agree"], record["judge_outcome"]
            except (ValueError, KeyError, TypeError):
                continue
            if judged == "unscored":
                name = "unscored"
            elif agree is None:
                name = "judged"
            else:
                name = "agree" if agree else "disagree"
            counts.setdefault(rule, Counter())[name] += 1
    return {rule: dict(found) for rule, found in sorted(counts.items())}
