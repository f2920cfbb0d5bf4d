"""Raw tool trajectories of the glyphs world, as a careless pipeline leaves them: for curation.

    path = write_raw("raw/", seed=0, count=2_000)    # raw.jsonl; labels.jsonl says what is wrong

raw.jsonl has the layout of Metis-ColdStart: messages (a JSON string), images (base64), and besides
id, kind and extra_info {"seed", "answer"}. Calls were run by the task's real tools, in a session of
that seed, so running them again in such a session gives the recorded observation, failures of the
unreliable tools included. `answer` is the truth.

A sound trajectory calls where a tool is needed, calls again where the tool failed, answers what the
tool told, and now and then answers directly what needs no tool. An error that is mended by the next
call is sound.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from trainer.chat import (
    ANSWER_CLOSE,
    CALL_CLOSE,
    REASON_OPEN,
    attempts_call,
    call_text,
    system_prompt,
)
from trainer.data.layouts import PLACEHOLDER
from trainer.tasks.glyphs import scene, tools
from trainer.tasks.glyphs.demonstrations import Script, answer_text, call_for, first_thought, turn
from trainer.tasks.glyphs.questions import KINDS, Draft, draft
from trainer.tools import Toolbox
from trainer.types import Observation, Question, Session

FLAWS = {
    "execution_failure": 0.08,
    "mismatch": 0.08,
    "solvable": 0.10,
    "pointless": 0.08,
    "truncated": 0.06,
    "tool_answer": 0.05,
    "duplicate": 0.06,
}
"""Share of the rows that has each flaw; no row has two.

execution_failure  the last call raises or is malformed; the answer, a right one, heeds no error
mismatch           the recorded observation is not what the call gives (another text, another crop),
                   and the answer follows it and is wrong
solvable           a call for what the base model answers directly
pointless          besides the call that is needed: the same again, the whole picture, a literal, or
                   an expression that has nothing to do with the question
truncated          the last turn is cut within, or the last message is an observation
tool_answer        the last message is an observation, printed by a call, with an <answer> in it
                   (which our own toolbox would have broken up: recorded is what was printed)
duplicate          question and picture of an earlier sound row; the picture with slight noise, as
                   a JPEG
"""
DIRECT_SHARE = 0.06
"""Of the sound rows: answered directly, and needing no tool."""
_ROWS_AT_ONCE = 64
_STREAM, _RAW = 10_000_000, 7_000_000
"""Where in a seed's stream of questions these begin, apart from those of training."""
_MAX_EMBLEMS = 150
"""Emblems are few. One seen twice, in other noise, would be a duplicate that no label tells of."""
_IDLE = [name for name, kind in KINDS.items() if not kind.needs_tool]
_NEEDY = [name for name, kind in KINDS.items() if kind.needs_tool]

Turns = list[tuple[str, Observation | None]]


@dataclass(frozen=True)
class _Plan:
    """One row before it is played."""

    id: str
    draft: Draft
    flaw: str | None
    detail: str
    """Which variety of the flaw."""
    seed: int
    """Of the session."""
    script: Script | _Said
    rng: np.random.Generator


@dataclass
class _Said:
    """A policy that says these turns whatever comes back, and then nothing."""

    turns: Sequence[str]

    def __post_init__(self) -> None:
        self._left = iter(self.turns)

    def next_turn(self, observation: Observation | None) -> list[tuple[str, bool]]:
        return [(next(self._left, ""), True)]


def write_raw(
    folder: str | Path, seed: int, count: int, *, flaws: Mapping[str, float] | None = None
) -> Path:
    """Writes `count` rows to folder/raw.jsonl, and to folder/labels.jsonl, line for line,
    {"id", "flaw" (null for a sound row), "detail"} -> the path of raw.jsonl.

    A pure function of its arguments. flaws: shares of the rows (None: FLAWS), met up to rounding.
    Raises ValueError for a flaw that does not exist and for shares that leave no sound row.
    """
    flaws = FLAWS if flaws is None else flaws
    labels = _labels(seed, count, flaws)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "raw.jsonl"
    with ExitStack() as files:
        rows = files.enter_context(path.open("w"))
        about = files.enter_context((folder / "labels.jsonl").open("w"))
        for plan, row in _rows(_plans(seed, labels)):
            rows.write(json.dumps(row) + "\n")
            label = {"id": plan.id, "flaw": plan.flaw, "detail": plan.detail}
            about.write(json.dumps(label) + "\n")
    return path


