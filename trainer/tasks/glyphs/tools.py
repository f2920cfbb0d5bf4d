"""The tools of the task: real code and real searches, made as unreliable as real ones are."""

from __future__ import annotations

import inspect

import numpy as np

from trainer.tasks.glyphs import scene
from trainer.tasks.glyphs.world import emblem_note, world
from trainer.tools import ImageSearch, PythonTool, TextSearch, Tool, Toolbox
from trainer.tools.protocol import spec_of
from trainer.tools.text_search import numbered
from trainer.types import Observation, Session

FAILURES = 0.06
"""Share of calls, of any tool, that come back with an error although nothing was wrong."""
DISTRACTIONS = 0.08
"""Share of searches that come back with something else than what was asked for."""


class Unreliable:
    """A tool whose calls sometimes fail and whose searches sometimes mislead.

    Which of them is a pure function of the trajectory's seed and of the number of the call.
    """

    def __init__(self, tool: Tool, failures: float = FAILURES, distractions: float = DISTRACTIONS):
        self.tool = tool
        self.name = tool.name
        self.spec = spec_of(tool)
        self.failures = failures
        self.distractions = distractions

    async def call(self, session: Session, **arguments) -> Observation:
        rng = np.random.default_rng([session.seed, session.calls])
        luck = rng.random()
        if luck < self.failures:
            return Observation("Error: the tool is busy, try again.", status="tool_error")
        if luck < self.failures + self.distractions:
            if isinstance(self.tool, TextSearch):
                return Observation(numbered([str(rng.choice(world().corpus))]))
            if isinstance(self.tool, ImageSearch):
                return Observation(numbered([emblem_note(str(rng.choice(world().owner)))]))
        return await self.tool.call(session, **arguments)

    async def close(self) -> None:
        closing = self.tool.close() if hasattr(self.tool, "close") else None
        if inspect.isawaitable(closing):
            await closing


def toolbox(failures: float = FAILURES, distractions: float = DISTRACTIONS) -> Toolbox:
    """python, text_search over every beacon, image_search over every emblem."""
    rng = np.random.default_rng(0)
    emblems = [
        (scene.draw_emblem(pattern, rng), emblem_note(owner))
        for pattern, owner in zip(world().emblem, world().owner, strict=True)
    ]
    tools = [PythonTool(), TextSearch(world().corpus, top_k=1), ImageSearch(emblems, top_k=1)]
    return Toolbox([Unreliable(tool, failures, distractions) for tool in tools])
