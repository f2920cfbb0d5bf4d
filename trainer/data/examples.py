"""What a row of data is: a question, or a conversation to learn from. Pictures stay encoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from trainer.chat import find_answer
from trainer.data.pictures import BadRow, Picture
from trainer.types import Question

Speaker = Literal["system", "question", "policy", "observation"]


@dataclass(frozen=True)
class Example:
    """A question whose pictures have not been decoded."""

    id: str
    kind: str
    text: str
    """Without the placeholders at its ends: pictures come before the text. One within the text has
    become the picture's name, image_1, image_2, ..., which is also what tools call it."""
    pictures: tuple[Picture, ...]
    answer: str
    needs_tool: bool | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """data_source and extra_info, as verl hands them to a reward function; what a benchmark says of
    its answer."""
    also: tuple[str, ...] = ()
    """Further right answers."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Of a multiple choice: letter -> text, as they also stand in the text."""

    def question(self) -> Question:
        """Decodes the pictures. Raises BadRow."""
        images = tuple(one.open() for one in self.pictures)
        return Question(
            self.id,
            self.kind,
            self.text,
            images,
            self.answer,
            self.needs_tool,
            self.also,
            self.options,
            self.extra,
        )


@dataclass(frozen=True)
class Message:
    role: str
    """As the file has it: system, user, assistant or tool."""
    speaker: Speaker
    """Who wrote it. Only "policy" is trained on; a user's message that follows a tool call is an
    "observation"."""
    parts: tuple[str | int, ...]
    """Texts, and the numbers (from 0) of the pictures that stand between them."""

    @property
    def text(self) -> str:
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def shown(self) -> tuple[int, ...]:
        """Numbers of its pictures."""
        return tuple(part for part in self.parts if isinstance(part, int))


@dataclass(frozen=True)
class PolicyTurn:
    """A turn of the policy as it was recorded, and what came back."""

    text: str
    observation: Message | None


@dataclass(frozen=True)
class Conversation:
    """A trajectory to learn from: what was said, by whom, and the pictures in between.

    Example: system, question (<picture 0> "Which digit is in b3?"), policy (reason, tool_call),
    observation (<picture 1>), policy (reason, answer)
    """

    id: str
    kind: str
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    """JSON schemas from the file, where it has any."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """data_source and extra_info, where the file has them."""

    @property
    def turns(self) -> list[PolicyTurn]:
        """Several observations that follow one another are one."""
        turns: list[PolicyTurn] = []
        for message in self.messages:
            if message.speaker == "policy":
                turns.append(PolicyTurn(message.text, None))
            elif message.speaker == "observation" and turns:
                told = turns[-1].observation
                if told is not None:
                    message = replace(told, parts=told.parts + message.parts)
                turns[-1] = replace(turns[-1], observation=message)
        return turns

    @property
    def answer(self) -> str | None:
        """Inside the last <answer> of the last turn, if the policy ends the conversation."""
        last = self.messages[-1]
        return find_answer(last.text) if last.speaker == "policy" else None

    def example(self, *, answered: bool = True) -> Example:
        """What was asked, to be played again; the answer is what the policy ended with. answered:
        whether there must be one (else "" where there is none). Raises BadRow where there is not
        one question, and no answer."""
        asked = [message for message in self.messages if message.speaker == "question"]
        if len(asked) != 1:
            raise BadRow("unsupported", f"{len(asked)} questions in one conversation")
        if answered and not self.answer:
            raise BadRow("missing_answer", "the conversation does not end in an <answer>")
        if list(asked[0].shown) != list(range(len(asked[0].shown))):
            raise BadRow("unsupported", "pictures come before the question")
        text = question_text(asked[0].parts)
        pictures = tuple(self.pictures[n] for n in asked[0].shown)
        return Example(self.id, self.kind, text, pictures, self.answer or "", extra=self.extra)

    def chat(self) -> list[dict[str, Any]]:
        """The messages as chat templates take them."""
        return [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                    for part in message.parts
                ],
            }
            for message in self.messages
        ]


def question_text(parts: Sequence[str | int]) -> str:
    """Parts of a message -> Example.text."""
    inner = list(parts)
    for end in (0, -1):
        while inner and (isinstance(inner[end], int) or not inner[end].strip()):
            inner.pop(end)
    return "".join(part if isinstance(part, str) else f"image_{part + 1}" for part in inner).strip()
