"""Small files in the exact layouts of the data sets that trainer.data reads."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from trainer.data import Checks, Dataset

ANY = Checks(max_bad=1.0)


def reasons(data: Dataset) -> list[tuple[int, str]]:
    return [(one.row, one.reason) for one in data.rejections]


SYSTEM = "You are an efficient problem-solving agent.\n\n# Tools\nYou have access to ..."

RL_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        (
            "prompt",
            pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())])),
        ),
        ("images", pa.list_(pa.struct([("bytes", pa.binary())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("answer", pa.string()),
                    ("index", pa.string()),
                    ("pass8", pa.int64()),
                    ("question", pa.string()),
                ]
            ),
        ),
    ]
)
COLDSTART_SCHEMA = pa.schema([("messages", pa.string()), ("images", pa.list_(pa.string()))])


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def png(number: int = 0, size: tuple[int, int] = (12, 9)) -> bytes:
    """A picture of one colour that depends on the number."""
    return encoded(Image.new("RGB", size, colour(number)))


def colour(number: int) -> tuple[int, int, int]:
    return (number % 256, number // 256 % 256, 77)


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


ABILITIES = ("math", "perception", "search", "reasoning")


def rl_row(number: int, **changes) -> dict:
    question = f"<image>\nWhat is written in box {number}?"
    row = {
        "data_source": "vthinker-sft",
        "prompt": [
            {"content": SYSTEM, "role": "system"},
            {"content": question, "role": "user"},
        ],
        "images": [{"bytes": png(number)}],
        "ability": ABILITIES[number % 4],
        "reward_model": {"ground_truth": f"{number}/264", "style": "rule"},
        "extra_info": {
            "answer": f"{number}/264",
            "index": f"source_index_{number}",
            "pass8": 0,
            "question": question,
        },
    }
    return row | changes


def write_rl(path: Path, rows: Sequence[dict], **settings) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), RL_SCHEMA), path, **settings)
    return path


def trajectory(number: int) -> tuple[list[dict], list[bytes]]:
    """A question, a crop, a sum, an answer: the messages and their two pictures."""
    crop = {"name": "python", "arguments": {"code": "image_1.crop((0, 0, 4, 4))"}}
    add = {"name": "python", "arguments": {"code": f"print({number} + 1)"}}
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": f"<image>\nAdd one to the number in box {number}."},
        {
            "role": "assistant",
            "content": f"<reason>Closer.</reason>\n<tool_call>{json.dumps(crop)}</tool_call>",
        },
        {"role": "user", "content": "Code execution result:\nstdout:\n<image>"},
        {
            "role": "assistant",
            "content": f"<reason>Now I add.</reason>\n<tool_call>{json.dumps(add)}</tool_call>",
        },
        {"role": "user", "content": f"Code execution result:\nstdout:{number + 1}\nstderr:"},
        {
            "role": "assistant",
            "content": f"<reason>Done.</reason>\n<answer>{number + 1}</answer>",
        },
    ]
    return messages, [png(number), png(number + 1000, (4, 4))]


def coldstart_row(number: int, **changes) -> dict:
    messages, pictures = trajectory(number)
    return {"messages": json.dumps(messages), "images": [b64(p) for p in pictures]} | changes


def write_coldstart(path: Path, rows: Sequence[dict], **settings) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows), COLDSTART_SCHEMA), path, **settings)
    return path


def question_row(number: int, **changes) -> dict:
    row = {
        "id": f"q/{number}",
        "question": f"What is {number} + 1?",
        "answer": str(number + 1),
        "images": [b64(png(number))],
        "kind": "sum",
        "needs_tool": False,
    }
    return row | changes


def write_lines(path: Path, rows: Sequence[dict | str | bytes]) -> Path:
    """Objects become JSON; text and bytes are lines as they are."""
    with path.open("wb") as file:
        for row in rows:
            line = json.dumps(row) if isinstance(row, dict) else row
            file.write(line.encode() if isinstance(line, str) else line)
            file.write(b"\n")
    return path
