"""A curation, from its rows to what becomes of each.

Cheap stages come first, and a row that one of them drops costs the later ones nothing. What
becomes of a row follows from the journal alone, in the order of the rows: whoever kills a run and
starts it again gets the same.

A duplicate is one of a row that is *kept*, which is known at the end alone. So a row that nearly is
an earlier one waits; where that one is dropped after all, it takes its place in a further round.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.curate.duplicates import Asked, Kept, Match, find_duplicates
from trainer.curate.journal import Journal
from trainer.curate.looks import Look
from trainer.curate.rows import Row, chosen_rows, good_rows, question_of
from trainer.curate.stages import Stage, Work
from trainer.curate.verdicts import Drop
from trainer.data import Dataset
from trainer.interrupt import never
from trainer.json_cache import content_key
from trainer.log import Progress, RunLog
from trainer.loop import Loop
from trainer.types import TrainingError

FEW = 20
"""Rows of a stage before the share of those that nobody could say anything of is looked at."""


class Paused(TrainingError):
    """Of too many rows nobody could say anything: the run ends, to be run again."""

    exit_code = 75


@dataclass(frozen=True)
class Plan:
    """What is done to the rows."""

    reading: Stage
    later: Sequence[Stage]
    """In their order, behind reading and duplicates."""
    rules: bool = True
    """Whether what reading finds wrong is a reason."""
    duplicates: Callable[[], Kept] | None = None
    """Makes an empty set of kept rows; None: duplicates are not looked for."""
    balance: float | None = None
    max_unscored: float = 0.1
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Stages that do not run, and why."""

    @property
    def names(self) -> list[str]:
        """Of the stages that may drop a row, in their order."""
        names = ["rules"] * self.rules + ["duplicates"] * (self.duplicates is not None)
        names += [stage.name for stage in self.later]
        return names + ["balance"] * (self.balance is not None)


@dataclass(frozen=True)
class Fate:
    """What became of a row."""

    number: int
    id: str | None
    kind: str
    digest: str | None
    verdict: str
    """kept, dropped or bad."""
    stage: str = ""
    reason: str = ""
    detail: str = ""