def _labels(seed: int, count: int, flaws: Mapping[str, float]) -> list[str | None]:
    if unknown := set(flaws) - set(FLAWS):
        raise ValueError(f"there is no flaw {min(unknown)!r}; the flaws are: {', '.join(FLAWS)}")
    labels: list[str | None] = [
        name for name, share in flaws.items() for _ in range(round(share * count))
    ]
    if min(flaws.values(), default=0.0) < 0 or len(labels) >= count:
        raise ValueError(
            f"shares of flaws must not be negative and must leave a sound row of {count}, got "
            f"{dict(flaws)}"
        )
    labels += [None] * (count - len(labels))
    order = np.random.default_rng([seed, 0]).permutation(count - 1)
    return [None] + [labels[n] for n in order]  # the first one sound: what a duplicate is of


def _plans(seed: int, labels: Sequence[str | None]) -> Iterator[_Plan]:
    drafts = _Drafts(seed)
    sound: list[Draft] = []
    for number, flaw in enumerate(labels):
        rng = np.random.default_rng([seed, 1, number])
        direct = flaw is None and rng.random() < DIRECT_SHARE
        if flaw == "duplicate":
            original = sound[int(rng.integers(len(sound)))]
            one = replace(original, question=_copied(original.question, rng))
            direct = one.question.kind in _IDLE
        else:
            one = drafts.next(_IDLE if direct or flaw == "solvable" else _NEEDY, rng)
        if flaw is None:
            sound.append(one)
        detail, turns = _SAID[flaw](one, rng) if flaw in _SAID else ("", [])
        if flaw == "truncated":
            detail = str(rng.choice(["within_answer", "within_call", "no_turn"]))
        script = _Said(turns) if turns else Script(one, rng, direct)
        # What is spoilt must be known to be right before, and a mended failure is no flaw.
        mended = flaw in (None, "solvable", "duplicate")
        session = _seed(rng, 0 if mended else max(len(turns), 1))
        yield _Plan(f"raw/{seed}/{number}", one, flaw, detail, session, script, rng)


class _Drafts:
    """Questions of which no two are near-duplicates."""

    def __init__(self, seed: int):
        self.index = seed * _STREAM + _RAW
        self.emblems: set[Any] = set()

    def next(self, kinds: Sequence[str], rng: np.random.Generator) -> Draft:
        """The next question of one of these kinds, in the proportions of the mix."""
        if len(self.emblems) >= _MAX_EMBLEMS:
            kinds = [kind for kind in kinds if kind != "emblem"]
        shares = np.array([KINDS[kind].share for kind in kinds])
        kind = str(rng.choice(kinds, p=shares / shares.sum()))
        while True:
            one = draft("train", self.index, kind)
            self.index += 1
            if kind != "emblem":
                return one
            if one.fact not in self.emblems:
                self.emblems.add(one.fact)
                return one


def _copied(question: Question, rng: np.random.Generator) -> Question:
    """With its picture as it comes out of another pipeline."""
    pixels = np.asarray(question.images[0], float)
    noisy = (pixels + 3.0 * rng.standard_normal(pixels.shape)).clip(0, 255).astype(np.uint8)
    with Image.open(io.BytesIO(_encoded(Image.fromarray(noisy), "JPEG", quality=90))) as image:
        return replace(question, images=(image.convert("RGB"),))


def _seed(rng: np.random.Generator, calls: int) -> int:
    """A session's seed under which the first `calls` calls work; of 0: under which nothing
    misleads before something works, so that failures can be mended."""
    while True:
        seed = int(rng.integers(2**31))
        fates = [tools.fate(seed, call) for call in range(1, (calls or Script.max_calls) + 1)]
        if set(fates) == {"works"}:
            return seed
        if calls == 0 and "works" in fates and "misleads" not in fates[: fates.index("works")]:
            return seed


# ---- what a flawed policy says -------------------------------------------------------------------


def _thought(one: Draft, rng: np.random.Generator) -> str:
    question = one.question
    pieces = first_thought(question.kind, question.answer, Script(one, rng).guess)
    return "".join(text for text, _ in pieces)


def _acted(reason: str, action: str) -> str:
    return "".join(text for text, _ in turn([(reason, True)], action))


def _python(code: str) -> str:
    return call_text("python", {"code": code})


def _failing(one: Draft, rng: np.random.Generator) -> tuple[str, list[str]]:
    corners = ", ".join(map(str, scene.box(*map(int, rng.integers(0, scene.GRID, 2)))))
    name, arguments = call_for(one)
    wrong = call_text(name, {"text": "?"} | arguments)
    calls = {
        "raises": _python(f"image_1.crop({corners})"),
        "undefined": _python(f"picture.crop(({corners}))"),
        "syntax": _python(f"image_1.crop(({corners})"),
        "not_json": wrong.replace('"text": ', '"text" '),
        "wrong_argument": wrong,
        "no_such_tool": call_text("lookup", {"query": one.question.text}),
    }
    detail = str(rng.choice(list(calls)))
    answer = _acted("Now I know.", answer_text(one.question.answer))
    return detail, [_acted(_thought(one, rng), calls[detail]), answer]


