"""The tools run again what a trajectory called, and must give what was recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from dataclasses import dataclass

from PIL.Image import Image

from trainer.chat import attempts_call, find_call
from trainer.curate.looks import distance, look
from trainer.curate.rows import recorded_seed
from trainer.curate.texts import agree, fail_alike
from trainer.curate.verdicts import Drop
from trainer.data import BadRow, Conversation, Message, PolicyTurn
from trainer.tools import Toolbox
from trainer.types import Observation, Session

SHOWN = 160
"""Characters of an observation that a detail quotes."""


class Unavailable(Exception):
    """A tool's infrastructure failed: nothing is known of the row."""


@dataclass(frozen=True)
class Tolerance:
    number: float = 1e-4
    """Relative, of numbers with a point."""
    bits: int = 8
    """Of the 64-bit perceptual hash."""
    grey: float = 6.0
    """Root mean square of grey levels, of 255."""
    recovered: bool = True
    """Whether a call that fails, as it did when it was recorded, may be mended by a later one."""
    trusted: Collection[str] = ()
    """Tools whose recorded observations are taken as they are."""


async def execute(
    conversation: Conversation, toolbox: Toolbox, tolerance: Tolerance
) -> Drop | None:
    """Runs every call in a session of the recorded seed; the first that fails or gives something
    else decides. Raises Unavailable, and BadRow for a picture that cannot be decoded."""
    turns = [turn for turn in conversation.turns if attempts_call(turn.text)]
    if not turns:
        return None
    asked = next(one for one in conversation.messages if one.speaker == "question")
    session = Session(await _opened(conversation, asked), recorded_seed(conversation))
    failed: Drop | None = None
    try:
        for number, turn in enumerate(turns, 1):
            if _name(turn.text) in tolerance.trusted:
                session.calls += 1
                if turn.observation is not None:
                    session.images += await _opened(conversation, turn.observation)
                failed = None
                continue
            _, observation = await toolbox.execute_turn(turn.text, session)
            if observation.status == "infra_error":
                raise Unavailable(f"call {number}: {observation.text[:SHOWN]}")
            difference = await _difference(conversation, turn, observation, tolerance)
            failed = None
            if observation.status == "tool_error":
                failed = Drop("execution_failure", f"call {number}: {_short(observation.text)}")
                if difference or not tolerance.recovered:
                    return failed
            elif difference:
                return Drop("mismatch", f"call {number}: {difference}")
        return failed
    finally:
        await toolbox.end(session)


def _name(turn: str) -> str:
    try:
        return str(json.loads(find_call(turn) or "")["name"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


async def _opened(conversation: Conversation, message: Message) -> list[Image]:
    pictures = [conversation.pictures[number] for number in message.shown]
    return await asyncio.to_thread(lambda: [picture.open() for picture in pictures])


async def _difference(
    conversation: Conversation, turn: PolicyTurn, executed: Observation, tolerance: Tolerance
) -> str:
    """In what the recorded observation is another one; "" where it is the same."""
    recorded = turn.observation
    if recorded is None:
        return "no observation was recorded"
    same = fail_alike if executed.status == "tool_error" else agree
    if not same(recorded.text, executed.text, tolerance.number):
        return f"recorded {_short(recorded.text)}, executed {_short(executed.text)}"
    if len(recorded.shown) != len(executed.images):
        return f"recorded {len(recorded.shown)} pictures, executed {len(executed.images)}"
    if not executed.images:
        return ""
    try:
        pictures = await _opened(conversation, recorded)
    except BadRow as bad:
        return f"the recorded picture cannot be decoded: {bad.detail}"
    return await asyncio.to_thread(_unlike, pictures, executed.images, tolerance)


def _unlike(recorded: list[Image], executed: tuple[Image, ...], tolerance: Tolerance) -> str:
    for number, (one, other) in enumerate(zip(recorded, executed, strict=True), 1):
        if one == other:  # pixel by pixel, as nearly all are: cheaper than two looks
            continue
        apart = distance(look(one), look(other))
        if not apart.within(tolerance.bits, tolerance.grey):
            return f"picture {number} is another one: {apart}"
    return ""


def _short(text: str) -> str:
    """A text quoted, on one line; of an error its end, where it says what it is."""
    text = " ".join(text.split())
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"
    return json.dumps(text, ensure_ascii=False)