class Curation:
    """`run` does the work; `fates` then holds what became of every row, in order."""

    def __init__(
        self,
        data: Dataset,
        plan: Plan,
        journal: Journal,
        log: RunLog,
        stopping: Callable[[], bool] = never,
    ):
        self.data, self.plan, self.journal, self.log = data, plan, journal, log
        self.stopping = stopping
        self.fates: list[Fate] = []
        self.values: dict[str, dict[int, Any]] = {}
        """Stage -> number of a row -> what was found."""
        self._digest: dict[int, str] = {}
        self._about: dict[int, tuple[str, str]] = {}
        """Number -> (id, kind)."""
        self._asked: dict[int, Asked] = {}
        self._duplicates: dict[int, Match] = {}
        self._drops: dict[int, tuple[str, Drop]] = {}
        """Number -> (stage, why)."""
        self._bad: dict[int, tuple[str, str]] = {}
        """Number -> (reason, detail)."""
        self._loop = Loop()

    def close(self, *used: Any) -> None:
        """Ends the loop, and before that whatever is used in it and has an async `close`."""
        for one in used:
            self._loop.run(one.close())
        self._loop.run(_threads_end())
        self._loop.close()

    def run(self) -> None:
        """Raises Stopped, Paused, and RunError for a disk that is full."""
        self._read()
        done: set[int] = set()
        while todo := [n for n in self._waiting() if n not in done]:
            done |= set(todo)
            for stage in self.plan.later:
                self._do(stage, [n for n in todo if n not in self._drops])
        if self.plan.balance is not None:
            self._balance(self.plan.balance)
        unseen = set(range(self.data.rows)) - set(self._about) - set(self._bad)
        assert not unseen, f"rows {sorted(unseen)[:5]} were neither read nor bad"
        self.fates = list(map(self._fate, range(self.data.rows)))

    def tokens(self) -> tuple[int, int]:
        """Tokens that the model read, and wrote, for the rows of this dataset."""
        spent = [
            value["tokens"]
            for values in self.values.values()
            for value in values.values()
            if isinstance(value, dict) and "tokens" in value
        ]
        return sum(pair[0] for pair in spent), sum(pair[1] for pair in spent)

    # ---- the stages ------------------------------------------------------------------------------

    def _read(self) -> None:
        """Hashes every row, and reads those that the journal does not know."""
        stage = self.plan.reading
        with self.log.progress(stage.name, total=len(self.data)) as bar:
            ledger = _Ledger(stage, self.journal, self._values(stage), bar)

            def unknown() -> Iterator[Row]:
                for row in good_rows(self.data):
                    if self.stopping():
                        return
                    self._note(row)
                    if not ledger.knows(row.number, row.digest):
                        yield row

            self._find(ledger, unknown(), len(self.data))
        self._bad = {one.row: (one.reason, one.detail) for one in self.data.rejections}
        for number, value in self._values(stage).items():
            if "bad" in value:
                self._bad[number] = tuple(value["bad"])
                continue
            looks = tuple(map(Look.from_json, value["looks"]))
            self._asked[number] = Asked(number, self._asked[number].text, looks)
            if self.plan.rules and (drop := stage.verdict(value)):
                self._drops[number] = stage.name, drop

    def _note(self, row: Row) -> None:
        self._digest[row.number] = row.digest
        self._about[row.number] = row.item.id, row.item.kind
        self._asked[row.number] = Asked(row.number, question_of(row.item).text, ())

    def _waiting(self) -> list[int]:
        """Rows that nothing has dropped and that are no duplicates of such, in order."""
        alive = [n for n in self._asked if n not in self._drops and n not in self._bad]
        self._duplicates = {}
        if self.plan.duplicates is not None:
            rows = [self._asked[number] for number in alive]
            self._duplicates = find_duplicates(rows, self.plan.duplicates())
        return [number for number in alive if number not in self._duplicates]

    def _do(self, stage: Stage, numbers: Sequence[int]) -> None:
        """Finds a stage's values of these rows, as far as the journal does not know them; drops."""
        if not numbers:
            return
        with self.log.progress(stage.name, total=len(numbers)) as bar:
            ledger = _Ledger(stage, self.journal, self._values(stage), bar)
            known = [ledger.knows(number, self._digest[number]) for number in numbers]
            self._find(ledger, self._unknown(stage.group, numbers, known), len(numbers))
        for number in numbers:
            if number in ledger.lost:
                self._drops[number] = stage.name, Drop("unscored", ledger.lost[number])
            elif drop := stage.verdict(ledger.values[number]):
                self._drops[number] = stage.name, drop

    def _unknown(self, size: int, numbers: Sequence[int], known: Sequence[bool]) -> Iterator[Row]:
        """The rows of every group of `size` of which not all are known: groups are the same ones
        whether a run was killed or not."""
        for start in range(0, len(numbers), size):
            group = slice(start, start + size)
            if not all(known[group]):
                yield from chosen_rows(self.data, numbers[group], self._digest)

    def _find(self, ledger: _Ledger, rows: Iterable[Row], total: int) -> None:
        def lose(row: Row, why: str) -> None:
            if row.number in ledger.values:  # known, and asked again together with its group
                return
            ledger.lost[row.number] = why
            seen = len(ledger.lost) + ledger.seen
            if seen >= FEW and len(ledger.lost) > self.plan.max_unscored * seen:
                raise self._paused(ledger)

        work = Work(self._loop, self.stopping, ledger.put, lose, self._earlier, ledger.spent)
        ledger.stage.find(rows, work)
        work.check()
        if len(ledger.lost) > self.plan.max_unscored * total:
            raise self._paused(ledger)

    def _paused(self, ledger: _Ledger) -> Paused:
        why = list(ledger.lost.values())[-1]
        return Paused(
            f"stage {ledger.stage.name}: of {len(ledger.lost)} rows nobody could say anything, "
            f"which is past curate.max_unscored ({self.plan.max_unscored:.0%}); the last reason: "
            f"{why}. Nothing was dropped for it. Mend it, and run the same command again to go on"
        )

    def _values(self, stage: Stage) -> dict[int, Any]:
        return self.values.setdefault(stage.name, {})

    def _earlier(self, stage: str, row: Row) -> Any:
        return self.values.get(stage, {}).get(row.number)

    def _balance(self, most: float) -> None:
        """No ability has more than `most` times its share among all rows, of those of which any is
        kept. What is over goes by the hash of its content, the highest first."""
        kept: dict[str, list[int]] = {}
        for number in self._waiting():
            kept.setdefault(self._about[number][1], []).append(number)
        rows = Counter(kind for _, kind in self._about.values())
        allowed = quotas(
            {kind: len(some) for kind, some in kept.items()}, {k: rows[k] for k in kept}, most
        )
        for kind, some in kept.items():
            some.sort(key=lambda number: (self._digest[number], number))
            for number in some[allowed[kind] :]:
                detail = f"{allowed[kind]} of {len(some)} rows of {kind} are kept"
                self._drops[number] = "balance", Drop("balance", detail)

    def _fate(self, number: int) -> Fate:
        id, kind = self._about.get(number, (None, ""))
        about = (number, id, kind, self._digest.get(number))
        if number in self._bad:
            return Fate(*about, "bad", "read", *self._bad[number])
        if number in self._drops:
            stage, drop = self._drops[number]
            return Fate(*about, "dropped", stage, drop.reason, drop.detail)
        if number in self._duplicates:
            detail = str(self._duplicates[number])
            return Fate(*about, "dropped", "duplicates", "duplicate", detail)
        return Fate(*about, "kept")


