"""A task from files: questions with known answers, and perhaps recorded trajectories to begin with.

    load_task("file", paths="metis-rl/", demonstrations="metis-coldstart/")

The held-out questions are files of their own or, without any, those whose id's hash falls into the
lowest `heldout_share`: the same ones for every seed, order of rows and machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from trainer.chat import find_call
from trainer.data import (
    BadRow,
    Checks,
    Conversation,
    DataError,
    Dataset,
    Example,
    RowSet,
    permute,
)
from trainer.rollout import Recorded
from trainer.tools import PythonTool, Toolbox
from trainer.types import Observation, Question, Rollout, Turn

Paths = str | Path | Sequence[str | Path]
_ATTEMPTS = 100
"""Rows tried in place of one whose pictures turn out to be damaged."""


@dataclass
class Replay:
    """Plays the policy's recorded turns; the tools answer anew."""

    turns: Sequence[str]

    def __post_init__(self) -> None:
        self._left = iter(self.turns)

    def next_turn(self, observation: Observation | None) -> list[tuple[str, bool]]:
        return [(next(self._left), True)]


class Demonstrations:
    """Recorded conversations, for a cold start.

    observations: executed, their calls are made anew; recorded, what the files say came back is
    shown, and no tool runs. settings: as of Dataset. Files are opened when they are asked for.
    """

    def __init__(
        self,
        paths: Paths,
        *,
        observations: Literal["executed", "recorded"] = "executed",
        **settings: Any,
    ):
        self._paths, self._settings = paths, settings
        self._recorded = observations == "recorded"
        self.data: Dataset | None = None

    def demonstrations(
        self, seed: int, count: int, direct_share: float
    ) -> tuple[list[Question], Sequence[Replay | Recorded]]:
        """Up to `count` trajectories, each once. direct_share is not heeded: what the recorded
        policy did is what is shown. Raises DataError for files that cannot be used."""
        if self.data is None:
            self.data = _open(self._paths, "conversations", **self._settings)
        read = _recorded if self._recorded else _replay
        pairs = list(itertools.islice(_scripts(self.data, seed, read), count))
        if not pairs:
            raise DataError(f"no conversation can be played again:\n{self.data.summary()}")
        questions, scripts = zip(*pairs, strict=True)
        return list(questions), list(scripts)

    @property
    def unplayable(self) -> Mapping[str, int]:
        return {} if self.data is None else self.data.rejections.counts

    def fault(self, rollout: Rollout) -> str | None:
        """A recording is learnt from as far as it goes, whatever is wrong with it; what was
        executed, where it ends in an answer and keeps the format."""
        if self._recorded:
            return None if any(rollout.policy) else "too_long"
        if rollout.status != "ok":
            return rollout.status
        return None if rollout.formatted else "format"


