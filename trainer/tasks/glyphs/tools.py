"""The tools of the task: real code and real searches, made as unreliable as real ones are."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Literal

import numpy as np

from trainer.tasks.glyphs import scene
from trainer.tasks.glyphs.world import COLOURS, OWNERS, emblem_note, world
from trainer.tools import ImageSearch, PythonTool, TextSearch, Tool, Toolbox
from trainer.tools.protocol import spec_of
from trainer.types import Observation, Session

FAILURES = 0.06
"""Share of calls, of any tool, that come back with an error although nothing was wrong."""
DISTRACTIONS = 0.10
"""Share of calls whose text is wrong: an outdated passage, a stale number. Pictures are not."""

Fate = Literal["works", "fails", "misleads"]


class Unreliable:
    """A tool whose calls sometimes fail and whose text sometimes misleads.

    Which of them is a pure function of the trajectory's seed and of the number of the call.
    """

    def __init__(self, tool: Tool, failures: float = FAILURES, distractions: float = DISTRACTIONS):
        self.tool = tool
        self.name = tool.name
        self.spec = spec_of(tool)
        self.failures = failures
        self.distractions = distractions

    def __getattr__(self, name: str):
        """What else a toolbox asks of a tool, its limits or what ends a session, is the tool's."""
        if name == "tool":  # not there yet: while it is copied, for example
            raise AttributeError(name)
        return getattr(self.tool, name)

    async def call(self, session: Session, **arguments) -> Observation:
        rng = np.random.default_rng([session.seed, session.calls])
        fate = _fate(rng, self.failures, self.distractions)
        if fate == "fails":
            return Observation("Error: the tool is busy, try again.", status="tool_error")
        observation = await self.tool.call(session, **arguments)
        if fate == "misleads" and observation.status == "ok":
            return replace(observation, text=_misled(observation.text, rng))
        return observation

    async def close(self) -> None:
        closing = self.tool.close() if hasattr(self.tool, "close") else None
        if inspect.isawaitable(closing):
            await closing


def fate(seed: int, call: int) -> Fate:
    """What becomes of call number `call`, from 1, of a trajectory of this seed: "works", "fails" or
    "misleads"."""
    return _fate(np.random.default_rng([seed, call]), FAILURES, DISTRACTIONS)


def _fate(rng: np.random.Generator, failures: float, distractions: float) -> Fate:
    luck = rng.random()
    if luck < failures:
        return "fails"
    return "misleads" if luck < failures + distractions else "works"


def _misled(text: str, rng: np.random.Generator) -> str:
    """The text with another colour or owner in it; of a number, another of as many digits."""
    for names in (COLOURS, OWNERS):
        for name in names:
            if name in text:
                return text.replace(name, str(rng.choice([n for n in names if n != name])))
    if not text.isdigit():
        return text
    low = 10 ** (len(text) - 1) if len(text) > 1 else 0
    number = low + int(rng.integers(9 * max(low, 1)))
    return str(number if str(number) != text else low)


def toolbox(failures: float = FAILURES, distractions: float = DISTRACTIONS) -> Toolbox:
    """python, text_search over every beacon, image_search over every emblem."""
    rng = np.random.default_rng(0)
    emblems = [
        (scene.draw_emblem(pattern, rng), emblem_note(owner))
        for pattern, owner in zip(world().emblem, world().owner, strict=True)
    ]
    python = PythonTool(persistent=False)
    tools = [python, TextSearch(world().corpus, top_k=1), ImageSearch(emblems, top_k=1)]
    return Toolbox([Unreliable(tool, failures, distractions) for tool in tools])
