"""What a stage of a curation is, and those that need no model.

A stage finds a JSON value for every row, which the journal keeps, and tells from that value alone
whether the row is dropped: so a run that is resumed comes to the same verdicts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from trainer.curate.execute import Tolerance, Unavailable, execute
from trainer.curate.looks import Look, look
from trainer.curate.rows import Row, known_answer, question_of
from trainer.curate.rules import read
from trainer.curate.texts import said
from trainer.curate.verdicts import Drop, drop_of
from trainer.data import BadRow, Conversation, Example
from trainer.loop import Loop, all_done
from trainer.tools import Toolbox
from trainer.verify import verify


class Stopped(Exception):
    """The run is to end; what was found is in the journal."""


@dataclass
class Work:
    """What a stage is given to do its work with."""

    loop: Loop
    stopping: Callable[[], bool]
    put: Callable[[Row, Any], None]
    """Takes the value of a row."""
    lost: Callable[[Row, str], None]
    """Takes why nobody could say anything of a row."""
    earlier: Callable[[str, Row], Any] = lambda stage, row: None
    """The value that an earlier stage found, or None."""
    spent: dict[str, str] = field(default_factory=dict)
    """What is shown beside the progress bar."""

    def check(self) -> None:
        if self.stopping():
            raise Stopped

    def every(self, rows: Iterable[Row], one: Callable[[Row], Awaitable[None]], width: int) -> None:
        """`one` for every row, `width` at a time; as many rows are in memory. Raises Stopped."""
        shared = iter(rows)

        async def worker() -> None:
            for row in shared:
                await one(row)

        self.loop.run(all_done((worker() for _ in range(width)), self.stopping))
        self.check()


class Stage(Protocol):
    name: str
    settings: Any
    """JSON: with other ones it would find other values."""
    group: int
    """Rows that are asked for together: a value may depend on the others in its last digits."""

    def find(self, rows: Iterable[Row], work: Work) -> None:
        """Hands every row's value to `work.put`, or the row to `work.lost`. Raises Stopped."""

    def verdict(self, value: Any) -> Drop | None: ...


class Reading:
    """The first stage: decodes every picture, keeps how the question's look, and reads.

    Its value is {"bad": [reason, detail]} for a picture that cannot be decoded, else {"drop",
    "looks"}.
    """

    name = "rules"
    group = 1

    def __init__(self, *, bits: int, grey: float, max_answer: int):
        self.settings = [3, bits, grey, max_answer]
        self.bits, self.grey, self.max_answer = bits, grey, max_answer

    def find(self, rows: Iterable[Row], work: Work) -> None:
        async def one(row: Row) -> None:
            try:
                looks = await asyncio.to_thread(_looks, row.item)
            except BadRow as bad:
                work.put(row, {"bad": [bad.reason, bad.detail]})
            else:
                # Here: it would hold the interpreter's lock in the thread as well.
                work.put(row, self.value(row.item, looks))

        work.every(rows, one, 2 * (os.cpu_count() or 1))

    def value(self, item: Conversation | Example, looks: list[Look]) -> dict[str, Any]:
        if isinstance(item, Conversation):
            drop = read(item, looks, self.bits, self.grey)
            asked = next(message for message in item.messages if message.speaker == "question")
            looks = [looks[number] for number in asked.shown]
        else:
            drop = self._unverifiable(item)
        return {"drop": drop and drop.to_json(), "looks": [one.to_json() for one in looks]}

    def _unverifiable(self, example: Example) -> Drop | None:
        answer = example.answer
        if len(answer) > self.max_answer:
            return Drop(
                "unverifiable",
                f"the known answer has {len(answer):,} characters, at most {self.max_answer}",
            )
        letters = [str(letter) for letter in example.options]
        if letters and len(answer) == 1 and answer.isupper() and answer not in letters:
            return Drop("unverifiable", f"{answer!r} is none of the options {', '.join(letters)}")
        return None

    def verdict(self, value: dict[str, Any]) -> Drop | None:
        return drop_of(value.get("drop"))


def _looks(item: Conversation | Example) -> list[Look]:
    return [look(picture.open()) for picture in item.pictures]


class Execution:
    name = "execute"
    group = 1

    def __init__(self, toolbox: Toolbox, tolerance: Tolerance, sessions: int, tools: str):
        """tools: what the journal knows the toolbox by."""
        self.toolbox, self.tolerance, self.sessions = toolbox, tolerance, sessions
        self.settings = [1, tools, [schema["function"]["name"] for schema in toolbox.schemas()]]
        self.settings += [tolerance.number, tolerance.bits, tolerance.grey]
        self.settings += [tolerance.recovered, sorted(tolerance.trusted)]

    def find(self, rows: Iterable[Row], work: Work) -> None:
        async def one(row: Row) -> None:
            assert isinstance(row.item, Conversation)
            try:
                drop = await execute(row.item, self.toolbox, self.tolerance)
            except Unavailable as error:
                work.lost(row, str(error))
            else:
                work.put(row, drop and drop.to_json())

        work.every(rows, one, self.sessions)

    def verdict(self, value: list[str] | None) -> Drop | None:
        return drop_of(value)


class Answer:
    """The answer against the known one, where the row tells it. What no rule decides stays."""

    name = "answer"
    group = 1
    settings = [1]

    def find(self, rows: Iterable[Row], work: Work) -> None:
        async def one(row: Row) -> None:
            work.put(row, await asyncio.to_thread(self.value, row))

        work.every(rows, one, 2)

    def value(self, row: Row) -> list[str] | None:
        assert isinstance(row.item, Conversation)
        known, answer = known_answer(row.item), row.item.answer
        if known is None:
            return None
        verdict = verify(answer, known, question=question_of(row.item).text)
        if verdict.outcome != "incorrect":
            return None
        detail = f"answered {said(answer or '')[:80]!r}, known is {said(known)[:80]!r}"
        return Drop("wrong_answer", f"{detail} ({verdict.rule})").to_json()

    def verdict(self, value: list[str] | None) -> Drop | None:
        return drop_of(value)