def _pointless(one: Draft, rng: np.random.Generator) -> tuple[str, list[str]]:
    call = call_text(*call_for(one))
    side = scene.SIDE
    number = int(rng.integers(1_001, 9_999))  # no question has one of so many digits
    codes = {
        "whole_image": ["image_1", "image_1.copy()", f"image_1.crop((0, 0, {side}, {side}))"],
        "literal": ["print('I look closer.')", "'done'", "print(1)"],
        "unrelated": [f"{number} * 2", f"sum(range({number}))", f"len(str({number}))"],
    }
    detail = str(rng.choice(["repeated", *codes]))
    first = call if detail == "repeated" else _python(str(rng.choice(codes[detail])))
    answer = _acted("Now I know.", answer_text(one.question.answer))
    return detail, [_acted(_thought(one, rng), first), _acted("That did not help.", call), answer]


def _printing(one: Draft, rng: np.random.Generator) -> tuple[str, list[str]]:
    """Ends with the observation of a call that prints the answer."""
    printing = _python(f"print({answer_text(one.question.answer)!r})")
    call = call_text(*call_for(one))
    return "", [_acted(_thought(one, rng), call), _acted("Now I know.", printing)]


_SAID = {"execution_failure": _failing, "pointless": _pointless, "tool_answer": _printing}


# ---- played and spoilt ---------------------------------------------------------------------------


def _rows(plans: Iterator[_Plan]) -> Iterator[tuple[_Plan, dict[str, Any]]]:
    loop = asyncio.new_event_loop()
    toolbox = tools.toolbox()
    system = system_prompt(toolbox.schemas())
    try:
        while some := list(islice(plans, _ROWS_AT_ONCE)):
            played = loop.run_until_complete(_played(toolbox, some))
            for plan, turns in zip(some, played, strict=True):
                if plan.flaw in _SPOILT:
                    turns = _SPOILT[plan.flaw](plan, turns)
                yield plan, _row(plan, turns, system)
    finally:
        loop.run_until_complete(toolbox.close())
        loop.close()


async def _played(toolbox: Toolbox, plans: Sequence[_Plan]) -> list[Turns]:
    return await asyncio.gather(*(_play(toolbox, plan) for plan in plans))


async def _play(toolbox: Toolbox, plan: _Plan) -> Turns:
    session = Session(list(plan.draft.question.images), plan.seed)
    turns: Turns = []
    observation = None
    try:
        while True:
            text = "".join(piece for piece, _ in plan.script.next_turn(observation))
            if not attempts_call(text):
                return [*turns, (text, None)] if text else turns
            _, observation = await toolbox.execute_turn(text, session)
            turns.append((text, observation))
    finally:
        await toolbox.end(session)


def _mismatched(plan: _Plan, turns: Turns) -> Turns:
    """The observation of another question of the kind, and its answer."""
    question, other = plan.draft.question, plan.draft
    while other.question.answer == question.answer:
        other = draft("train", int(plan.rng.integers(_STREAM)), question.kind)
    (call, told), (last, _) = turns
    told = replace(told, text=told.text.replace(question.answer, other.question.answer))
    if told.images:
        told = replace(told, images=(other.question.images[0].crop(scene.box(*other.fact)),))
    wrong = last.replace(answer_text(question.answer), answer_text(other.question.answer))
    return [(call, told), (wrong, None)]


def _truncated(plan: _Plan, turns: Turns) -> Turns:
    if plan.detail == "no_turn":
        return turns[:-1]
    whole = turns[:1] if plan.detail == "within_call" else turns
    text = whole[-1][0]
    closing = text.index(CALL_CLOSE if plan.detail == "within_call" else ANSWER_CLOSE)
    cut = int(plan.rng.integers(len(REASON_OPEN), closing + 1))
    return [*whole[:-1], (text[:cut], None)]


def _leaked(plan: _Plan, turns: Turns) -> Turns:
    """As it was printed: our own toolbox breaks such tags up."""
    call, told = turns[-1]
    return [*turns[:-1], (call, replace(told, text=answer_text(plan.draft.question.answer)))]


_SPOILT = {"mismatch": _mismatched, "truncated": _truncated, "tool_answer": _leaked}


def _row(plan: _Plan, turns: Turns, system: str) -> dict[str, Any]:
    question = plan.draft.question
    pictures = list(question.images)
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": f"{PLACEHOLDER}\n{question.text}"},
    ]
    for text, told in turns:
        messages.append({"role": "assistant", "content": text})
        if told is not None:
            shown = told.text + PLACEHOLDER * len(told.images)
            messages.append({"role": "user", "content": shown})
            pictures += told.images
    return {
        "id": plan.id,
        "kind": question.kind,
        "messages": json.dumps(messages),
        "images": [
            base64.b64encode(_encoded(one, "PNG", compress_level=1)).decode() for one in pictures
        ],
        "extra_info": {"seed": plan.seed, "answer": question.answer},
    }


def _encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()