class FileTask:
    name = "file"

    def __init__(
        self,
        paths: Paths,
        *,
        heldout: Paths | None = None,
        heldout_share: float = 0.05,
        demonstrations: Paths | None = None,
        observations: Literal["executed", "recorded"] = "executed",
        layout: str | None = None,
        checks: Checks | None = None,
        cache_bytes: int = 256 * 2**20,
        folder: str | Path | None = None,
        tools: Callable[[], Toolbox] | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        """paths, heldout: questions; demonstrations: conversations, for the cold start.
        observations: see Demonstrations. layout is that of the questions; see Dataset for checks,
        cache_bytes, folder and progress. tools: makes the toolbox (None: the python tool alone).

        Raises DataError (a ValueError) for files that cannot be used.
        """
        settings = {
            "checks": checks,
            "cache_bytes": cache_bytes,
            "folder": folder,
            "progress": progress,
        }
        self.data: Dataset = _open(paths, "questions", layout=layout, **settings)
        self.heldout_data: Dataset = self.data
        self._rows: RowSet
        if heldout is None:
            self._rows, self._heldout = self.data.split(heldout_share)
        else:
            self.heldout_data = _open(heldout, "questions", layout=layout, **settings)
            self._rows = self.data.without(self.heldout_data)
            good = np.flatnonzero(self.heldout_data.good.members())
            self._heldout = good[np.argsort(self.heldout_data.hash[good], kind="stable")]
        if not len(self._rows):
            raise DataError(f"no question is left to train on:\n{self.data.summary()}")
        self._demonstrations: Demonstrations | None = None
        if demonstrations is not None:
            self._demonstrations = Demonstrations(
                demonstrations, observations=observations, **settings
            )
        self._tools = tools

    @property
    def base(self) -> Path:
        raise ValueError("a task from files brings no model: set model.path to a folder or a name")

    @property
    def kinds(self) -> Sequence[str]:
        return sorted({*self.data.kinds, *self.heldout_data.kinds})

    def __len__(self) -> int:
        """Training questions in an epoch."""
        return len(self._rows)

    def train(self, seed: int, start: int, count: int) -> list[Question]:
        """Questions start .. start + count - 1 of a stream of epochs, each in an order of its own:
        a function of the files, seed and number alone. A row whose pictures turn out to be damaged
        is noted in `data.rejections`, and another one, as random, takes its place."""
        return [self._draw(seed, number) for number in range(start, start + count)]

    def _draw(self, seed: int, number: int) -> Question:
        epoch, index = divmod(number, len(self._rows))
        for attempt in range(_ATTEMPTS):
            row = self._rows[permute(index, len(self._rows), seed, epoch, attempt)]
            question = _question(self.data, row)
            if question is not None:
                return question
        raise DataError(f"{_ATTEMPTS} damaged rows in a row:\n{self.data.summary()}")

    def heldout(self, count: int) -> list[Question]:
        """Of each kind its share of the held-out questions, at least one, those of lowest hash."""
        if not len(self._heldout):
            raise DataError(
                "no question is held out: name files for it, or a larger held-out share than of "
                f"{len(self.data)} questions none"
            )
        data = self.heldout_data
        kinds = data.kind[self._heldout]
        questions = []
        for name in sorted(data.kinds):
            rows = self._heldout[kinds == data.kinds.index(name)]
            quota = max(1, round(count * len(rows) / len(self._heldout)))
            good = (_question(data, row) for row in rows.tolist())
            questions += itertools.islice((q for q in good if q is not None), quota)
        return questions

    def summary(self) -> str:
        """What was read, and what of it is not used and why."""
        named = {
            "questions": self.data,
            "held out": self.heldout_data,
            "demonstrations": self._demonstrations and self._demonstrations.data,
        }
        if self.heldout_data is self.data:
            del named["held out"]
        counts = f"{len(self._rows):,} questions to train on, {len(self._heldout):,} held out"
        read = [f"{name}: {data.summary()}" for name, data in named.items() if data is not None]
        return "\n".join([counts, *read])

    def toolbox(self) -> Toolbox:
        return self._tools() if self._tools else Toolbox([PythonTool()])

    def demonstrations(
        self, seed: int, count: int, direct_share: float
    ) -> tuple[list[Question], Sequence[Replay | Recorded]]:
        """See Demonstrations."""
        if self._demonstrations is None:
            raise DataError(
                "a cold start needs recorded trajectories: name files of conversations as "
                "demonstrations"
            )
        return self._demonstrations.demonstrations(seed, count, direct_share)

    @property
    def unplayable(self) -> Mapping[str, int]:
        return {} if self._demonstrations is None else self._demonstrations.unplayable

    def fault(self, rollout: Rollout) -> str | None:
        return None if self._demonstrations is None else self._demonstrations.fault(rollout)


def _open(paths: Paths, yields: str, **settings) -> Dataset:
    data = Dataset(paths, **settings)
    if data.yields != yields:
        raise DataError(
            f"{data.sources[0].path} holds {data.yields} (layout {data.layouts[0].name}) where "
            f"{yields} are wanted"
        )
    return data


def _question(data: Dataset, row: int) -> Question | None:
    """None for a row that cannot be used; it is noted once."""
    if row in data.damaged:
        return None
    try:
        example = data[row]
        assert isinstance(example, Example)
        return example.question()
    except BadRow as bad:
        data.damaged.add(row)
        data.reject(row, bad)
        return None


def _scripts(
    data: Dataset,
    seed: int,
    read: Callable[[Conversation], tuple[Question, Replay | Recorded]],
) -> Iterator[tuple[Question, Replay | Recorded]]:
    """Every conversation that can be read so, in an order that is the seed's; others are noted."""
    for index in range(len(data)):
        row = data.good[permute(index, len(data), seed)]
        try:
            conversation = data[row]
            assert isinstance(conversation, Conversation)
            yield read(conversation)
        except BadRow as bad:
            if row not in data.damaged:
                data.damaged.add(row)
                data.reject(row, bad)


def _replay(conversation: Conversation) -> tuple[Question, Replay]:
    turns = [turn.text for turn in conversation.turns]
    if [find_call(text) is not None for text in turns] != [True] * (len(turns) - 1) + [False]:
        raise BadRow("unsupported", "turns that are not calls and then an answer")
    return conversation.example().question(), Replay(turns)


def _recorded(conversation: Conversation) -> tuple[Question, Recorded]:
    """Of an observation its text comes first and then its pictures, as of those of our tools."""
    turns = []
    for turn in conversation.turns:
        told = turn.observation
        if told is not None:
            images = tuple(conversation.pictures[n].open() for n in told.shown)
            told = Observation(told.text, images)
        turns.append(Turn(turn.text, None, told))
    return conversation.example(answered=False).question(), Recorded(turns)
