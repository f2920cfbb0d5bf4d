"""Rows of a curation: what one is, the hash of its content, and how it is written again.

Kept trajectories are written in the layout of Metis-ColdStart, kept questions in that of Metis-RL,
both as JSON lines: `trainer.data` reads them back, and whoever reads those data sets does.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.data import BadRow, Conversation, Dataset, Example
from trainer.data.examples import question_text
from trainer.data.layouts import PLACEHOLDER

Item = Conversation | Example


@dataclass(frozen=True)
class Row:
    number: int
    """In the whole dataset, from 0."""
    digest: str
    """Of the content, pictures included: rows of equal digests are equal but for their ids."""
    item: Item

    @property
    def seed(self) -> int:
        """Of what is drawn for the row: a function of its content."""
        return int(self.digest[:8], 16) % 2**31


def good_rows(data: Dataset) -> Iterator[Row]:
    """Every row that is not bad, in the order of the files; one row is in memory at a time. A row
    one of whose files has gone by now is noted as bad."""
    numbers = np.flatnonzero(data.good.members()).tolist()
    for number, item in zip(numbers, data, strict=True):
        try:
            found = digest(item)
        except BadRow as bad:
            data.reject(number, bad)
            continue
        yield Row(number, found, item)


def chosen_rows(data: Dataset, numbers: Sequence[int], digests: Mapping[int, str]) -> Iterator[Row]:
    """These rows, whose digests are known."""
    for number in numbers:
        yield Row(number, digests[number], data[number])


def digest(item: Item) -> str:
    """[64] hex digits. Raises BadRow for a picture whose file has gone."""
    hashed = hashlib.sha256()
    if isinstance(item, Conversation):
        content: list[Any] = [[one.role, one.speaker, one.parts] for one in item.messages]
        content += [item.tools, item.extra]
    else:
        content = [item.text, item.answer, list(item.also), item.options, item.extra]
    hashed.update(json.dumps([item.kind, *content], sort_keys=True, default=repr).encode())
    for picture in item.pictures:
        data = picture.read()
        hashed.update(len(data).to_bytes(8, "big") + data)
    return hashed.hexdigest()


def question_of(item: Item) -> Example:
    """What was asked. Of a trajectory its first question, whose answer is the known one or, where
    none is known, the trajectory's own ("" where it has none)."""
    if isinstance(item, Example):
        return item
    asked = next(message for message in item.messages if message.speaker == "question")
    pictures = tuple(item.pictures[number] for number in asked.shown)
    answer = known_answer(item) or item.answer or ""
    return Example(item.id, item.kind, question_text(asked.parts), pictures, answer)


def extra_info(item: Item) -> Mapping[str, Any]:
    found = item.extra.get("extra_info")
    return found if isinstance(found, Mapping) else {}


def recorded_seed(item: Item) -> int:
    """Of the session in which a trajectory's tools were called: extra_info.seed, else 0."""
    found = extra_info(item).get("seed", 0)
    return found if isinstance(found, int) and not isinstance(found, bool) else 0


def known_answer(item: Item) -> str | None:
    """The truth, where the row tells it: of a trajectory extra_info.answer."""
    if isinstance(item, Example):
        return item.answer
    found = extra_info(item).get("answer")
    return None if found is None or not str(found).strip() else str(found)


def coldstart_line(conversation: Conversation) -> dict[str, Any]:
    """The trajectory as a row of Metis-ColdStart.

    Pictures stand in the text as <image>; where a text has those very letters in it, the content is
    a list of parts, in which nothing can be taken for another thing.
    """
    literal = any(
        PLACEHOLDER in message.text or (message.role == "assistant" and message.shown)
        for message in conversation.messages
    )
    messages, order = [], []
    for message in conversation.messages:
        order += message.shown
        if literal:
            content: Any = [
                {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"}
                for part in message.parts
            ]
        else:
            content = "".join(p if isinstance(p, str) else PLACEHOLDER for p in message.parts)
        messages.append({"role": message.role, "content": content})
    row = {
        "id": conversation.id,
        "kind": conversation.kind,
        "messages": json.dumps(messages, ensure_ascii=False),
        "images": [_base64(conversation.pictures[number].read()) for number in order],
        **conversation.extra,
    }
    return row | ({"tools": list(conversation.tools)} if conversation.tools else {})


def rl_line(example: Example, about: Mapping[str, Any]) -> dict[str, Any]:
    """The question as a row of Metis-RL; `about` is added to its extra_info."""
    source = str(example.extra.get("data_source") or "curated")
    also = list(example.also)
    return {
        "data_source": source,
        "prompt": [{"role": "user", "content": PLACEHOLDER * len(example.pictures) + example.text}],
        "images": [_base64(picture.read()) for picture in example.pictures],
        "ability": example.kind,
        "reward_model": {
            "ground_truth": [example.answer, *also] if also else example.answer,
            "style": "rule",
        },
        "extra_info": {
            **extra_info(example),
            "index": example.id.removeprefix(f"{source}/"),
            **about,
        },
    }


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
