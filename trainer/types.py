"""The nouns of the trainer: what is asked, what a tool answers, what a rollout is.

A leaf: it imports nothing else of the trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

from PIL.Image import Image

Status = Literal["ok", "truncated", "tool_infra", "unscored"]
"""What became of a rollout. Only `ok` and `truncated` carry a reward:

ok          it ended by itself (an answer, or an end of turn without one)
truncated   it met the limit of turns or of tokens: scored, but never in the qualifying set Q
tool_infra  a tool's infrastructure failed: unscored, in no channel and in no count
unscored    the answer could not be judged: likewise
"""

ObservationStatus = Literal["ok", "tool_error", "infra_error"]
"""ok, the policy's own fault (malformed call, exception: counts as a call), or nobody's fault."""


Mode = Literal["allowed", "forbidden", "forced", "direct"]
"""How a question is played:

allowed    the policy chooses
forbidden  it knows its tools, but where it would call one, an answer is begun in its place
forced     its first action is a call: where it would answer, a call is begun in its place
direct     it is told of no tools at all
"""


class ConfigError(ValueError):
    """A setting is wrong: the message names it, its limit and the mend."""


class TrainingError(RuntimeError):
    """Training cannot go on: the message says why, and what is safe."""


@dataclass(frozen=True)
class Question:
    """One prompt with its known answer.

    Example: Question("glyphs/heldout/17", "glyph_small", "Which digit is in square b3?",
                      (image,), "7", needs_tool=True)
    """

    id: str
    """Unique and reproducible: <source>/<split>/<index>."""
    kind: str
    """The ability that the question exercises; evaluation reports every kind by itself."""
    text: str
    images: tuple[Image, ...]
    answer: str
    needs_tool: bool | None = None
    """Whether a careful agent would call a tool; None where nobody knows."""
    also: tuple[str, ...] = ()
    """Further right answers; any one will do."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of a multiple choice: letter -> text, as they also stand in the text."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the source, for reward functions (`data_source`, `extra_info`). Never shown to the
    policy."""


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Observation:
    """What a tool gives back. Text and images reach the policy; the status does not."""

    text: str
    images: tuple[Image, ...] = ()
    status: ObservationStatus = "ok"


@dataclass
class Session:
    """What the tools of one trajectory share: its images (image_1, image_2, ... in order; a tool
    that makes an image appends it here) and its seed."""

    images: list[Image]
    seed: int = 0
    calls: int = 0
    """Tool calls made so far, malformed ones included."""
    id: str = field(default_factory=lambda: uuid4().hex)
    """Under which a tool keeps what it holds for the trajectory. Never part of an observation."""


@dataclass(frozen=True)
class Turn:
    """One turn of the policy: its text, the (first) call in it if any, and what came back."""

    text: str
    call: ToolCall | None = None
    observation: Observation | None = None


@dataclass
class Rollout:
    """One trajectory, token in, token out: the sampled ids are kept as they were sampled.

    Example, G = 1, one call ('.' = not written by the policy, 'P' = written by the policy):

        ids     | system+user prompt | reason, tool_call | observation | reason, answer |
        policy  | ...............    | PPPPPPPPPPPPPPPPP | ........... | PPPPPPPPPPPPPP |
    """

    question: Question
    seed: int
    ids: list[int]
    """[T] prompt, sampled turns and template suffixes; image placeholders are expanded."""
    policy: list[bool]
    """[T] True where the policy wrote the token, or an action was opened for it: the loss mask,
    built together with the ids."""
    logprob: list[float]
    """[T] logprob under the sampling distribution where `policy`, else 0.0."""
    images: list[Image]
    """Every image in the order of its placeholders: the question's, then the tools'."""
    prompt_length: int
    turns: list[Turn] = field(default_factory=list)
    status: Status = "ok"
    calls: int = 0
    """T_i of the paper: attempted calls, malformed ones included."""
    answer: str | None = None
    """The text inside the last <answer> of the last turn, of policy-written tokens only."""
    correct: bool = False
    formatted: bool = False
    score: float | None = None
    """r_ans in [0, 1] where a reward function gave it; None: 1 where `correct`, else 0."""
    mode: Mode = "allowed"
    forced: float | None = None
    """Logprob, under the sampling distribution, of the tokens that opened an action in the policy's
    place; None where nothing was forced."""
    prompt_tokens: int = 0
    """Tokens that were read: prompt and observations, each once."""
    sampled_tokens: int = 0
    model_seconds: float = 0.0
    """Its share of the time that the model took; of a batch, by tokens."""
    tool_seconds: float = 0.0
    """From call to observation, summed over its calls."""

    @property
    def scored(self) -> bool:
        return self.status in ("ok", "truncated")

    @property
    def accuracy_reward(self) -> float:
        """r_acc = 0.9 r_ans + 0.1 r_fmt."""
        answered = self.correct if self.score is None else self.score
        return 0.9 * answered + 0.1 * self.formatted