async def _threads_end() -> None:
    await asyncio.get_running_loop().shutdown_default_executor()


class _Ledger:
    """What a stage has found so far: in the journal, by row, and beside the progress bar."""

    def __init__(self, stage: Stage, journal: Journal, values: dict[int, Any], bar: Progress):
        self.stage, self.journal, self.values, self.bar = stage, journal, values, bar
        self.lost: dict[int, str] = {}
        self.spent: dict[str, str] = {}
        self.seen = self.fresh = self.dropped = 0
        self._prefix = content_key([stage.name, stage.settings])
        self._started = time.monotonic()

    def knows(self, number: int, digest: str) -> bool:
        key = self._key(digest)
        if key in self.journal:
            self._take(number, self.journal.get(key))
        return key in self.journal

    def put(self, row: Row, value: Any) -> None:
        self.journal.put(self._key(row.digest), self.stage.name, value)
        if row.number not in self.values:
            self.fresh += 1
            # The first value of a content stays, whichever of two equal rows it came from.
            self._take(row.number, self.journal.get(self._key(row.digest)))

    def _take(self, number: int, value: Any) -> None:
        self.values[number] = value
        self.seen += 1
        self.dropped += self.stage.verdict(value) is not None
        rate = self.fresh / max(time.monotonic() - self._started, 1e-9)
        self.bar.advance(dropped_share=self.dropped / self.seen, rows_per_second=rate, **self.spent)

    def _key(self, digest: str) -> str:
        return hashlib.sha256(f"{self._prefix} {digest}".encode()).hexdigest()


def quotas(kept: Mapping[str, int], rows: Mapping[str, int], most: float) -> dict[str, int]:
    """How many of each ability may stay, so that none has more than `most` times its share of rows.

    The largest that do: taking away from one raises the shares of the others, until nothing moves.
    """
    total = sum(rows.values())
    allowed = dict(kept)
    while True:
        stay = sum(allowed.values())
        limits = {kind: max(1, int(most * rows[kind] / total * stay)) for kind in allowed}
        cut = {kind: min(count, limits[kind]) for kind, count in allowed.items()}
        if cut == allowed:
            return allowed
        allowed = cut
