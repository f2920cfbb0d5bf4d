"""Tasks: where questions, tools and demonstrations come from. A folder or a file a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # a task's name and its base model are asked for before torch is there
    from trainer.rollout import Recorded, Script
    from trainer.tools import Toolbox
    from trainer.types import Question, Rollout


class Task(Protocol):
    name: str
    base: Path
    """Folder of the model that the cold start begins with."""

    @property
    def kinds(self) -> Sequence[str]:
        """The kinds of question, in the order in which they are reported."""

    def train(self, seed: int, start: int, count: int) -> list[Question]:
        """Training questions number start .. start + count - 1 of an endless stream."""

    def heldout(self, count: int) -> list[Question]:
        """The same held-out questions for every seed and every run, in the proportions of the mix;
        `count` up to rounding."""

    def toolbox(self) -> Toolbox:
        """The tools of the task. The caller closes it."""

    def demonstrations(
        self, seed: int, count: int, direct_share: float
    ) -> tuple[list[Question], Sequence[Script | Recorded]]:
        """Questions and the scripts that play them for the cold start."""

    @property
    def unplayable(self) -> Mapping[str, int]:
        """How many demonstrations there would be, but that they cannot be played; by reason."""

    def fault(self, rollout: Rollout) -> str | None:
        """Why a demonstration, now that it has been played, is not to be learnt from; None: it
        is."""


def load_task(name: str, **settings: Any) -> Task:
    """settings: what the task takes; glyphs takes nothing, and file what FileTask takes.

    Raises ValueError for a task that does not exist.
    """
    if name == "glyphs":
        from trainer.tasks.glyphs import Glyphs

        return Glyphs(**settings)
    if name == "file":
        from trainer.tasks.file import FileTask

        return FileTask(**settings)
    raise ValueError(f"there is no task {name!r}; the tasks are: glyphs, file")
