"""Trajectories and questions by hand, for the tests of the curation."""

from __future__ import annotations

import json
from pathlib import Path

from data_files import b64, encoded
from PIL import Image

from trainer.chat import call_text, turn_text
from trainer.data import Conversation
from trainer.data.layouts import LAYOUTS, read_row
from trainer.images import ImageLimits


def noise(number: int, size: tuple[int, int] = (48, 48)) -> Image.Image:
    """A picture that looks like no other."""
    import numpy as np

    coarse = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def python(code: str, reason: str = "I look.") -> str:
    call = call_text("python", {"code": code})
    return turn_text(reason).partition("<answer>")[0] + call


def answered(answer: str, reason: str = "Now I know.") -> str:
    return turn_text(reason, answer=answer)


def row(*said: str, images=(), question: str = "<image>\nWhat is written?", **columns) -> dict:
    """A row of Metis-ColdStart: the policy's turns and the observations in turn. images: of the
    observations' placeholders; the question's picture is noise(0)."""
    messages = [{"role": "user", "content": question}]
    messages += [
        {"role": "user" if n % 2 else "assistant", "content": text} for n, text in enumerate(said)
    ]
    pictures = [noise(0)] * question.count("<image>") + list(images)
    return {
        "messages": json.dumps(messages),
        "images": [b64(encoded(picture)) for picture in pictures],
    } | columns


def read(given: dict) -> Conversation:
    found = read_row(LAYOUTS["metis-coldstart"], given, Path(), ImageLimits())
    assert isinstance(found, Conversation)
    return found


def conversation(*said: str, **about) -> Conversation:
    return read(row(*said, **about))


def small(count: int) -> list[dict]:
    """Rows of which every sixth has the same fate: what the model can add, sound, another
    observation, cut off, of an emblem, sound with a picture."""
    rows = []
    for n in range(count):
        a, b = 2 * n + 1, n % 7 + 2
        crop = python("image_1.crop((0, 0, 24, 24))")
        part = noise(n).crop((0, 0, 24, 24))
        kind = n % 6
        said = {
            0: [python(f"{a} + {b}"), str(a + b), answered(str(a + b))],
            1: [python(f"{a} * {b}"), str(a * b), answered(str(a * b))],
            2: [python(f"{a} * {b}"), str(a * b + 1), answered(str(a * b + 1))],
            3: [python(f"{a} * {b}"), str(a * b)],
        }.get(kind, [crop, "<image>", answered("7")])
        asked = {0: f"What is {a} + {b}?", 4: "Whose emblem is this?", 5: "Which digit is it?"}
        given = row(
            *said,
            question="<image>\n" + asked.get(kind, f"What is {a} * {b}?"),
            id=f"small/{n}",
            kind=f"k{n % 2}",
        )
        given["images"] = [b64(encoded(one)) for one in [noise(n), part][: 1 + (kind > 3)]]
        rows.append(given)
    return rows
