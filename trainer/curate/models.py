"""The stages that ask a model or a judge."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from trainer.chat import attempts_call
from trainer.curate.rows import Row, known_answer, question_of
from trainer.curate.rubric import DIMENSIONS, RubricJudge, review_of
from trainer.curate.stages import Stopped, Work
from trainer.curate.verdicts import Drop
from trainer.data import BadRow, Conversation, Example
from trainer.judge import Case, Judge
from trainer.types import Mode, Question, Rollout
from trainer.verify import verify

if TYPE_CHECKING:  # it loads transformers, which a server's model does not need
    from trainer.agents import Agent


class _Asking:
    """Plays the questions of some rows at a time."""

    group = 1

    def __init__(self, agent: Agent, mode: Mode):
        self.agent, self.mode = agent, mode
        self.tokens = 0

    def find(self, rows: Iterable[Row], work: Work) -> None:
        rows = iter(rows)
        while some := list(islice(rows, self.group)):
            work.check()
            try:
                self._find(some, work)
            except KeyboardInterrupt:
                raise Stopped from None

    def _find(self, rows: Sequence[Row], work: Work) -> None:
        raise NotImplementedError

    def _play(
        self, questions: Sequence[Question], seeds: Sequence[int], work: Work
    ) -> list[Rollout]:
        rollouts = self.agent.play(questions, seeds, mode=self.mode, stopping=work.stopping)
        self.tokens += sum(sum(_tokens(rollout)) for rollout in rollouts)
        work.spent["tokens"] = f"{self.tokens:,}"
        return rollouts


def _tokens(rollout: Rollout) -> tuple[int, int]:
    return rollout.prompt_tokens, rollout.sampled_tokens


class Solvable(_Asking):
    """Does the model answer without tools what a trajectory calls one for? Drawn one after another,
    and no more than it takes to tell: a wrong one at once tells that not all are right.

    Its value is {"right", "drawn", "tokens"}, or null for a trajectory that calls nothing.
    """

    name = "solvable"

    def __init__(self, agent: Agent, k: int, at: float, settings: Any):
        """settings: by what the journal knows how the model is asked."""
        super().__init__(agent, "direct")
        self.k, self.needed = k, math.ceil(at * k - 1e-9)
        self.group = max(1, agent.batch)
        self.settings = [1, agent.name, k, self.needed, settings]

    def _find(self, rows: Sequence[Row], work: Work) -> None:
        found: dict[int, dict[str, Any]] = {}
        questions: dict[int, Question] = {}
        for row in rows:
            if _calls(row.item):
                found[row.number] = {"right": 0, "drawn": 0, "tokens": [0, 0]}
                questions[row.number] = question_of(row.item).question()
            else:
                work.put(row, None)
        asked = [row for row in rows if row.number in found]
        failed: dict[int, str] = {}
        for draw in range(self.k):
            active = [r for r in asked if r.number not in failed and self._open(found[r.number])]
            if not active:
                break
            asking = [questions[row.number] for row in active]
            rollouts = self._play(asking, [(row.seed + draw) % 2**31 for row in active], work)
            for row, rollout in zip(active, rollouts, strict=True):
                if rollout.scored:
                    _count(found[row.number], rollout)
                else:
                    failed[row.number] = f"sample {draw + 1} is {rollout.status}"
        for row in asked:
            if row.number in failed:
                work.lost(row, failed[row.number])
            else:
                work.put(row, found[row.number])

    def _open(self, value: dict[str, Any]) -> bool:
        right, wrong = value["right"], value["drawn"] - value["right"]
        return right < self.needed and wrong <= self.k - self.needed

    def verdict(self, value: dict[str, Any] | None) -> Drop | None:
        if value is None or value["right"] < self.needed:
            return None
        return Drop(
            "solvable", f"{value['right']} of {value['drawn']} samples without tools are right"
        )


def _count(value: dict[str, Any], rollout: Rollout) -> None:
    value["drawn"] += 1
    value["right"] += rollout.correct
    value["tokens"] = [a + b for a, b in zip(value["tokens"], _tokens(rollout), strict=True)]


def _calls(item: Conversation | Example) -> bool:
    return isinstance(item, Conversation) and any(attempts_call(t.text) for t in item.turns)


class PassRate(_Asking):
    """How often the model, with its tools, is right: a group of equal rewards teaches nothing.

    Its value is {"right", "drawn", "calls", "tokens", "answers": [[answer, correct, times], ...]}.
    """

    name = "pass_rate"

    def __init__(self, agent: Agent, samples: int, low: float, high: float, settings: Any):
        super().__init__(agent, "allowed")
        self.samples, self.low, self.high = samples, low, high
        self.group = max(1, agent.batch // samples)
        self.settings = [1, agent.name, samples, settings]

    def _find(self, rows: Sequence[Row], work: Work) -> None:
        questions = [question_of(row.item).question() for row in rows]
        rollouts = self._play(
            [question for question in questions for _ in range(self.samples)],
            [(row.seed + draw) % 2**31 for row in rows for draw in range(self.samples)],
            work,
        )
        for n, row in enumerate(rows):
            group = rollouts[n * self.samples : (n + 1) * self.samples]
            scored = [rollout for rollout in group if rollout.scored]
            if len(scored) < len(group):
                status = next(rollout.status for rollout in group if not rollout.scored)
                work.lost(row, f"{len(group) - len(scored)} of {len(group)} samples are {status}")
                continue
            answers = Counter((one.answer, one.correct) for one in scored if one.answer)
            pairs = list(map(_tokens, scored))
            work.put(
                row,
                {
                    "right": sum(rollout.correct for rollout in scored),
                    "drawn": len(scored),
                    "calls": sum(rollout.calls for rollout in scored),
                    "tokens": [sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)],
                    "answers": [[*pair, count] for pair, count in answers.most_common()],
                },
            )

    def verdict(self, value: dict[str, Any]) -> Drop | None:
        right, drawn = value["right"], value["drawn"]
        detail = f"{right} of {drawn} samples are right"
        if right == drawn:
            return Drop("all_right", detail)
        if right == 0:
            return Drop("all_wrong", detail)
        if not self.low <= right / drawn <= self.high:
            return Drop("pass_rate", f"{detail}; kept are {self.low:g} to {self.high:g}")
        return None


# --- Judges ---------------------------------------------------------------------------------------


class _Judging:
    """Asks a judge about one row after another, as many at a time as its client may."""

    group = 1

    def __init__(self, judge: Judge):
        self.judge = judge

    def find(self, rows: Iterable[Row], work: Work) -> None:
        async def one(row: Row) -> None:
            await self._one(row, work)
            work.spent["tokens"] = f"{self.judge.client.budget.tokens:,}"
            self.judge.check()

        work.every(rows, one, self.judge.client.concurrency)

    async def _one(self, row: Row, work: Work) -> None:
        raise NotImplementedError


class Review(_Judging):
    """Is the use of tools strategic? A trajectory that calls nothing is not asked about.

    Its value is [verdict, reason], or null.
    """

    name = "judge"

    def __init__(self, judge: RubricJudge):
        super().__init__(judge)
        self.settings = [1, judge.client.model, judge.rubric, judge.images]

    async def _one(self, row: Row, work: Work) -> None:
        assert isinstance(row.item, Conversation)
        if not _calls(row.item):
            work.put(row, None)
            return
        try:
            case = await asyncio.to_thread(
                review_of, row.item, known_answer(row.item), images=self.judge.images
            )
        except BadRow as bad:
            work.lost(row, bad.detail)
            return
        judgement = await self.judge.judge(case)
        if judgement.verdict == "unscored":
            work.lost(row, judgement.reason)
        else:
            work.put(row, [judgement.verdict, judgement.reason])

    def verdict(self, value: list[str] | None) -> Drop | None:
        if value is None or value[0] == "correct":
            return None
        dimensions = value[1].partition(":")[0].split(", ")
        reason = next((name for name in DIMENSIONS if name in dimensions), DIMENSIONS[-1])
        return Drop(reason, value[1])


class Ambiguity(_Judging):
    """Do judge and rules agree on the answers that were given? Those most often given are asked
    about, of which a rule decides. Needs the answers of PassRate.

    Its value is [[answer, the rule's word, the judge's word], ...] of those that differ.
    """

    name = "judge"

    def __init__(self, judge: Judge, audited: int, answers: Any):
        """answers: the settings of the stage that drew them."""
        super().__init__(judge)
        self.audited = audited
        self.settings = [1, judge.client.model, judge.rubric, judge.images, audited, answers]

    async def _one(self, row: Row, work: Work) -> None:
        assert isinstance(row.item, Example)
        example, differing = row.item, []
        drawn = work.earlier("pass_rate", row)
        decided = await asyncio.to_thread(lambda: list(self._decided(example, drawn)))
        for answer, rule in decided[: self.audited]:
            images = (
                await asyncio.to_thread(lambda: example.question().images)
                if self.judge.images
                else ()
            )
            truths = (example.answer, *example.also)
            judgement = await self.judge.judge(Case(example.text, truths, answer, images))
            if judgement.verdict == "unscored":
                work.lost(row, judgement.reason)
                return
            if judgement.verdict != rule:
                differing.append([answer[:200], rule, judgement.verdict])
        work.put(row, differing)

    @staticmethod
    def _decided(example: Example, drawn: dict[str, Any]) -> Iterator[tuple[str, str]]:
        """(answer, the rule's word) of the answers that a rule decides, the most frequent first."""
        for answer, _, _ in drawn["answers"]:
            verdict = verify(
                answer,
                (example.answer, *example.also),
                question=example.text,
                options=example.options or None,
            )
            if verdict.decided and verdict.rule != "exact":
                yield answer, verdict.outcome

    def verdict(self, value: list[list[str]]) -> Drop | None:
        if not value:
            return None
        answer, rule, judged = value[0]
        return Drop("ambiguous", f"{answer!r} is {rule} by rule, {judged} by the judge")
